"""Generated fault lists: coverage of kinds, determinism, hangs, exceptions, shrinking, replay."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import PeerError, UsageError
from shoal.kernel.peer import Cost, Peer
from shoal.lab.explore import Plan, Trial, Tried, attempt, explore, generate, replay
from shoal.wire.message import message
from shoal.world.faults import KINDS, Round, check, from_data, to_data
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run


@message(tag=("round",))
class Beat:
    round: int


@dataclass(frozen=True)
class Beats:
    """Rounds of one second; `bug` says what goes wrong once somebody was not heard."""

    bug: str = ""
    rounds: int = 6

    async def run(self, peer: Peer) -> None:
        others = [p for p in peer.roster if p != peer.id]
        first = max(0, int(peer.now()) + 1 if peer.now() > 0 else 0)
        for round in range(first, self.rounds):
            peer.enter_round(round)
            for turn, other in enumerate(others):
                # Spread over the round and after some work, so that most faults meet something.
                await peer.sleep_until(round + 0.15 * turn)
                await peer.compute(abs, round, cost=Cost(seconds=0.01))
                await peer.send(other, Beat(round))
            heard = await peer.gather(Beat, tag=(round,), expect=others, deadline=round + 0.8)
            peer.record("heard", len(heard))
            if len(heard) < len(others):
                await self.fail(peer)
            await peer.sleep_until(round + 1.0)

    async def fail(self, peer: Peer) -> None:
        if self.bug == "exception":
            raise KeyError("nobody")
        if self.bug == "tree":
            raise PeerError("gone")
        if self.bug == "spin":
            while True:
                await peer.sleep_until(peer.now())
        if self.bug == "forever":
            await peer.recv(Beat, tag=(-1,), deadline=float("inf"))
        if self.bug == "slow":
            await peer.sleep_until(1e6)


NETWORK = Network(5, links=Links(latency_s=0.02))


def test_kinds_are_dealt_evenly_over_300_seeds() -> None:
    count: Counter[str] = Counter()
    tied = 0
    for seed in range(300):
        faults = generate(seed, 12, window_s=20.0, rounds=10)
        assert 1 <= len(faults) <= 6
        count.update(fault.kind for fault in faults)
        tied += sum(isinstance(fault.at, Round) for fault in faults)
        assert check(faults, 12) == faults
    assert set(count) == set(KINDS)
    assert min(count.values()) >= 100
    assert 200 < tied < 500


@given(seed=st.integers(0, 10_000), peers=st.integers(1, 40), rounds=st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_lists_are_valid_and_survive_json(seed: int, peers: int, rounds: int) -> None:
    faults = generate(seed, peers, window_s=3.0, rounds=rounds)
    again = tuple(from_data(json.loads(json.dumps(to_data(fault)))) for fault in faults)
    assert again == faults == generate(seed, peers, window_s=3.0, rounds=rounds)
    for fault in faults:
        assert fault.who
        assert isinstance(fault.at, Round) or 0 <= fault.at <= 3.0


def test_sound_program_passes_and_traces_differ() -> None:
    calls = []
    found = explore(
        Beats, NETWORK, seeds=60, horizon_s=20.0, progress=lambda done, bad: calls.append(done)
    )
    assert found.failures == ()
    assert found.seeds == 60
    assert calls == list(range(1, 61))
    assert found.traces >= 55
    assert found.settings["rounds"] == 6
    assert json.loads(found.to_json())["kinds"] == dict(found.kinds)


@pytest.mark.parametrize(
    ("bug", "kind", "where"),
    [
        ("exception", "exception", "KeyError"),
        ("spin", "hang", "LimitReached"),
        ("forever", "hang", "Stalled"),
        ("slow", "hang", "horizon"),
    ],
)
def test_what_counts_as_failure(bug: str, kind: str, where: str) -> None:
    found = explore(
        lambda: Beats(bug), NETWORK, seeds=20, horizon_s=20.0, most_failures=1, shrink_runs=40
    )
    (failure,) = found.failures
    assert (failure.problem.kind, failure.problem.where) == (kind, where)
    assert len(failure.minimal) == 1
    assert len(failure.minimal[0].who) == 1
    problem = replay(lambda: Beats(bug), NETWORK, failure.to_data(), horizon_s=20.0)
    assert problem is not None
    assert problem.kind == kind


def test_errors_of_the_tree_end_a_run_without_failing_it() -> None:
    found = explore(lambda: Beats("tree"), NETWORK, seeds=20, horizon_s=20.0)
    assert found.failures == ()
    assert found.ended["PeerError"] > 5


def test_invariant_that_needs_two_faults_keeps_both() -> None:
    def not_both(run: Run) -> str | None:
        kinds = {happening.what for happening in run.happenings}
        return "both" if {"slow", "skew"} <= kinds else None

    found = explore(
        Beats, NETWORK, seeds=60, horizon_s=20.0, invariants=[not_both], most_failures=3
    )
    assert len(found.failures) == 3
    for failure in found.failures:
        assert sorted(fault.kind for fault in failure.minimal) == ["skew", "slow"]


def test_failure_without_faults_is_reported_at_once() -> None:
    def never(run: Run) -> str | None:
        raise AssertionError("no run is good enough")

    found = explore(Beats, NETWORK, seeds=60, horizon_s=20.0, invariants=[never])
    (failure,) = found.failures
    assert failure.minimal == ()
    assert found.seeds == 0
    assert "good enough" in failure.problem.text


def test_a_search_that_is_spread_ends_at_the_same_seed() -> None:
    closed = []

    def spread(plan: Plan, seeds: Sequence[int]) -> Generator[Tried]:
        trial = Trial(lambda: Beats("exception"), NETWORK, 20.0)
        try:
            # All of them are there before the first one is asked for, as from other processes.
            yield from [attempt(trial, plan, seed) for seed in seeds]
        finally:
            closed.append(True)

    limits = {"seeds": 8, "horizon_s": 20.0, "most_failures": 2, "shrink_runs": 0}
    here = explore(lambda: Beats("exception"), NETWORK, **limits)
    there = explore(lambda: Beats("exception"), NETWORK, **limits, spread=spread)
    assert here == there
    assert len(here.failures) == 2
    assert here.seeds < 8
    assert closed == [True]


def test_misuse() -> None:
    with pytest.raises(UsageError, match="kinds"):
        explore(Beats, NETWORK, seeds=5, horizon_s=1.0, kinds=("fire",))
    with pytest.raises(UsageError, match="seeds=0"):
        explore(Beats, NETWORK, seeds=0, horizon_s=1.0)
