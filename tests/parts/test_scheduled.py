"""Communication schedules: doubly stochastic matrices, exact means, who meets when, messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.lab.build import build
from shoal.lab.scenario import Scenario
from shoal.parts.exchange.scheduled import Scheduled
from shoal.rounds.exchange import Hop


def matrix(hop: Hop) -> torch.Tensor:
    assert hop.weights is not None
    assert hop.own is not None
    w = torch.diag(hop.own)
    row, column = (hop.sources >= 0).nonzero(as_tuple=True)
    w[row, hop.sources[row, column]] += hop.weights[row, column]
    return w


@given(
    st.integers(1, 17), st.floats(0, 1), st.integers(0, 40), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80)
def test_every_matrix_is_doubly_stochastic_and_keeps_the_mean(
    peers: int, share: float, round: int, seed: int
) -> None:
    exchange = Scheduled(peers, 41, rate=share * (peers - 1))
    (hop,) = exchange.hops(round, seed)
    w = matrix(hop)
    ones = torch.ones(peers, dtype=torch.float64)
    torch.testing.assert_close(w.sum(0), ones)
    torch.testing.assert_close(w.sum(1), ones)
    torch.testing.assert_close(w, w.T)
    assert (w >= 0).all()
    x = torch.randn(peers, 3, generator=torch.Generator().manual_seed(seed)).double()
    assert ((w @ x).mean(0) - x.mean(0)).abs().max() <= 1e-6
    for heard in hop.sources.tolist():
        others = [source for source in heard if source >= 0]
        assert len(set(others)) == len(others)
    # A pair sends both ways.
    assert torch.equal(w > 0, w.T > 0)


@given(st.integers(2, 20), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=40)
def test_everybody_means_exactly_the_mean(peers: int, round: int, seed: int) -> None:
    (hop,) = Scheduled(peers, 10, rate=peers - 1).hops(round, seed)
    w = matrix(hop)
    torch.testing.assert_close(w, torch.full_like(w, 1 / peers), rtol=0, atol=1e-15)
    x = torch.randn(peers, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    after = w @ x
    assert (after - after.mean(0)).square().sum() < 1e-28 * peers * x.square().sum()


@pytest.mark.parametrize("peers", [8, 9])
def test_whole_rates_are_regular(peers: int) -> None:
    for rate in range(1, peers - 1):
        (hop,) = Scheduled(peers, 5, rate=rate).hops(2, seed=3)
        counts = (hop.sources >= 0).sum(-1)
        assert (counts <= rate).all()
        # With an odd number one peer stays alone in each matching.
        assert int(counts.sum()) == rate * (peers - peers % 2)


def test_sparse_rates_are_means_over_many_rounds() -> None:
    for rate, wanted in ((0.2, 0.2 * 16 - 0.5), (0.95, 0.95 * 16 - 0.5), (2.3, 2.3 * 16)):
        exchange = Scheduled(16, 200, rate=rate)
        assert exchange.messages(seed=1) / 200 == pytest.approx(wanted, rel=0.08)


def test_all_pairs_meet_about_as_often() -> None:
    met = torch.zeros(6, 6)
    for round in range(1000):
        (hop,) = Scheduled(6, 1000, rate=1).hops(round, seed=2)
        met[torch.arange(6), hop.sources[:, 0]] += 1
    pairs = met[~torch.eye(6, dtype=torch.bool)]
    # Each peer meets each of five others in 200 of 1,000 rounds; 12.7 is the standard deviation.
    assert (pairs - 200).abs().max() < 5 * 12.7


def test_shapes_of_the_schedules() -> None:
    merge = Scheduled.sparse_then_merge(16, 100).rates()
    assert merge == (0.2,) * 99 + (15.0,)
    assert Scheduled.sparse_then_merge(16, 100, merge_at=0.9).rates() == (0.2,) * 90 + (15.0,) * 10
    for start, first in ((0.0, 0), (0.5, 50), (0.95, 95), (1.0, 95)):
        rates = Scheduled.window(16, 100, start).rates()
        assert [r for r, rate in enumerate(rates) if rate == 15.0] == [*range(first, first + 5)]
    ramp = Scheduled(16, 11, 0.0, "linear", dense=10.0).rates()
    assert ramp == pytest.approx(tuple(range(11)))
    wave = Scheduled(16, 11, 0.0, "cosine", dense=10.0).rates()
    assert (wave[0], wave[5], wave[10]) == pytest.approx((0.0, 5.0, 10.0))
    assert wave[1] < ramp[1]


def test_schedules_share_the_rounds_in_which_they_agree() -> None:
    late, early = (Scheduled.window(8, 40, start) for start in (0.95, 0.0))
    for round in range(2, 38):
        assert late.hops(round, 7)[0] is early.hops(round, 7)[0]
    assert late.messages(7) != Scheduled(8, 40).messages(7)


def test_the_lab_tells_it_how_long_the_run_is() -> None:
    world = Scenario(peers=4, rounds=9, exchange={"name": "scheduled", "schedule": "merge"})
    assert build(world).exchange == Scheduled.sparse_then_merge(4, 9)
    endless = Scenario(peers=4, seconds=5.0, exchange="scheduled")
    with pytest.raises(UsageError, match="rounds"):
        build(endless)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rate": -0.1}, "rate=-0.1"),
        ({"rate": 4.0}, "rate=4.0 of 4 peers"),
        ({"dense": 9.0}, "dense=9.0"),
        ({"width": 0.0}, "width=0.0"),
        ({"width": 1.5}, "width=1.5"),
        ({"at": -1.0}, "at=-1.0"),
        ({"schedule": "late"}, "schedule='late'"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_schedules_that_cannot_be(settings: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Scheduled(**{"peers": 4, "rounds": 8, **settings})
