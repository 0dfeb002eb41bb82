"""MOZI's two filters against plain Python, and on every engine."""

from __future__ import annotations

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts.strategy.mozi import Mozi
from shoal.parts.tasks.digits import Digits
from shoal.rounds.strategy import Step
from shoal.rounds.task import Batch
from shoal.tensor import keyed

TASK = Digits(peers=3, hidden=(6,))
KEYS = keyed.grid(keyed.key_of(5), 3)


def step() -> Step:
    shard = TASK.shard(torch.arange(3))
    return Step(1, TASK, shard, KEYS, torch.ones(3, dtype=torch.bool))


def models(n: int) -> torch.Tensor:
    """[3, n, dim]: the own one, others near it and farther away."""
    own = TASK.init(KEYS).unsqueeze(1)
    noise = keyed.normal(keyed.grid(keyed.grid(keyed.grid(keyed.key_of(9), 3), n), TASK.spec.dim))
    return own + torch.linspace(0, 0.4, n).view(n, 1) * noise


def by_hand(rows: torch.Tensor, mask: torch.Tensor, peer: int, rho: float, own: float):
    batch = TASK.batch(TASK.shard(peer), keyed.fold(KEYS[peer], "judge"), 32)

    def loss(model: torch.Tensor) -> float:
        return float(TASK.loss(model, Batch(batch.x, batch.y, batch.mask)))

    others = [row for row, here in zip(rows[1:], mask[1:], strict=True)
              if here and row.isfinite().all()]  # fmt: skip
    if not others:
        return rows[0]
    others.sort(key=lambda row: float((row - rows[0]).double().norm()))
    near = others[: -int(-rho * len(others) // 1)]
    good = [row for row in near if loss(row) <= loss(rows[0])]
    mean = torch.stack(good or near[:1]).mean(0)
    return own * rows[0] + (1 - own) * mean


@pytest.mark.parametrize("rho", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("own", [0.0, 0.5])
def test_filters_are_those_of_plain_python(rho: float, own: float) -> None:
    rows = models(9)
    rows[1, 4] = float("nan")
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 2] = mask[2, 1:] = False
    mozi = Mozi(rho=rho, own_weight=own)
    heard = mozi.combine(TASK.init(KEYS), rows, mask, mask.double(), {}, step())
    assert heard.count.tolist() == [8, 9, 1]
    for peer in range(3):
        expected = by_hand(rows[peer], mask[peer], peer, rho, own)
        torch.testing.assert_close(heard.vector[peer], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(heard.vector[2], rows[2, 0])


def test_when_all_are_worse_the_nearest_stands_in() -> None:
    rows = models(4)
    # Trained until the batch is learned, so that every other model is worse on it.
    batch = TASK.batch(step().shard, keyed.fold(KEYS, "judge"), 32)
    for _ in range(200):
        rows[:, 0] = TASK.descended(rows[:, 0], batch, 0.5)
    mask = torch.ones(3, 4, dtype=torch.bool)
    heard = Mozi(rho=1.0, own_weight=0.0).combine(rows[:, 0], rows, mask, mask.double(), {}, step())
    for peer in range(3):
        apart = (rows[peer, 1:] - rows[peer, 0]).norm(dim=-1)
        assert torch.equal(heard.vector[peer], rows[peer, 1 + int(apart.argmin())])


def test_settings_that_cannot_be() -> None:
    for bad in ({"rho": 0.0}, {"rho": 1.1}, {"own_weight": 1.0}, {"steps": 0}):
        with pytest.raises(UsageError, match="need a share above 0"):
            Mozi(**bad)
    assert [Mozi(rho=0.55).kept(n) for n in (19, 20, 1, 0)] == [11, 11, 1, 0]
