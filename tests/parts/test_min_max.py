"""Min-max: as far as hiding allows, and no further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.attack.min_max import DIRECTIONS, MinMax
from shoal.rounds.attack import View
from shoal.tensor import keyed
from shoal.testing.attack import check_attack

KEY = keyed.key_of(3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contract(direction) -> None:
    check_attack(MinMax(direction))


@given(
    rows=st.integers(2, 9), dim=st.integers(1, 6), word=st.integers(0, 999),
    direction=st.sampled_from(DIRECTIONS),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_touches_the_widest_honest_distance(rows: int, dim: int, word: int, direction) -> None:
    keys = keyed.grid(keyed.grid(keyed.key_of(word), rows), dim)
    honest = keyed.normal(keys, dtype=torch.float64)
    sent = MinMax(direction)(View(honest, honest[:2], 0), KEY)
    assert torch.equal(sent[0], sent[1])
    widest = torch.cdist(honest, honest).max()
    mean = honest.mean(0)
    furthest = torch.linalg.vector_norm(sent[0] - honest, dim=-1).max()
    torch.testing.assert_close(furthest, widest, rtol=1e-6, atol=1e-9)
    # A longer way along the direction shows.
    beyond = mean + 1.01 * (sent[0] - mean)
    assert torch.linalg.vector_norm(beyond - honest, dim=-1).max() > widest
    way = {
        "deviation": honest.std(0, correction=0), "mean": mean, "sign": mean.sign(),
    }[direction]  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(sent[0] - mean, -way, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-6)


def test_rows_that_are_not_finite_do_not_count() -> None:
    honest = torch.tensor([[0.0], [2.0], [float("nan")], [float("inf")]])
    assert MinMax()(View(honest, honest[:1], 0), KEY).tolist() == [[0.0]]


def test_equal_rows_leave_no_room() -> None:
    honest = torch.ones(4, 3)
    torch.testing.assert_close(MinMax()(View(honest, honest[:1], 0), KEY), honest[:1])


def test_unknown_directions_are_refused() -> None:
    with pytest.raises(UsageError, match="min_max: direction='up'; need one of deviation"):
        MinMax("up")  # type: ignore[arg-type]
