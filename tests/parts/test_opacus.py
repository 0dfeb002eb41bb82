"""Private steps beside Opacus: gradients of single records, clipping, sums, noise, draws, epsilon.

Yousefpour et al. 2021 (arXiv 2109.12298). Both see the same records of the same model.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from shoal.parts.models.cnn import CNN
from shoal.parts.models.mlp import MLP
from shoal.parts.models.transformer import Transformer
from shoal.parts.privacy.ledger import Ledger
from shoal.parts.privacy.poisson_sampling import drawn
from shoal.parts.privacy.sampled_gaussian import GaussianRelease, sampled_gaussian_renyi
from shoal.parts.strategy.private_steps import PrivateSteps
from shoal.parts.tasks.base import ModuleTask, task_of
from shoal.rounds.strategy import Step
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed

if os.environ.get("SHOAL_CI"):
    # There a comparison that nobody runs would look like one that holds.
    importlib.import_module("opacus")
pytest.importorskip("opacus", reason="opacus is not installed (`make setup` installs it)")

from opacus import GradSampleModule
from opacus.accountants.analysis import rdp as their_rdp
from opacus.accountants.rdp import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

# torch's own words to whoever hooks a module's backward pass, as Opacus does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning", "ignore:.*PrivacyEngine:UserWarning"
)

RECORDS, CLASSES = 24, 5
MODELS = {
    "mlp": (lambda: MLP(hidden=(9, 7)).build((6,), CLASSES), (6,)),
    "cnn": (lambda: CNN(channels=(4, 6), hidden=8, group_norm=2).build((1, 12, 12), CLASSES),
            (1, 12, 12)),
    "transformer": (lambda: Transformer(width=8, layers=2, heads=2).build((6,), CLASSES), None),
}  # fmt: skip


def world(name: str, batching: str = "auto") -> ModuleTask:
    """A task in double precision whose one peer has all the records."""
    make, features = MODELS[name]
    generator = torch.Generator().manual_seed(2)
    if features is None:
        x = torch.randint(CLASSES, (RECORDS, 6), generator=generator)
        y = torch.randint(CLASSES, (RECORDS, 6), generator=generator)
    else:
        x = torch.randn(RECORDS, *features, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (RECORDS,), generator=generator)
    split = Shard(torch.arange(RECORDS).unsqueeze(0), torch.tensor([RECORDS]))
    table = (x, y)
    return task_of(make().double(), "cross_entropy", table, table, split, batching=batching)


def module_of(task: ModuleTask, params: Tensor) -> nn.Module:
    """The module with these parameters, for Opacus."""
    module = copy.deepcopy(task.module)
    with torch.no_grad():
        for name, value in task.spec.views(params).items():
            module.get_parameter(name).copy_(value)
    return module


def flat(module: nn.Module, attribute: str) -> Tensor:
    """What Opacus left at each parameter, in the order of flat vectors."""
    found = [getattr(p, attribute) for p in module.parameters()]
    lead = found[0].dim() - next(module.parameters()).dim()
    return torch.cat([each.flatten(lead) for each in found], -1)


def backward(module: Any, x: Tensor, y: Tensor) -> None:
    output = module(x)
    functional.cross_entropy(output.reshape(-1, CLASSES), y.reshape(-1)).backward()


def start(task: ModuleTask) -> Tensor:
    return 3.0 * task.init(keyed.key_of(1)).double()


CASES = [
    ("mlp", "stacked"), ("mlp", "vmap"), ("cnn", "stacked"), ("cnn", "channels_last"),
    ("transformer", "auto"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "batching"), CASES)
def test_gradients_of_single_records_are_the_same(name: str, batching: str) -> None:
    task = world(name, batching)
    params = start(task)
    theirs = GradSampleModule(module_of(task, params))
    backward(theirs, task.x, task.y)
    rows = Batch(task.x.unsqueeze(1), task.y.unsqueeze(1), torch.ones(RECORDS, 1, dtype=torch.bool))
    ours = task.clipped_grad_sum(params.expand(RECORDS, -1), rows, 1e12)
    expected = flat(theirs, "grad_sample")
    assert ours.shape == expected.shape == (RECORDS, task.spec.dim)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "batching"), CASES)
def test_a_step_without_noise_ends_at_the_same_model(name: str, batching: str) -> None:
    """Clipped one by one, summed, over the expected number of records, not the drawn one."""
    task, p, lr = world(name, batching), 0.4, 0.3
    params, shard = start(task), task.shard(torch.arange(1))
    key = keyed.fold(keyed.key_of(5), torch.arange(1))
    sample = drawn(shard, keyed.fold(key, 0), p)
    here = sample.index[0, : int(sample.size[0])]
    assert 0 < len(here) != p * RECORDS
    for share in (0.0, 0.5, 1.0):
        module = module_of(task, params)
        theirs = GradSampleModule(module)
        backward(theirs, task.x[here], task.y[here])
        norms = flat(theirs, "grad_sample").norm(dim=-1).sort().values
        # All clipped, half of them, none.
        clip = float(norms[min(len(here) - 1, int(share * len(here)))]) * (0.5 if not share else 1)
        optimiser = DPOptimizer(
            torch.optim.SGD(theirs.parameters(), lr=lr), noise_multiplier=0.0, max_grad_norm=clip,
            expected_batch_size=p * RECORDS,  # type: ignore[arg-type]
        )  # fmt: skip
        optimiser.step()
        strategy = PrivateSteps(lr=lr, sampling=p, clip=clip, noise=0.0)
        step = Step(0, task, shard, key, torch.ones(1, dtype=torch.bool))
        _, parcel = strategy.local(strategy.init(params.unsqueeze(0)), step)
        expected = torch.cat([each.detach().flatten() for each in module.parameters()])
        moved = expected - params
        # Opacus divides by the norm + 1e-6.
        apart = (parcel.vector[0] - expected).norm() / moved.norm()
        assert float(apart) < 3e-6 / min(1.0, clip)
        assert float(moved.norm()) > 0


def test_noise_has_the_same_scale_and_law() -> None:
    task = world("mlp")
    params, clip, noise, p = start(task), 0.7, 1.3, 0.5
    shard, theirs, ours = task.shard(torch.arange(1)), [], []
    for round in range(40):
        module = GradSampleModule(module_of(task, params))
        optimiser = DPOptimizer(
            torch.optim.SGD(module.parameters(), lr=1.0), noise_multiplier=noise,
            max_grad_norm=clip, expected_batch_size=12,
            generator=torch.Generator().manual_seed(round),
        )  # fmt: skip
        backward(module, task.x, task.y)
        optimiser.pre_step()
        theirs.append(12 * flat(module, "grad") - flat(module, "summed_grad"))
        step = Step(
            round, task, shard, keyed.fold(keyed.key_of(3), torch.arange(1), round),
            torch.ones(1, dtype=torch.bool),
        )  # fmt: skip
        quiet, noisy = (
            PrivateSteps(lr=1.0, sampling=p, clip=clip, noise=each) for each in (0.0, noise)
        )
        state = quiet.init(params.unsqueeze(0))
        ours.append(
            (quiet.local(state, step)[1].vector - noisy.local(state, step)[1].vector)[0] * 12
        )
    a, b = torch.cat(theirs).numpy(), torch.cat(ours).numpy()
    assert len(a) == len(b) == 40 * task.spec.dim
    for each in (a, b):
        assert each.std() == pytest.approx(noise * clip, rel=0.03)
        assert abs(each.mean()) < 5 * noise * clip / math.sqrt(len(each))
    assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_batches_are_as_large_by_chance_and_an_empty_one_is_noise_alone() -> None:
    task, p, rounds = world("mlp"), 0.1, 4000
    keys = keyed.grid(keyed.key_of(8), rounds)
    whole = Shard(task.shares.index[0].expand(rounds, -1), torch.full((rounds,), RECORDS))
    ours = drawn(whole, keys, p).size.numpy()
    sampler = UniformWithReplacementSampler(
        num_samples=RECORDS, sample_rate=p, steps=rounds, generator=torch.Generator().manual_seed(1)
    )
    theirs = np.array([len(batch) for batch in sampler])
    expected = stats.binom.pmf(np.arange(9), RECORDS, p) * rounds
    for sizes in (ours, theirs):
        seen = np.bincount(np.minimum(sizes, 8), minlength=9)
        expected[8] = rounds - expected[:8].sum()
        assert stats.chisquare(seen, expected).pvalue > 1e-3
    params, shard = start(task), task.shard(torch.arange(1))
    strategy = PrivateSteps(lr=1.0, sampling=p, noise=2.0, clip=0.5)
    # A step folds its number into the key; find a round whose first step draws nothing.
    for round in range(1000):
        key = keyed.fold(keyed.key_of(3), torch.arange(1), round)
        if not int(drawn(shard, keyed.fold(key, 0), p).size):
            break
    step = Step(0, task, shard, key, torch.ones(1, dtype=torch.bool))
    _, parcel = strategy.local(strategy.init(params.unsqueeze(0)), step)
    ours_moved = (params - parcel.vector[0]) * p * RECORDS
    assert float(ours_moved.std()) == pytest.approx(1.0, rel=0.15)
    module = GradSampleModule(module_of(task, params))
    optimiser = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0), noise_multiplier=2.0, max_grad_norm=0.5,
        expected_batch_size=1, generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    backward(module, task.x[:0], task.y[:0])
    optimiser.pre_step()
    assert float(flat(module, "grad").std()) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.01, 1.1, 1000, 1e-5), (0.004, 0.8, 5000, 1e-6), (0.05, 2.0, 200, 1e-5),
        (0.1, 4.0, 3000, 1e-3), (0.5, 10.0, 100, 1e-7), (1.0, 5.0, 20, 1e-5),
        (0.02, 0.5, 300, 1e-5), (0.05, 0.4, 200, 1e-5), (0.001, 0.6, 20000, 1e-8),
    ],
)  # fmt: skip
def test_epsilon_is_that_of_its_accountant(
    q: float, sigma: float, steps: int, delta: float
) -> None:
    accountant = RDPAccountant()
    accountant.history = [(sigma, q, steps)]
    orders = [float(order) for order in RDPAccountant.DEFAULT_ALPHAS]
    with np.errstate(all="ignore"):
        reference = accountant.get_epsilon(delta)
        curve = their_rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
    for order, theirs in zip(orders, curve, strict=True):
        assert sampled_gaussian_renyi(sigma, q, steps, order) == pytest.approx(theirs, rel=1e-6)
    ledger = Ledger().after(GaussianRelease(sigma, q), steps)
    assert ledger.epsilon(delta, orders) == pytest.approx(reference, rel=1e-6)
    # And nobody pays for asking here: no order of theirs that counts is left out.
    assert ledger.epsilon(delta) <= reference * (1 + 1e-6)
