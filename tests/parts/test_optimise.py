"""Optimisers are those of torch.optim, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.optimise.base import Decay
from shoal.parts.optimise.sgd import SGD

STEPS = 7


def gradients(rows: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, rows, dim, generator=generator, dtype=torch.float64)


def ours(rule: Any, start: torch.Tensor, donate: bool = False) -> torch.Tensor:
    params = start.clone()
    state = rule.init(params)
    for grad in gradients(*start.shape):
        params, state = rule.step(params, grad.clone(), state, donate=donate)
    return params


def theirs(make: Any, start: torch.Tensor) -> torch.Tensor:
    """One optimiser for each row, as each peer would have it."""
    rows = []
    for row, params in enumerate(start):
        leaf = params.clone().requires_grad_()
        optimiser = make([leaf])
        for grad in gradients(*start.shape):
            leaf.grad = grad[row].clone()
            optimiser.step()
        rows.append(leaf.detach())
    return torch.stack(rows)


SGDS = (
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
)
ADAMS = (
    {},
    {"weight_decay": 0.0, "beta1": 0.8, "beta2": 0.9},
    {"weight_decay": 0.3, "eps": 1e-3},
)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("settings", SGDS, ids=str)
def test_sgd_is_torch_s(settings: dict[str, Any], donate: bool) -> None:
    start = torch.linspace(-1.0, 1.0, 15, dtype=torch.float64).reshape(3, 5)
    expected = theirs(lambda leaves: torch.optim.SGD(leaves, lr=0.05, **settings), start)
    torch.testing.assert_close(ours(SGD(lr=0.05, **settings), start, donate), expected)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("settings", ADAMS, ids=str)
def test_adamw_is_torch_s(settings: dict[str, Any], donate: bool) -> None:
    start = torch.linspace(-1.0, 1.0, 15, dtype=torch.float64).reshape(3, 5)
    named = dict(settings)
    betas = (named.pop("beta1", 0.9), named.pop("beta2", 0.999))
    expected = theirs(
        lambda leaves: torch.optim.AdamW(leaves, lr=0.05, betas=betas, **named), start
    )
    found = ours(AdamW(lr=0.05, **settings), start, donate)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.5), AdamW(lr=0.1)], ids=["sgd", "adamw"])
def test_without_donation_arguments_stay_as_they_are(rule: Any) -> None:
    params, grad = torch.ones(2, 3), torch.full((2, 3), 0.5)
    _, state = rule.step(params, grad, rule.init(params))
    kept = [t.clone() for t in vars(state).values() if t is not None]
    rule.step(params, grad, state)
    assert torch.equal(params, torch.ones(2, 3))
    assert torch.equal(grad, torch.full((2, 3), 0.5))
    after = [t for t in vars(state).values() if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


@pytest.mark.parametrize("rule", [SGD(lr=0.1), AdamW(lr=0.1)], ids=["sgd", "adamw"])
def test_a_scale_multiplies_each_row_s_rate(rule: Any) -> None:
    params, grad = torch.ones(2, 3), torch.full((2, 3), 0.5)
    moved, _ = rule.step(params, grad, rule.init(params), torch.tensor([0.0, 0.5]))
    assert torch.equal(moved[0], params[0])
    half, _ = rule.step(params, grad, rule.init(params), 0.5)
    torch.testing.assert_close(moved[1], half[1])
    assert not torch.equal(moved[1], params[1])


SCHEDULES = {
    ("constant",): [1.0, 1.0, 1.0],
    ("inverse", 10): [1.0, 0.5, 1 / 3],
    ("inverse_sqrt", 10): [1.0, 0.5**0.5, 3**-0.5],
    ("exponential", 10, 0.5): [1.0, 0.5, 0.25],
    ("linear", 20, 0.2): [1.0, 0.6, 0.2],
    ("cosine", 20, 0.2): [1.0, 0.6, 0.2],
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rates_over_time(schedule: tuple[Any, ...]) -> None:
    count = torch.tensor([0.0, 10.0, 20.0], dtype=torch.float64)
    found = Decay.of(schedule).factor(count)
    assert found.tolist() == pytest.approx(SCHEDULES[schedule])


def test_a_warm_up_rises_and_counts_extra() -> None:
    decay = Decay("linear", steps=10, rate=0.0, warmup=4)
    count = torch.tensor([0.0, 1.0, 3.0, 4.0, 9.0, 14.0, 99.0], dtype=torch.float64)
    expected = [0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert decay.factor(count).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_schedule_acts_on_the_steps_of_the_rule(kind: Any) -> None:
    """Two steps at half the steps' decay are a step at the full rate and one at half of it."""
    start = torch.zeros(1, 2, dtype=torch.float64)
    grad = torch.ones(1, 2, dtype=torch.float64)
    decayed, plain = kind(lr=0.1, decay=("linear", 2, 0.0)), kind(lr=0.1)
    one, state = decayed.step(start, grad, decayed.init(start))
    two, _ = decayed.step(one, grad, state)
    first, state = plain.step(start, grad, plain.init(start))
    second, _ = plain.step(first, grad, state, 0.5)
    torch.testing.assert_close(one, first)
    torch.testing.assert_close(two, second)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGD(lr=-1.0), "lr=-1.0; need a finite number"),
        (lambda: SGD(momentum=1.0), "0 <= momentum < 1"),
        (lambda: SGD(nesterov=True), "nesterov needs momentum"),
        (lambda: AdamW(beta1=1.0), r"must lie in \[0, 1\)"),
        (lambda: AdamW(eps=float("nan")), "eps=nan"),
        (lambda: SGD(decay=("step",)), "kind='step'"),
        (lambda: SGD(decay=(3,)), "kind comes first"),
        (lambda: Decay("linear", steps=0), "steps >= 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()
