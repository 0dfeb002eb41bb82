"""Sequential schemes: every pattern of the model, any pattern with waiting, loads, chunks."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.coding import gradient_code
from shoal.parts.coding._rules import shared_code
from shoal.parts.coding._tolerance import Bursty
from shoal.parts.coding.sequential_scheme import SequentialScheme, spare

ALL = {
    "uncoded": lambda jobs: SequentialScheme.uncoded(5, jobs=jobs),
    "gc": lambda jobs: SequentialScheme.gc(6, 2, jobs=jobs),
    "fractional": lambda jobs: SequentialScheme.gc(6, 2, jobs=jobs, kind="fractional"),
    "sr": lambda jobs: SequentialScheme.sr_sgc(6, 1, 2, 3, jobs=jobs),
    "sr, longer": lambda jobs: SequentialScheme.sr_sgc(5, 2, 5, 4, jobs=jobs),
    "m": lambda jobs: SequentialScheme.m_sgc(5, 1, 2, 2, jobs=jobs),
    "m, longer": lambda jobs: SequentialScheme.m_sgc(4, 2, 4, 3, jobs=jobs),
    "m, all": lambda jobs: SequentialScheme.m_sgc(4, 2, 3, 4, jobs=jobs),
}


def test_every_scheme_is_here() -> None:
    made = {name for name, kind in vars(SequentialScheme).items() if isinstance(kind, classmethod)}
    # What leaves stragglers out promises nothing, and replication is a fractional code.
    wanted = {each.split("(")[0] for each in (make(3).name for make in ALL.values())}
    assert wanted == made - {"ignoring"}


def played(scheme: SequentialScheme, pattern: tuple[frozenset[int], ...]) -> None:
    """All rounds that are left; nobody is late after the pattern's end."""
    for round in range(scheme.round, scheme.rounds + 1):
        step(scheme, pattern[round - 1] if round <= len(pattern) else frozenset())


def step(scheme: SequentialScheme, late: frozenset[int]) -> None:
    """A round; the job that is due is decodable at its end."""
    round = scheme.round
    finished = set(range(scheme.workers)) - late
    assert not scheme.must_wait(round, finished), (scheme.name, round, late)
    scheme.observe(round, finished)
    due = round - scheme.delay
    assert due < 1 or scheme.decodable(due), (scheme.name, due)


def explored(
    scheme: SequentialScheme, past: tuple[frozenset[int], ...], burst: int, window: int, most: int
) -> int:
    """How many patterns of the model, straight from its definition, go on from here; every job of
    all of them is decoded in time."""
    round = len(past) + 1
    if round > scheme.jobs:
        played(copied(scheme), past)
        return 1
    found = 0
    for late in SETS:
        recent = past[-(window - 1) :]
        early = frozenset().union(*recent[: max(0, len(recent) - burst + 1)])
        if len(late.union(*recent)) > most or late & early:
            continue
        branch = copied(scheme)
        step(branch, late)
        found += explored(branch, (*past, late), burst, window, most)
    return found


SETS = [frozenset(each) for size in range(5) for each in itertools.combinations(range(4), size)]


def copied(scheme: SequentialScheme) -> SequentialScheme:
    return copy.deepcopy(scheme, {id(scheme.rule): scheme.rule})


@pytest.mark.parametrize(
    ("most", "count"), [(1, 441), pytest.param(2, 17_865, marks=pytest.mark.slow)]
)
def test_every_pattern_of_the_model_is_decoded_in_time(most: int, count: int) -> None:
    scheme = SequentialScheme.m_sgc(4, 1, 2, most, jobs=6)
    assert explored(scheme, (), 1, 2, most) == count


def test_every_pattern_is_decoded_by_selective_repeat_too() -> None:
    for most in (1, 2, 3):
        assert explored(SequentialScheme.sr_sgc(4, 1, 2, most, jobs=4), (), 1, 2, most) > 60


LARGER = [(1, 3, 2), (2, 3, 1), (2, 3, 2), (2, 3, 3), (2, 3, 4), (2, 5, 2)]


@pytest.mark.parametrize("model", LARGER, ids=str)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_drawn_patterns_of_larger_models(model: tuple[int, int, int], data: st.DataObject) -> None:
    burst, window, most = model
    n, rounds = 5, 14
    pattern: list[frozenset[int]] = []
    for _ in range(rounds):
        late = data.draw(st.frozensets(st.integers(0, n - 1), max_size=most))
        pattern.append(within(pattern, late, burst, window, most))
    for make in (SequentialScheme.m_sgc, SequentialScheme.sr_sgc):
        played(make(n, burst, window, most, jobs=10), tuple(pattern))


def within(
    past: list[frozenset[int]], late: frozenset[int], burst: int, window: int, most: int
) -> frozenset[int]:
    """As many of these as the model lets be late now."""
    recent = past[-(window - 1) :]
    kept: frozenset[int] = frozenset()
    early = frozenset().union(*recent[: max(0, len(recent) - burst + 1)])
    for worker in sorted(late - early):
        if len(kept.union({worker}, *recent)) <= most:
            kept |= {worker}
    return kept


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_with_waiting_any_pattern_gives_exact_gradients_in_time(
    name: str, data: st.DataObject
) -> None:
    scheme = ALL[name](6)
    n = scheme.workers
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    chunks = len(scheme.sizes)
    gradients = torch.from_numpy(draw.normal(size=(scheme.jobs + 1, chunks, 3)))
    results: dict[tuple[int, int, int], torch.Tensor] = {}
    for round in range(1, scheme.rounds + 1):
        plan = scheme.plan(round)
        late = data.draw(st.frozensets(st.integers(0, n - 1)))
        finished = set(range(n)) - late
        if scheme.must_wait(round, finished):
            with pytest.raises(UsageError, match="would lose a job"):
                scheme.observe(round, finished)
            finished = set(range(n))
        for worker in finished:
            for task in plan[worker]:
                # Nobody is asked for a chunk that it does not hold, nor for a job out of time.
                assert scheme.holds(worker).issuperset(task.chunks)
                assert round - scheme.delay <= task.job <= min(round, scheme.jobs)
                value = sum(
                    weight * gradients[task.job, chunk]
                    for chunk, weight in zip(task.chunks, task.weights, strict=True)
                )
                assert isinstance(value, torch.Tensor)
                results[task.job, worker, task.part] = value
            assert scheme.planned_load(worker) <= scheme.load + 1e-12
        scheme.observe(round, finished)
        job = round - scheme.delay
        if job >= 1:
            decoded = scheme.decode(job, lambda w, part, job=job: results[job, w, part])
            assert torch.allclose(decoded, gradients[job].sum(0), rtol=0, atol=1e-8)
            scheme.forget(job)


@pytest.mark.parametrize("name", ALL)
def test_chunks_are_the_whole_data_and_work_is_the_load(name: str) -> None:
    scheme = ALL[name](10)
    assert math.isclose(sum(scheme.sizes), 1.0)
    held = frozenset().union(*(scheme.holds(worker) for worker in range(scheme.workers)))
    assert held == frozenset(range(len(scheme.sizes)))
    most = 0.0
    for round in range(1, scheme.rounds + 1):
        loads = [scheme.planned_load(worker) for worker in range(scheme.workers)]
        if name != "m, all" and scheme.delay < round <= scheme.jobs:
            assert np.allclose(loads, scheme.load)
        # One worker is late in the first round, so that something is to be repeated.
        late = {0} if round == 1 and scheme.name != "uncoded" else set()
        most = max(most, *loads)
        scheme.observe(round, set(range(scheme.workers)) - late)
    if name != "m, all":
        assert math.isclose(most, scheme.load)


@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_fractions_sum_to_one(n: int, burst: int, more: int, most: int) -> None:
    window, most = burst + more, min(most, n)
    scheme = SequentialScheme.m_sgc(n, burst, window, most, jobs=1)
    first, second = scheme.sizes[0], scheme.sizes[-1]
    if most == n:
        assert math.isclose(n * (window - 1) * first, 1.0)
    else:
        assert math.isclose(n * (window - 1) * first + n * burst * second, 1.0)
        assert math.isclose(first, (most + 1) * second)


def test_where_all_may_be_late_the_load_goes_to_an_uncoded_one() -> None:
    loads = [SequentialScheme.m_sgc(8, 1, w, 8, jobs=1).load for w in (2, 3, 5, 9, 65, 1025)]
    assert loads == sorted(loads, reverse=True)
    assert math.isclose(loads[0], 2 / 8)
    assert abs(loads[-1] - 1 / 8) < 1e-3 / 8
    # Repeats are all the work beyond it: this load is reached where a worker was late.
    scheme = SequentialScheme.m_sgc(4, 1, 2, 4, jobs=3)
    scheme.observe(1, {1, 2, 3})
    assert math.isclose(scheme.planned_load(0), scheme.load)
    assert scheme.planned_load(1) < scheme.load


def test_published_loads_and_delays() -> None:
    gc = SequentialScheme.gc(256, 15, jobs=480)
    sr = SequentialScheme.sr_sgc(256, 2, 3, 23, jobs=480)
    m = SequentialScheme.m_sgc(256, 1, 2, 27, jobs=480)
    assert (gc.load, gc.delay) == (0.0625, 0)
    assert (round(sr.load, 5), sr.delay, spare(2, 3, 23)) == (0.05078, 2, 12)
    assert (m.load, m.delay) == (56 / 7424, 1)
    assert round(m.load, 6) == 0.007543
    assert round(SequentialScheme.uncoded(256, jobs=1).load, 6) == 0.003906


def test_who_is_missing_repeats_as_many_tasks_as_are_wanting() -> None:
    scheme = SequentialScheme.sr_sgc(8, 1, 2, 4, jobs=3)  # s = 2
    assert scheme.delay == 1
    scheme.observe(1, {4, 5, 6, 7})
    assert not scheme.decodable(1)
    assert [tasks[0].job for tasks in scheme.plan(2)] == [1, 1, 2, 2, 2, 2, 2, 2]
    # Worker 0 repeats: without it job 1 is lost, so it is waited for; others may not be late now.
    assert scheme.must_wait(2, set(range(1, 8)))
    assert scheme.must_wait(2, set(range(7)))
    scheme.observe(2, range(8))
    assert scheme.decodable(1)
    assert scheme.decodable(2)
    # The base code is enough for two late workers again, whoever they are.
    assert not scheme.must_wait(3, set(range(2, 8)))


@pytest.mark.parametrize("name", ["gc", "sr", "m"])
def test_what_float64_cannot_decode_is_waited_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the residual bound tighter than some sets reach, all jobs would be decoded still."""
    makes = {
        "gc": lambda: SequentialScheme.gc(9, 3, jobs=4),
        "sr": lambda: SequentialScheme.sr_sgc(9, 1, 2, 5, jobs=4),
        "m": lambda: SequentialScheme.m_sgc(9, 2, 3, 3, jobs=4),
    }
    code = shared_code(9, 3)
    code._cache.clear()
    sets = [
        frozenset(each) for size in (3, 4, 5) for each in itertools.combinations(range(9), size)
    ]
    kept = {late: tuple(sorted(set(range(9)) - late)) for late in sets if len(late) == 3}
    off = [np.abs(code.weights(ids) @ code.matrix[list(ids)] - 1).max() for ids in kept.values()]
    monkeypatch.setattr(gradient_code, "RESIDUAL", float(np.median(off)))
    code._cache.clear()
    waited = 0
    for turn, late in enumerate(sets):
        scheme = makes[name]()
        for round in range(1, scheme.rounds + 1):
            now = late if round % 3 == turn % 3 else frozenset()
            finished = set(range(9)) - now
            if scheme.must_wait(round, finished):
                waited += scheme._tolerance.admits(sum(1 << w for w in now))
                finished = set(range(9))
            scheme.observe(round, finished)
            assert round <= scheme.delay or scheme.recipe(round - scheme.delay)
    assert waited > 10
    code._cache.clear()


def test_the_model_counts_workers_and_gaps() -> None:
    model = Bursty(2, 4, 2)
    model.advance(0b01)
    assert model.admits(0b01)
    model.advance(0b01)
    assert not model.admits(0b01)
    assert model.admits(0b10)
    assert not model.admits(0b110)
    model.advance(0b10)
    model.advance(0)
    assert not model.admits(0b01)
    assert not model.admits(0b100)
    model.advance(0)
    assert model.admits(0b01)
    assert not model.admits(0b10)
    assert model.admits(0b100)


def test_ignoring_is_the_mean_of_who_came() -> None:
    scheme = SequentialScheme.ignoring(4, jobs=2)
    assert not scheme.must_wait(1, {2})
    assert scheme.must_wait(1, set())
    scheme.observe(1, {1, 2})
    values = {1: torch.tensor([1.0]), 2: torch.tensor([3.0])}
    assert scheme.decode(1, lambda w, part: values[w]).tolist() == [8.0]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="burst <= window"):
        SequentialScheme.sr_sgc(8, 3, 3, 2, jobs=1)
    with pytest.raises(UsageError, match="try window=3"):
        SequentialScheme.sr_sgc(8, 2, 4, 2, jobs=1)
    with pytest.raises(UsageError, match="most=9"):
        SequentialScheme.m_sgc(8, 1, 2, 9, jobs=1)
    with pytest.raises(UsageError, match="burst=2, window=2"):
        SequentialScheme.m_sgc(8, 2, 2, 3, jobs=1)
    with pytest.raises(UsageError, match="jobs=0"):
        SequentialScheme.gc(8, 2, jobs=0)
    with pytest.raises(UsageError, match="workers=0"):
        SequentialScheme.uncoded(0, jobs=1)
    scheme = SequentialScheme.gc(4, 1, jobs=2)
    with pytest.raises(UsageError, match="round 1 of 2 is next"):
        scheme.plan(2)
    with pytest.raises(UsageError, match="worker 4 of 4"):
        scheme.must_wait(1, {4})
    with pytest.raises(UsageError, match="job 3 of 2"):
        scheme.decodable(3)
    with pytest.raises(UsageError, match="not decodable after round 0"):
        scheme.decode(1, lambda w, part: torch.zeros(1))


def test_another_run_begins_anew() -> None:
    scheme = SequentialScheme.gc(4, 1, jobs=1)
    scheme.observe(1, {0, 1, 2})
    with pytest.raises(UsageError, match="in order"):
        scheme.plan(2)
    other = scheme.again()
    assert other.plan(1)[0][0].job == 1
    assert not other.decodable(1)


def test_replication_needs_one_of_each_group() -> None:
    scheme = SequentialScheme.replicated(6, 3, jobs=2)
    assert (scheme.load, scheme.delay, scheme.name) == (0.5, 0, "replicated(3 copies)")
    assert scheme.must_wait(1, {0, 1, 2}), "nobody of the second group"
    # Four are late, of whom gradient coding with the same load tolerates two.
    assert not scheme.must_wait(1, {2, 4})
    assert SequentialScheme.gc(6, 2, jobs=2).must_wait(1, {2, 4})
    scheme.observe(1, {2, 4})
    weights = {worker: weight for worker, _, weight in scheme.recipe(1) or []}
    assert weights == pytest.approx({2: 1.0, 4: 1.0})
    assert SequentialScheme.replicated(6, 1, jobs=1).name == "uncoded"
    with pytest.raises(UsageError, match=r"s \+ 1 must divide"):
        SequentialScheme.replicated(6, 4, jobs=1)
