"""Delays: traces by formula, profiles from files, and the choice of a scheme on them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from shoal.base.errors import UsageError
from shoal.parts.coding.delay_profile import DelayProfile
from shoal.parts.coding.scheme_choice import candidates, choose_scheme, replay
from shoal.parts.coding.sequential_scheme import SequentialScheme
from shoal.parts.coding.straggler_trace import StragglerTrace, stationary_of


@pytest.mark.parametrize("burst", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("kind", ["gilbert-elliott", "measured"])
def test_bursts_have_the_share_and_length_that_was_asked_for(kind: str, burst: float) -> None:
    trace = StragglerTrace(kind, stationary=0.05, mean_burst=burst)  # type: ignore[arg-type]
    slowness = trace.slowness(400, 3000, seed=3)
    share, length = stationary_of(slowness)
    assert abs(share - 0.05) < 0.002
    assert abs(length - burst) < 0.03 * burst
    # The first round is like any other.
    many = trace.slowness(20_000, 3, seed=4)
    assert np.allclose((many > 1).mean(0), 0.05, atol=0.006)


def test_measured_bursts_have_a_tail_and_vary() -> None:
    slowness = StragglerTrace("measured", mean_burst=1.5, slow=3.0).slowness(100, 3000, seed=1)
    slow = slowness[slowness > 1]
    assert slow.min() >= 3.0
    assert np.quantile(slow, 0.99) > 9.0
    assert np.median(slow) < 5.0
    words = "|".join("".join("x" if late else " " for late in row) for row in slowness > 1)
    runs = [len(run) for run in words.replace("|", " ").split()]
    assert max(runs) >= 15
    assert np.median(runs) == 1


def test_the_adversary_stays_in_the_model_and_uses_all_of_it() -> None:
    trace = StragglerTrace("adversarial", mean_burst=2, most=3, window=4, slow=5.0, noise_s=0.0)
    slow = trace.slowness(7, 60) > 1
    seconds = trace.seconds(0.1, 7, 60)
    assert (slow.sum(0) == 3).sum() == 2 * 12
    for scheme in (
        SequentialScheme.m_sgc(7, 2, 4, 3, jobs=50), SequentialScheme.m_sgc(7, 2, 4, 2, jobs=50)
    ):  # fmt: skip
        waited = replay(scheme, seconds).waited
        assert any(waited) == (scheme.rule.load == SequentialScheme.m_sgc(7, 2, 4, 2, jobs=1).load)


def test_times_are_formula_times_slowness_and_keyed() -> None:
    trace = StragglerTrace(base_s=2.0, slope_s=4.0, noise_s=0.3)
    seconds = trace.seconds(0.25, 30, 400, seed=9)
    plain = seconds / trace.slowness(30, 400, seed=9)
    assert plain.min() > 3.0
    assert abs(plain.mean() - 3.3) < 0.01
    assert abs(plain.std() - 0.3 / 2) < 0.01
    assert (seconds == trace.seconds(0.25, 30, 400, seed=9)).all()
    assert (seconds != trace.seconds(0.25, 30, 400, seed=8)).any()
    # More workers or rounds change nothing about those that are there.
    assert (trace.seconds(0.25, 35, 450, seed=9)[:30, :400] == seconds).all()


def test_profiles_are_read_as_they_were_written(tmp_path: Path) -> None:
    profile = StragglerTrace().profile(0.1, 5, 20, seed=2)
    profile.write(tmp_path / "delays.csv")
    again = DelayProfile.read(tmp_path / "delays.csv", load=0.1, slope=10.0)
    assert (again.seconds == profile.seconds).all()
    (tmp_path / "named.csv").write_text("first,second\n1,2\n3,4.5\n")
    assert DelayProfile.read(tmp_path / "named.csv", 0.0).seconds.tolist() == [[1, 3], [2, 4.5]]
    (tmp_path / "ragged.csv").write_text("1,2\n3\n")
    with pytest.raises(UsageError, match="different length"):
        DelayProfile.read(tmp_path / "ragged.csv", 0.0)
    (tmp_path / "words.csv").write_text("1,2\n3,late\n")
    with pytest.raises(UsageError, match="line 2"):
        DelayProfile.read(tmp_path / "words.csv", 0.0)


def test_the_slope_is_found_in_spite_of_stragglers() -> None:
    trace = StragglerTrace(slope_s=7.0, noise_s=0.05)
    profiles = [trace.profile(load, 40, 60, seed) for seed, load in enumerate((0.02, 0.1, 0.3))]
    fitted = DelayProfile.fitted(profiles)
    assert abs(fitted.slope - 7.0) < 0.3
    assert fitted.load == 0.02
    with pytest.raises(UsageError, match="two different loads"):
        DelayProfile.fitted(profiles[:1])


def test_a_round_ends_when_all_are_there_or_the_rest_can_be_done_without() -> None:
    seconds = np.ones((4, 3))
    seconds[2, 0] = 1.9
    seconds[3, 1] = 7.0
    seconds[2:, 2] = 7.0
    played = replay(SequentialScheme.gc(4, 1, jobs=3), seconds, patience=1.0)
    assert played.round_s == (1.9, 2.0, 7.0)
    assert played.waited == (False, False, True)
    assert played.cancelled == (0, 1, 0)
    assert played.total_s == 10.9
    uncoded = replay(SequentialScheme.uncoded(4, jobs=3), seconds)
    assert uncoded.round_s == (1.9, 7.0, 7.0)


def test_replaying_agrees_with_the_scheme_itself() -> None:
    seconds = StragglerTrace(stationary=0.15, mean_burst=1.5).seconds(0.1, 12, 44, seed=5)
    for scheme in candidates(12, 40, 3, most=6):
        played = replay(scheme, seconds)
        for round in range(1, scheme.rounds + 1):
            column = seconds[:, round - 1]
            finished = set(np.flatnonzero(column <= 2.0 * column.min()).tolist())
            waits = scheme.must_wait(round, finished) and len(finished) < 12
            # In flush rounds of selective repeat nobody may have anything to do.
            if round <= scheme.jobs:
                assert waits == played.waited[round - 1], (scheme.name, round)
            scheme.observe(round, range(12) if waits else finished)


def test_the_choice_is_the_fastest_and_obeys_the_delay() -> None:
    trace = StragglerTrace(mean_burst=1.0)
    profile = trace.profile(1 / 20, 20, 40, seed=11)
    free = choose_scheme(profile, 3, jobs=30)
    assert free.scheme.delay <= 3
    assert free.scheme.name.startswith("m_sgc")
    at_once = choose_scheme(profile, 0, jobs=30)
    assert at_once.scheme.delay == 0
    assert free.expected_s < at_once.expected_s
    for scheme in candidates(20, 40, 0):
        mean = replay(scheme, profile.at(scheme.load)).total_s / 40
        assert at_once.expected_s <= mean * 30 + 1e-9
    assert choose_scheme(profile, 3, families=("gc",)).scheme.name.startswith("gc")


def test_candidates_are_all_schemes_with_that_delay() -> None:
    names = [scheme.name for scheme in candidates(6, 10, 2)]
    assert len(set(names)) == len(names)
    assert "m_sgc(B=1, W=3, lambda=3)" in names
    assert "m_sgc(B=2, W=3, lambda=1)" not in names  # T = 3
    assert "sr_sgc(B=2, W=3, lambda=3)" in names
    assert all(scheme.delay <= 2 for scheme in candidates(6, 10, 2))


def test_what_makes_no_sense_is_refused() -> None:
    profile = DelayProfile(np.ones((3, 4)), 0.1)
    with pytest.raises(UsageError, match="profile of 4 rounds"):
        choose_scheme(profile, 4)
    with pytest.raises(UsageError, match="J=4 and T=1"):
        replay(SequentialScheme.m_sgc(3, 1, 2, 1, jobs=4), profile.seconds)
    with pytest.raises(UsageError, match="max_delay=-1"):
        choose_scheme(profile, -1)
    with pytest.raises(UsageError, match="no candidates"):
        choose_scheme(profile, 0, families=("m_sgc",))
    with pytest.raises(UsageError, match="above 0"):
        DelayProfile(np.zeros((2, 2)), 0.1)
    with pytest.raises(UsageError, match=r"need \[workers, rounds\]"):
        DelayProfile(np.ones(3), 0.1)
    with pytest.raises(UsageError, match="load=2"):
        DelayProfile(np.ones((2, 2)), 2)
    with pytest.raises(UsageError, match="kind='other'"):
        StragglerTrace("other")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="smaller share"):
        StragglerTrace(stationary=0.8, mean_burst=1.0)
    with pytest.raises(UsageError, match=r"mean_burst=0\.5"):
        StragglerTrace(mean_burst=0.5)
    with pytest.raises(UsageError, match="window=2"):
        StragglerTrace("adversarial", mean_burst=2.0)
    with pytest.raises(UsageError, match="bursts of whole rounds"):
        StragglerTrace("adversarial", mean_burst=1.5)
    with pytest.raises(UsageError, match="base_s > 0"):
        StragglerTrace(base_s=0.0)
    assert math.isnan(stationary_of(np.ones((2, 2)))[1])
