"""Gradients of many peers at once are those of torch.autograd, one peer after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.parts.models.cnn import CNN
from shoal.parts.models.mlp import MLP
from shoal.parts.models.transformer import Transformer
from shoal.parts.tasks.base import ModuleTask, task_of
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed

PEERS, BATCH, CLASSES = 3, 5, 4


class Own(nn.Module):
    """A module that nothing here knows: a branch, a shared layer and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.loop = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.leave = nn.Linear(8, CLASSES)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        h = h + torch.sin(self.loop(self.loop(h))) * self.scale + self.frozen(h)
        return self.leave(h)


@dataclass(frozen=True)
class Case:
    module: Any
    features: tuple[int, ...]
    whole: bool = False
    positions: int = 0


CASES = {
    "linear": Case(lambda: MLP(hidden=()).build((6,), CLASSES), (6,)),
    "mlp": Case(lambda: MLP(hidden=(7, 5)).build((2, 3), CLASSES), (2, 3)),
    "gelu mlp without bias": Case(
        lambda: MLP(hidden=(7,), activation="gelu", bias=False).build((6,), CLASSES), (6,)
    ),
    "cnn": Case(lambda: CNN(channels=(3, 4), hidden=6).build((2, 9, 8), CLASSES), (2, 9, 8)),
    "cnn with norms": Case(
        lambda: CNN(channels=(4,), hidden=6, group_norm=2).build((1, 8, 8), CLASSES), (1, 8, 8)
    ),
    "transformer": Case(
        lambda: Transformer(width=8, layers=2, heads=2).build((6,), CLASSES), (6,), True, 6
    ),
    "tied transformer": Case(
        lambda: Transformer(width=8, layers=1, heads=1, tied=True, positions="learned").build(
            (6,), CLASSES
        ),
        (6,), True, 6,
    ),
    "own module": Case(Own, (6,)),
}  # fmt: skip


def samples(case: Case, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if case.whole:
        x = torch.randint(CLASSES, (count, *case.features), generator=generator)
    else:
        x = torch.randn(count, *case.features, generator=generator, dtype=torch.float64)
    shape = (count, case.positions) if case.positions else (count,)
    return x, torch.randint(CLASSES, shape, generator=generator)


def build(case: Case, batching: str, loss: Any = "cross_entropy") -> ModuleTask:
    torch.manual_seed(0)
    table = samples(case, 24)
    split = Shard(torch.arange(24).view(PEERS, 8), torch.full((PEERS,), 8))
    return task_of(case.module().double(), loss, table, table, split, batching=batching)


def ragged(case: Case) -> Batch:
    """Batches of 5, 3 and 0 samples; what the mask hides is no number where it can be."""
    x, y = samples(case, PEERS * BATCH)
    x = x.view(PEERS, BATCH, *case.features).clone()
    mask = torch.arange(BATCH) < torch.tensor([BATCH, 3, 0]).unsqueeze(-1)
    if not case.whole:
        x[~mask] = float("nan")
    return Batch(x, y.view(PEERS, BATCH, *y.shape[1:]), mask)


def models(task: ModuleTask) -> Tensor:
    key = keyed.fold(keyed.key_of(3), torch.arange(PEERS))
    rough = keyed.normal(key.unsqueeze(-1), torch.arange(task.spec.dim), dtype=torch.float64)
    return 0.3 * rough


def by_hand(task: ModuleTask, params: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the mean over samples of one peer, through torch.autograd alone."""
    if not len(x):
        return torch.zeros((), dtype=params.dtype), torch.zeros_like(params)
    leaf = params.clone().requires_grad_()
    output = torch.func.functional_call(task.module, task.spec.views(leaf), (x,))
    loss = functional.cross_entropy(output.reshape(-1, CLASSES), y.reshape(-1))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def methods(name: str) -> list[str]:
    known = ["auto", "vmap", "peer"]
    if name.startswith(("linear", "mlp", "gelu", "cnn")):
        known.append("stacked")
    return known + (["channels_last"] if name.startswith("cnn") else [])


PAIRS = [(name, batching) for name in CASES for batching in methods(name)]


@pytest.mark.parametrize(("name", "batching"), PAIRS)
def test_losses_and_gradients_are_those_of_autograd(name: str, batching: str) -> None:
    case = CASES[name]
    task = build(case, batching)
    params, batch = models(task), ragged(case)
    losses, gradients = task.loss(params, batch), task.grad(params, batch)
    for peer in range(PEERS):
        here = batch.mask[peer]
        loss, gradient = by_hand(task, params[peer], batch.x[peer, here], batch.y[peer, here])
        torch.testing.assert_close(losses[peer], loss, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradients[peer], gradient, rtol=1e-8, atol=1e-10)
        # One peer alone, as on a real machine, sees the same.
        alone = Batch(batch.x[peer], batch.y[peer], batch.mask[peer])
        single = task.grad(params[peer], alone)
        assert single.shape == (task.spec.dim,)
        torch.testing.assert_close(single, gradients[peer], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "batching"), PAIRS)
def test_several_steps_are_steps_one_by_one(name: str, batching: str) -> None:
    """And the models that they begin with stay what they were."""
    case = CASES[name]
    task = build(case, batching)
    params, batch = models(task), ragged(case)
    here = batch.mask.any(-1, keepdim=True)
    assert not here.all()
    orders = [torch.arange(BATCH), torch.arange(BATCH).flip(0), torch.arange(BATCH).roll(2)]
    batches = Batch(*(torch.stack([t[:, o] for o in orders]) for t in vars(batch).values()))
    before = params.clone()
    for drift in (None, 0.1 * models(task).flip(0)):
        expected = params
        for some in map(Batch, batches.x, batches.y, batches.mask):
            way = task.grad(expected, some)
            # A row without samples takes no step, whatever it would be pulled to.
            way = way if drift is None else way + here * drift
            expected = expected - 0.2 * way
        found = task.walked(params, batches, 0.2, drift)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert torch.equal(params, before)
    alone = Batch(*(t[:, 0] for t in vars(batches).values()))
    single = task.walked(params[0], alone, 0.2)
    torch.testing.assert_close(single, task.walked(params, batches, 0.2)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "batching"), PAIRS)
def test_clipped_sums_are_those_of_a_loop_over_samples(name: str, batching: str) -> None:
    case = CASES[name]
    task = build(case, batching)
    params, batch = models(task), ragged(case)
    norms = []
    for clip in (0.05, 1e6, None):
        if clip is None:
            # Some above and some below.
            clip = sorted(norms)[len(norms) // 2]
        expected = torch.zeros_like(params)
        for peer in range(PEERS):
            for sample in range(BATCH):
                if batch.mask[peer, sample]:
                    part = slice(sample, sample + 1)
                    _, gradient = by_hand(
                        task, params[peer], batch.x[peer, part], batch.y[peer, part]
                    )
                    norms.append(float(gradient.norm()))
                    expected[peer] += gradient * min(1.0, clip / norms[-1])
        found = task.clipped_grad_sum(params, batch, clip)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e200])
@pytest.mark.parametrize(
    ("name", "batching"), [pair for pair in PAIRS if not CASES[pair[0]].whole]
)  # fmt: skip
def test_a_sample_without_a_finite_gradient_adds_nothing(
    name: str, batching: str, bad: float
) -> None:
    """Else one sample would show in a sum that noise is to hide it in; the others stay."""
    task = build(CASES[name], batching)
    params, batch = models(task), ragged(CASES[name])
    x, mask = batch.x.clone(), batch.mask.clone()
    x[0, 1, ..., 0] = x[1, :, ..., 0] = bad
    mask[0, 1] = mask[1, :] = False
    expected = task.clipped_grad_sum(params, Batch(x, batch.y, mask), 0.5)
    found = task.clipped_grad_sum(params, Batch(x, batch.y, batch.mask), 0.5)
    if bad == 1e200:
        # What saturates or normalises may keep a gradient finite, which is clipped.
        most = 0.5 * torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64) + 1e-9
        assert ((found - expected).norm(dim=-1) <= most).all()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert not found[1].any()


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_the_module_s_own(name: str) -> None:
    case = CASES[name]
    task = build(case, "auto")
    params = models(task)
    x, y = samples(case, 24)
    found = task.evaluate(params)
    for peer in range(PEERS):
        with torch.no_grad():
            output = torch.func.functional_call(task.module, task.spec.views(params[peer]), (x,))
        loss, _ = by_hand(task, params[peer], x, y)
        right = (output.argmax(-1) == y).double().mean()
        torch.testing.assert_close(found["loss"][peer], loss, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found["accuracy"][peer], right)


def huber(output: Tensor, y: Tensor) -> Tensor:
    return functional.huber_loss(output, functional.one_hot(y, CLASSES).to(output.dtype))


@pytest.mark.parametrize("batching", ["auto", "vmap", "peer"])
def test_a_loss_of_one_s_own_is_differentiated_too(batching: str) -> None:
    case = CASES["mlp"]
    task = build(case, batching, huber)
    params, batch = models(task), ragged(case)
    gradients = task.grad(params, batch)
    for peer in range(2):
        here = batch.mask[peer]
        leaf = params[peer].clone().requires_grad_()
        output = torch.func.functional_call(
            task.module, task.spec.views(leaf), (batch.x[peer, here],)
        )
        expected = torch.autograd.grad(huber(output, batch.y[peer, here]), leaf)[0]
        torch.testing.assert_close(gradients[peer], expected, rtol=1e-8, atol=1e-10)


def test_initial_parameters_depend_on_the_key_alone() -> None:
    task = build(CASES["cnn"], "auto")
    keys = keyed.fold(keyed.key_of(1), torch.tensor([0, 1, 0]))
    before = torch.get_rng_state()
    params = task.init(keys)
    assert torch.equal(before, torch.get_rng_state())
    assert params.shape == (3, task.spec.dim)
    assert torch.equal(params[0], params[2])
    assert not torch.equal(params[0], params[1])
    torch.manual_seed(99)
    assert torch.equal(task.init(keys[1]), params[1])
