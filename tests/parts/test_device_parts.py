"""Every part that works on tensors gives the same numbers on a device, and knows what waits cost.

Parts enrol by being there. A device that is none stands in for a GPU (`shoal.testing`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts import find, names
from shoal.parts.models.cnn import CNN
from shoal.parts.models.mlp import MLP
from shoal.parts.models.transformer import Transformer
from shoal.parts.tasks.base import ModuleTask, task_of
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.task import Shard
from shoal.tensor import keyed, tree
from shoal.tensor.flat import FlatSpec
from shoal.testing.pretend_device import PretendDevice, check_device

SPEC = FlatSpec(("conv", "bias", "head"), ((5, 3, 2), (5,), (4, 3)))
ROWS = 7


def examples(role: str) -> list[Any]:
    return [
        pytest.param(name, settings, id=f"{name}-{place}")
        for name in names(role)
        for place, settings in enumerate(getattr(find(role, name), "examples", ({},)))
    ]


def normal(*shape: int, word: str = "x", dtype: torch.dtype = torch.float32) -> Tensor:
    key = keyed.key_of(1, word)
    for size in shape:
        key = keyed.grid(key, size)
    return keyed.normal(key, dtype=dtype)


# Aggregators.

LOOKS = {
    "centered_clipping": 2,
    "nnm": 1,
    "bucketing": 1,
    "mda": 1,
    "smea": 2,
    "caf": 6,
    "flag": 12,
}
"""Rules that look at their input, because a guess would cost far more than the wait (nnm: for the
rule inside); that send a table of indices (bucketing, mda, smea); or that decompose small matrices,
for which torch waits (smea, caf and flag, the last two once for each iteration)."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "settings"), examples("aggregate"))
def test_aggregators(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    rule = find("aggregate", name)(**settings)
    if hasattr(rule, "bind"):
        rule = rule.bind(FlatSpec(("weight", "bias"), ((4,), ())))
    x = normal(3, ROWS, 5, dtype=dtype)
    x[1, 2, 0] = float("nan")
    mask = normal(3, ROWS, word="mask") < 0.8
    mask[:, 0] = True
    weight = normal(3, ROWS, word="weight").abs()
    used = check_device(
        lambda x, mask, weight, center: rule(x, mask=mask, weight=weight, center=center),
        x, mask, weight, x[:, 0].clone(),
    )  # fmt: skip
    assert used.waits.total() <= LOOKS.get(name, 0), used.waits
    if hasattr(rule, "everyone"):
        used = check_device(rule.everyone, x, mask)
        assert used.waits.total() <= LOOKS.get(name, 0), used.waits
    if hasattr(rule, "among"):
        heard = torch.eye(ROWS, dtype=torch.bool) | (normal(3, ROWS, ROWS, word="heard") < 1)
        used = check_device(rule.among, x, heard)
        assert used.waits.total() <= LOOKS.get(name, 0), used.waits
    if getattr(rule, "mix", None) is not None:
        share = normal(ROWS, ROWS, word="share").abs()
        used = check_device(lambda share, x, own: rule.mix(share, x, own), share, x[0], x[0])
        assert not used.waits


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_linear_rules_take_sparse_weights() -> None:
    rule = find("aggregate", "mean")()
    columns = torch.tensor([0, 1, 1, 2, 2, 0])

    def mixed(columns: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        starts = torch.arange(0, 7, 2, device=x.device)
        return rule.mix(torch.sparse_csr_tensor(starts, columns, weight, (3, 3)), x)

    used = check_device(
        mixed, columns, normal(6, word="w", dtype=torch.float64).abs(), normal(3, 5)
    )
    assert not used.waits


# Transforms.

LOOKS_OF_CODECS = {"discrete_gaussian": 2}
"""Exact draws are made on the processor: its keys go there, once for each message."""


@pytest.mark.parametrize(("name", "settings"), examples("transform"))
def test_transforms(name: str, settings: dict[str, Any]) -> None:
    bound = find("transform", name)(**settings).bind(SPEC)
    x = normal(3, SPEC.dim)
    x[1] = x[1].round()

    def two_rounds(x: Tensor, key: Tensor) -> Any:
        state = bound.init(x)
        first, state = bound.encode(x, state, key)
        second, state = bound.encode(0.5 * x, state, keyed.fold(key, 1))
        return first, second, state, bound.decode(first), bound.decode(second)

    used = check_device(two_rounds, x, keyed.grid(keyed.key_of(3), 3))
    assert used.waits.total() <= LOOKS_OF_CODECS.get(name, 0), used.waits


@pytest.mark.parametrize(("name", "settings"), examples("transform"))
def test_bytes_of_payloads(name: str, settings: dict[str, Any]) -> None:
    """They are those of the processor's payload, and what is read back can go there again."""
    bound = find("transform", name)(**settings).bind(SPEC)
    x, key = normal(SPEC.dim), keyed.key_of(3)
    near, _ = bound.encode(x, bound.init(x), key)
    with PretendDevice() as device:
        away = x.to(device.name)
        far, _ = bound.encode(away, bound.init(away), key.to(device.name))
        data = bytes(far.pack())
        assert data == bytes(near.pack())
        assert far.byte_count() == near.byte_count() == len(data)
        assert int(far.size_bytes()) == int(near.size_bytes())
        read = tree.map_tree(lambda leaf: leaf.to(device.name), bound.unpack(data))
        assert bound.decode(read).cpu().equal(bound.decode(far).cpu())


# Attacks.


@pytest.mark.parametrize(("name", "settings"), examples("attack"))
def test_attacks(name: str, settings: dict[str, Any]) -> None:
    attack = find("attack", name)(**settings)
    honest, own = normal(2, ROWS, 5), normal(2, 2, 5, word="own")
    if attack.knowledge is Knowledge.OWN:
        honest = own

    def sent(honest: Tensor, own: Tensor, key: Tensor) -> Tensor:
        def rule(candidate: Tensor) -> Tensor:
            total = honest.sum(-2, keepdim=True) + candidate.sum(-2, keepdim=True)
            return (total / (ROWS + 2)).expand(honest.shape)

        return attack(View(honest, own, 0, rule), key)

    used = check_device(sent, honest, own, keyed.grid(keyed.key_of(2), 2))
    # An eigenvalue problem reports whether it converged.
    assert set(used.waits) <= {k for k in used.waits if k.startswith("_linalg")}, used.waits


@pytest.mark.parametrize("name", names("attack"))
def test_poison(name: str) -> None:
    attack = find("attack", name)()

    def poisoned(x: Tensor, y: Tensor, shard: Shard, key: Tensor) -> Any:
        model = MLP(hidden=()).build((2, 3), 8)
        return attack.poison(task_of(model, "cross_entropy", (x, y), (x, y), shard), shard, key)

    shard = Shard(torch.tensor([[0, 2, 4], [1, 3, 0]]), torch.tensor([3, 2]))
    keys = keyed.grid(keyed.key_of(4), 2)
    check_device(poisoned, normal(9, 2, 3), torch.arange(9) % 8, shard, keys)


# Optimisers.

OPTIMISERS = [
    ("sgd", {}), ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("sgd", {"momentum": 0.9, "dampening": 0.5, "decay": ("cosine", 5, 0.1)}),
    ("adamw", {}), ("adamw", {"decay": ("linear", 5, 0.1, 2)}),
]  # fmt: skip


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("name", "settings"), OPTIMISERS)
def test_optimisers(name: str, settings: dict[str, Any], donate: bool) -> None:
    rule = find("optimise", name)(**settings)

    def steps(params: Tensor, grads: Tensor) -> Any:
        params = params.clone()
        state = rule.init(params)
        for grad in grads.unbind(0):
            params, state = rule.step(params, grad.clone(), state, 0.5, donate=donate)
        return params, state

    assert not check_device(steps, normal(3, 5), normal(4, 3, 5, word="grad")).waits


def test_every_optimiser_is_here() -> None:
    assert {name for name, _ in OPTIMISERS} == set(names("optimise"))


# Models and tasks.

FEATURES = {"mlp": (6,), "cnn": (1, 8, 8), "transformer": (6,)}
MODELS = {
    "mlp": MLP(hidden=(5,)),
    "cnn": CNN(channels=(2, 3), hidden=5),
    "transformer": Transformer(width=8, layers=1, heads=2),
}
METHODS = [
    ("mlp", "stacked"), ("mlp", "vmap"), ("mlp", "peer"), ("cnn", "stacked"),
    ("cnn", "channels_last"), ("cnn", "vmap"), ("transformer", "vmap"), ("transformer", "peer"),
]  # fmt: skip


def made(name: str, batching: str, x: Tensor, y: Tensor, shard: Shard) -> ModuleTask:
    module = MODELS[name].build(FEATURES[name], 4)
    return task_of(module, "cross_entropy", (x, y), (x, y), shard, classes=4, batching=batching)


def samples(name: str) -> tuple[Tensor, Tensor, Shard]:
    """Nine samples; the second peer has fewer, the third none."""
    shard = Shard(torch.tensor([[0, 2, 4, 5], [1, 3, 0, 0], [0] * 4]), torch.tensor([4, 2, 0]))
    if name == "transformer":
        words = (normal(9, *FEATURES[name]) * 10).long().abs() % 4
        return words, words.roll(1, -1), shard
    return normal(9, *FEATURES[name]), torch.arange(9) % 4, shard


def test_every_model_is_here() -> None:
    assert {name for name, _ in METHODS} == set(names("models"))


@pytest.mark.parametrize(("name", "batching"), METHODS)
def test_models(name: str, batching: str) -> None:
    """Drawn parameters, batches, losses, gradients, clipped gradients and metrics."""
    x, y, shard = samples(name)
    keys = keyed.grid(keyed.key_of(5), 3)

    def numbers(x: Tensor, y: Tensor, shard: Shard, key: Tensor) -> Any:
        task = made(name, batching, x, y, shard)
        params = task.init(key)
        batches = [task.batch(shard, key, 3), *task.epoch(shard, key, 3)]
        return (
            params,
            tuple((b.x, b.y, b.mask) for b in batches),
            tuple(task.loss(params, b) for b in batches),
            tuple(task.grad(params, b) for b in batches),
            tuple(task.clipped_grad_sum(params, b, 0.1) for b in batches),
            task.evaluate(params),
        )

    check_device(numbers, x, y, shard, keys)


@pytest.mark.parametrize(("name", "batching"), METHODS)
def test_a_step_waits_for_nothing(name: str, batching: str) -> None:
    x, y, shard = samples(name)
    with PretendDevice() as device:
        split = tree.map_tree(lambda leaf: leaf.to(device.name), shard)
        task = made(name, batching, x, y, split)
        keys = keyed.grid(keyed.key_of(5).to(device.name), 3)
        params = task.init(keys)
        device.waits.clear()
        batch = task.batch(split, keys, 3)
        params = params - 0.1 * task.grad(params, batch)
        assert not device.waits
        task.clipped_grad_sum(params, batch, 0.1)
        # Whether every sample's gradient is finite, before a second pass uses them.
        assert device.waits.total() == (task.method == "stacked")
        device.waits.clear()
        task.evaluate(params)
        assert not device.waits
        list(task.epoch(split, keys, 3))
        # An epoch's length is that of the largest shard.
        assert device.waits.total() == 1


@pytest.mark.parametrize("name", names("tasks"))
def test_tasks(name: str) -> None:
    kind = find("tasks", name)
    settings = getattr(kind, "examples", ({},))[0]
    settings = {"peers": 4, **settings}
    if name in ("mnist", "fashion"):
        settings |= {"train_samples": 200}
    try:
        near = kind(**settings)
    except UsageError as error:
        if "install" not in str(error):
            raise
        pytest.skip(str(error))
    with PretendDevice() as device:
        far = kind(**settings, device=device.name)
        keys = keyed.grid(keyed.key_of(6), 4)
        params = [task.init(key) for task, key in ((near, keys), (far, keys.to(device.name)))]
        assert params[1].device.type == "pretend"
        assert params[1].cpu().equal(params[0])
        every = torch.arange(4)
        grads = []
        for task, rows, key, at in (
            (near, every, keys, params[0]),
            (far, every.to(device.name), keys.to(device.name), params[1]),
        ):
            grads.append(task.grad(at, task.batch(task.shard(rows), key, 5)))
        assert grads[1].cpu().equal(grads[0])
        for metric, value in far.evaluate(params[1][:1]).items():
            assert value.cpu().equal(near.evaluate(params[0][:1])[metric])


@pytest.mark.parametrize(("name", "settings"), examples("measure"))
def test_measures(name: str, settings: dict[str, Any]) -> None:
    measure = find("measure", name)(**settings)
    x, y, shard = samples("mlp")
    near = made("mlp", "auto", x, y, shard)
    params = near.init(keyed.key_of(5))
    with PretendDevice() as device:
        split = tree.map_tree(lambda leaf: leaf.to(device.name), shard)
        far = made("mlp", "auto", x, y, split)
        there, here = measure(far, params.to(device.name)), measure(near, params)
        assert {k: torch.as_tensor(v).tolist() for k, v in there.items()} == {
            k: torch.as_tensor(v).tolist() for k, v in here.items()
        }
