"""Min-max and min-sum: as far as hiding allows, and no further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.attack._hidden import DIRECTIONS, Hidden
from shoal.parts.attack.min_max import MinMax
from shoal.parts.attack.min_sum import MinSum
from shoal.rounds.attack import View
from shoal.tensor import keyed
from shoal.testing.attack import check_attack

KEY = keyed.key_of(3)


@pytest.mark.parametrize("kind", [MinMax, MinSum])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contract(kind: type[Hidden], direction) -> None:
    check_attack(kind(direction))


def shows(kind: type[Hidden], vector: torch.Tensor, honest: torch.Tensor) -> torch.Tensor:
    """How far a vector stands out, over what an honest one does: 1 at the edge of hiding."""
    mine, among = (vector - honest).square().sum(-1), torch.cdist(honest, honest).square()
    if kind is MinMax:
        return mine.max() / among.max()
    return mine.sum() / among.sum(-1).max()


@given(
    rows=st.integers(2, 9), dim=st.integers(1, 6), word=st.integers(0, 999),
    direction=st.sampled_from(DIRECTIONS), kind=st.sampled_from([MinMax, MinSum]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_goes_to_the_edge_of_hiding(rows: int, dim: int, word: int, direction, kind) -> None:
    keys = keyed.grid(keyed.grid(keyed.key_of(word), rows), dim)
    honest = keyed.normal(keys, dtype=torch.float64)
    sent = kind(direction)(View(honest, honest[:2], 0), KEY)
    assert torch.equal(sent[0], sent[1])
    mean = honest.mean(0)
    assert float(shows(kind, sent[0], honest)) == pytest.approx(1.0, rel=1e-6)
    # A longer way along the direction shows.
    assert shows(kind, mean + 1.01 * (sent[0] - mean), honest) > 1
    way = {
        "deviation": honest.std(0, correction=0), "mean": mean, "sign": mean.sign(),
    }[direction]  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(sent[0] - mean, -way, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-6)


def test_min_sum_hides_better_than_min_max() -> None:
    honest = keyed.normal(keyed.grid(keyed.grid(KEY, 9), 20), dtype=torch.float64)
    sent = [kind()(View(honest, honest[:1], 0), KEY)[0] for kind in (MinSum, MinMax)]
    near, far = (torch.linalg.vector_norm(each - honest.mean(0)) for each in sent)
    assert 0.5 * far < near < far


def test_rows_that_are_not_finite_do_not_count() -> None:
    honest = torch.tensor([[0.0], [2.0], [float("nan")], [float("inf")]])
    for kind in (MinMax, MinSum):
        assert kind()(View(honest, honest[:1], 0), KEY).tolist() == [[0.0]]
    nobody = torch.full_like(honest, torch.nan)
    assert MinSum()(View(nobody, honest[:1], 0), KEY).isfinite().all()


def test_equal_rows_leave_no_room() -> None:
    honest = torch.ones(4, 3)
    for kind in (MinMax, MinSum):
        torch.testing.assert_close(kind()(View(honest, honest[:1], 0), KEY), honest[:1])


def test_unknown_directions_are_refused() -> None:
    with pytest.raises(UsageError, match="min_max: direction='up'; need one of deviation"):
        MinMax("up")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="min_sum: direction='up'"):
        MinSum("up")  # type: ignore[arg-type]
