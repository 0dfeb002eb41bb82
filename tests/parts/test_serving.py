"""Serving: shared objects, sums, placement, plans, and trees under any order and failure."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.serving import weighted_sum
from shoal.parts.serving.aggregation_tree import NOTHING, Addend, AggregationTree, Job
from shoal.parts.serving.hierarchy import Hierarchy, plan
from shoal.parts.serving.placement import POLICIES, Placement
from shoal.parts.serving.shared_object_store import (
    KEY_BYTES,
    Mapped,
    SharedObjectStore,
    StoreFull,
    StoreGone,
    UpdateRefused,
)
from shoal.parts.serving.weighted_sum import WeightedSum, accumulate, check_weight

# The store.


def test_an_object_is_read_where_it_lies() -> None:
    with SharedObjectStore((2, 3), 2) as store, Mapped() as mapped:
        key = store.put(torch.arange(6.0).view(2, 3))
        assert len(key) == KEY_BYTES == 16
        assert store.get(key).data_ptr() == store.get(key).data_ptr()
        assert store.get(key).shape == (2, 3)
        elsewhere = mapped.view(key)
        assert elsewhere.tolist() == [0, 1, 2, 3, 4, 5]
        # Two mappings of one memory: what is written into one is in the other.
        elsewhere[2] = 9.0
        assert store.get(key)[0, 2] == 9.0
        assert store.view(key)[2] == 9.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_narrow_numbers_are_widened_and_wide_ones_narrowed(dtype: torch.dtype) -> None:
    with SharedObjectStore(3, 1) as store:
        key = store.put(torch.tensor([1.0, -2.5, 0.125], dtype=dtype))
        assert store.get(key).dtype == torch.float32
        assert store.get(key).tolist() == [1.0, -2.5, 0.125]


def test_sums_of_half_precision_do_not_lose_small_addends() -> None:
    with SharedObjectStore(1, 2) as store:
        big, one = store.put(torch.tensor([2048.0]).half()), store.put(torch.tensor([1.0]).half())
        total = store.view(big)
        for _ in range(8):
            accumulate(total, store.view(one), 1.0, False)
        assert total[0] == 2056.0
        del total


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (torch.ones(4), r"\(4,\)"), (torch.ones(3, 1), r"\(3, 1\)"),
        (torch.ones(3, dtype=torch.int64), "int64"), (torch.tensor([1.0, math.nan, 0.0]), "finite"),
        (torch.tensor([1.0, 0.0, math.inf]), "finite"),
        (torch.tensor([1e300, 0.0, 0.0], dtype=torch.float64), "finite"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_no_model_can_take_is_refused_and_leaves_nothing(values: Any, says: str) -> None:
    with SharedObjectStore(3, 1) as store:
        with pytest.raises(UpdateRefused, match=says):
            store.put(values)
        assert store.used == 0


@pytest.mark.filterwarnings("ignore:overflow encountered in reduce")
def test_large_finite_numbers_are_taken() -> None:
    with SharedObjectStore(4, 1) as store:
        assert store.get(store.put(torch.full((4,), 3e38))).isfinite().all()


def test_a_full_store_says_so_and_a_freed_key_is_void() -> None:
    with SharedObjectStore(2, 2) as store:
        first, second = store.put(np.zeros(2)), store.reserve()
        with pytest.raises(StoreFull, match="2 slots"):
            store.put(np.zeros(2))
        store.retain(first)
        store.release(first)
        assert store.get(first).tolist() == [0.0, 0.0]
        store.release(first)
        for use in (store.get, store.release, store.retain):
            with pytest.raises(StoreGone):
                use(first)
        again = store.put(np.ones(2))
        # The slot is the same, its use is another one.
        assert again != first
        with pytest.raises(StoreGone):
            store.get(first)
        store.release(second)
        assert store.used == 1


def test_keys_of_other_stores_and_of_closed_ones_are_void() -> None:
    one, two = SharedObjectStore(2, 1), SharedObjectStore(2, 1)
    with one, two, Mapped() as mapped:
        key = one.put(np.ones(2))
        with pytest.raises(StoreGone):
            two.get(key)
        with pytest.raises(UsageError, match="3 bytes"):
            one.get(b"abc")
        assert mapped.view(key).tolist() == [1.0, 1.0]
        other = two.put(np.full(2, 2.0))
        assert mapped.view(other).tolist() == [2.0, 2.0]
        one.close()
        with pytest.raises(StoreGone):
            mapped.view(key)
        with pytest.raises(StoreGone):
            one.put(np.ones(2))


def test_a_store_that_reuses_a_descriptor_is_another_one() -> None:
    """A stale key must not read what came to lie in its place."""
    with Mapped() as mapped:
        one = SharedObjectStore(2, 1)
        key = one.put(np.ones(2))
        one.close()
        with SharedObjectStore(2, 1) as two:
            fresh = two.put(np.ones(2))
            assert fresh[:8] == key[:8], "the same process, descriptor and slot"
            with pytest.raises(StoreGone):
                mapped.view(key)


def test_memory_goes_with_its_owner() -> None:
    def pieces() -> int:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return maps.read().count("memfd:shoal-objects")

    before = pieces()
    with SharedObjectStore(1 << 16, 4) as store, Mapped() as mapped:
        mapped.view(store.put(np.zeros(1 << 16)))
        assert pieces() == before + 2
    assert pieces() == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shape": 0}, "at least one number"), ({"slots": 0}, "slots=0"),
        ({"slots": 1 << 16}, "65535 slots"), ({"dtype": "float16"}, "float32, float64"),
    ],
)  # fmt: skip
def test_bad_stores_say_what_to_do(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SharedObjectStore(**{"shape": 3, "slots": 2, **settings})


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["put", "retain", "release"]), st.integers(0, 9))))
def test_references_are_counted(steps: list[tuple[str, int]]) -> None:
    """Against a table of counts; every live object keeps its numbers."""
    with SharedObjectStore(1, 3) as store:
        counts: dict[bytes, int] = {}
        numbers: dict[bytes, float] = {}
        for place, (what, which) in enumerate(steps):
            keys = list(counts)
            if what == "put":
                if len(counts) == 3:
                    with pytest.raises(StoreFull):
                        store.put(np.ones(1))
                    continue
                key = store.put(np.full(1, float(place)))
                counts[key], numbers[key] = 1, float(place)
            elif keys:
                key = keys[which % len(keys)]
                getattr(store, what)(key)
                counts[key] += 1 if what == "retain" else -1
                if not counts[key]:
                    del counts[key]
            assert store.used == len(counts)
            assert all(store.get(key)[0] == numbers[key] for key in counts)


# Sums.


@settings(max_examples=60)
@given(st.data())
def test_any_tree_and_order_gives_the_weighted_mean(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    updates = rng.standard_normal((count, 7)).astype(np.float32)
    weights = [float(w) for w in rng.integers(1, 500, count)]
    sums = [WeightedSum.of(i, updates[i], weights[i]) for i in range(count)]
    while len(sums) > 1:
        a = sums.pop(data.draw(st.integers(0, len(sums) - 1)))
        b = sums.pop(data.draw(st.integers(0, len(sums) - 1)))
        sums.insert(data.draw(st.integers(0, len(sums))), a.merged(b))
    exact = np.average(updates.astype(np.float64), axis=0, weights=weights)
    assert np.abs(sums[0].mean() - exact).max() <= 1e-6 * max(1.0, np.abs(updates).max())
    assert sums[0].ids == frozenset(range(count))


def test_an_update_cannot_count_twice() -> None:
    a, b = (WeightedSum.of(i, np.ones(2), 1.0) for i in (3, 4))
    with pytest.raises(UsageError, match="update 3 is in two sums"):
        a.merged(b).merged(a)
    with pytest.raises(UsageError, match="weight 0"):
        WeightedSum.of(1, np.ones(2), 0.0).mean()
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(UpdateRefused, match="finite number >= 0"):
            check_weight(weight)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_accumulating_in_strips(monkeypatch: Any, size: int, factor: float) -> None:
    monkeypatch.setattr(weighted_sum, "_STRIP", 8)
    rng = np.random.default_rng(size)
    first, second = rng.standard_normal((2, size)).astype(np.float32)
    total = np.full(size, np.nan, np.float32)
    accumulate(total, first, factor, True)
    accumulate(total, second, factor, False)
    exact = factor * (first.astype(np.float64) + second)
    assert np.abs(total - exact).max() <= 1e-6 * np.abs(np.stack([first, second])).max() * factor


# Placement and plans.


def test_published_examples() -> None:
    assert Counter(Placement().assign(45, [20] * 5)) == {0: 20, 1: 20, 2: 5}
    assert set(Placement().assign(20, [20] * 5)) == {0}
    assert set(Placement("round_robin").assign(20, [20] * 5)) == {0, 1, 2, 3, 4}
    assert Hierarchy(fan_in=2).leaves(7.0) == 4
    assert Hierarchy(smoothing=0.7).smoothed(0.0, 5.0, 2.0) == pytest.approx(3.0)
    (node,) = plan(7, [20])
    assert (node.leaves, node.middle, node.top) == (4, True, True)


@settings(max_examples=150)
@given(
    st.sampled_from(POLICIES), st.lists(st.integers(0, 6), max_size=20),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5),
)  # fmt: skip
def test_no_node_gets_more_than_it_can_do(
    policy: str, sizes: list[int], nodes: list[tuple[int, int]]
) -> None:
    """And best fit opens a node only if no open one has room, and takes the fullest that has."""
    capacity = [float(max(pair)) for pair in nodes]
    load = [float(min(pair)) for pair in nodes]
    room = [most - busy for most, busy in zip(capacity, load, strict=True)]
    is_open = [busy > 0 for busy in load]
    try:
        placed = Placement(policy).assign([float(s) for s in sizes], capacity, load)
    except UsageError:
        # Some update was larger than what any node had left.
        assert sizes
        assert sum(sizes) > min(room)
        return
    for size, node in zip(sizes, placed, strict=True):
        assert room[node] >= size
        fit = [i for i, left in enumerate(room) if left >= size]
        if policy == "best_fit":
            opened = [i for i in fit if is_open[i]]
            assert room[node] == min(room[i] for i in opened or fit)
            assert is_open[node] or not opened
        elif policy == "worst_fit":
            assert room[node] == max(room)
        elif policy == "first_fit":
            assert node == fit[0]
        room[node] -= size
        is_open[node] = True
    assert all(left >= 0 for left in room)


def test_in_turn_goes_around() -> None:
    placed = Placement("round_robin").assign(7, [2, 3, 9])
    assert placed == (0, 1, 2, 0, 1, 2, 1)


def test_plans() -> None:
    shape = Hierarchy(fan_in=4).plan([20, 0, 3], [None, None, 0.5])
    assert [node.leaves for node in shape] == [5, 0, 1]
    assert [node.top for node in shape] == [True, False, False]
    assert [node.middle for node in shape] == [True, False, False]
    # A load of nothing still needs somebody, and no load needs more than all updates at once.
    assert Hierarchy().plan([5], [0.0])[0].leaves == 1
    assert Hierarchy().plan([5], [99.0])[0].leaves == 3
    assert Hierarchy().smoothed(None, 3.0, 2.0) == 6.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Placement("best"), "policy='best'"),
        (lambda: Placement().assign(3, [1, 1]), "0 of 2 are free"),
        (lambda: Placement().assign(1, [1, 1], [0.0]), "1 loads of 2 nodes"),
        (lambda: Placement().assign([-1.0], [1]), "sizes from -1"),
        (lambda: Hierarchy(fan_in=0), "fan_in=0"),
        (lambda: Hierarchy(smoothing=1.0), "smoothing=1"),
        (lambda: Hierarchy().smoothed(0.0, -1.0, 1.0), "rate_per_s=-1"),
        (lambda: AggregationTree(0), "fan_in=0"), (lambda: AggregationTree(merge=1), "merge=1"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


# Trees.


class Machine:
    """Slots with numbers, and workers that add or die, in whatever order it is told."""

    def __init__(self) -> None:
        self.slots: dict[bytes, float] = {}
        self.made = 0
        self.gone: Counter[bytes] = Counter()

    def reserve(self) -> bytes:
        self.made += 1
        key = self.made.to_bytes(4, "little")
        self.slots[key] = math.nan
        return key

    def free(self, key: bytes) -> None:
        self.gone[key] += 1
        del self.slots[key]

    def update(self, id: int, weight: float, value: float) -> Addend:
        key = self.reserve()
        self.slots[key] = value
        return Addend(key, weight, weight, frozenset((id,)))


@settings(max_examples=80)
@given(st.data())
def test_every_update_is_in_the_sum_once_whatever_fails(data: st.DataObject) -> None:
    """Random arrivals, workers, deaths in mid-addition, early ends; two nodes and their top."""
    draw = data.draw
    nodes, fan_in, eager = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.booleans())
    merge, known = draw(st.integers(2, 4)), draw(st.booleans())
    machine = Machine()
    counts = [draw(st.integers(0, 5)) for _ in range(nodes)]
    trees = [
        AggregationTree(
            fan_in, eager=eager, merge=merge, expected=count if known else None,
            nodes=0 if place else nodes,
        )
        for place, count in enumerate(counts)
    ]  # fmt: skip
    waiting = {place: list(range(count)) for place, count in enumerate(counts)}
    busy: list[tuple[AggregationTree, Job]] = []
    sent = [False] * nodes
    total, weights = 0.0, 0.0
    deaths = 6
    for _ in range(1000):
        if trees[0].result is not None:
            break
        moves: list[tuple[str, Any]] = []
        for place, tree in enumerate(trees):
            if waiting[place]:
                moves.append(("arrive", place))
            elif not tree.closed:
                moves.append(("close", place))
            if tree.wanted:
                moves.append(("step", tree))
            if place and tree.result is not None and not sent[place]:
                moves.append(("send", place))
        moves += [("add", pair) for pair in busy]
        if deaths:
            moves += [("die", pair) for pair in busy]
        assert moves, "nothing is left to do and there is no result"
        what, which = draw(st.sampled_from(moves))
        if what == "arrive":
            number = waiting[which].pop()
            id, weight = 10 * which + number, float(number + 1)
            trees[which].arrived(machine.update(id, weight, float(id)))
            total, weights = total + weight * id, weights + weight
        elif what == "close":
            trees[which].close()
        elif what == "step":
            step = which.step(machine.reserve)
            assert step is not None
            before = 0.0 if step.first else machine.slots[step.job.out]
            value = step.addend.factor * machine.slots[step.addend.key]
            machine.slots[step.job.out] = before + value
            busy.append((which, step.job))
        elif what == "send":
            sent[which] = True
            trees[0].merge(trees[which].result)
        else:
            tree, job = which
            busy.remove(which)
            if what == "die":
                deaths -= 1
                machine.slots[job.out] = math.nan
                tree.failed(job)
                machine.free(job.out)
            else:
                tree.added(job)
            for key in tree.freed():
                machine.free(key)
    result = trees[0].result
    assert result is not None
    ids = {10 * place + n for place, count in enumerate(counts) for n in range(count)}
    assert result.ids == ids
    assert not busy
    if ids:
        assert result.factor * machine.slots[result.key] == pytest.approx(total)
        assert result.weight == pytest.approx(weights)
    else:
        assert result is NOTHING
    for tree in trees:
        assert not tree.jobs
        for key in set(tree.held()):
            if key in machine.slots:
                machine.free(key)
    assert not machine.slots, "slots that nobody frees"
    assert set(machine.gone.values()) <= {1}


def run_alone(tree: AggregationTree, machine: Machine) -> Counter[str]:
    """One worker does everything; how many sums of each kind it made."""
    jobs: list[Job] = []
    while (step := tree.step(machine.reserve)) is not None:
        if step.first:
            jobs.append(step.job)
        tree.added(step.job)
    return Counter(job.name for job in jobs)


def test_seven_updates_make_four_leaves_and_a_middle() -> None:
    machine, tree = Machine(), AggregationTree(2, expected=7, eager=False)
    for id in range(7):
        tree.arrived(machine.update(id, 1.0, 1.0))
    # The seventh is alone, so that a leaf of its own would only copy it.
    assert run_alone(tree, machine) == {"leaf": 3, "middle": 1}
    machine, tree = Machine(), AggregationTree(2, expected=8, eager=False)
    for id in range(8):
        tree.arrived(machine.update(id, 1.0, 1.0))
    assert run_alone(tree, machine) == {"leaf": 4, "middle": 1}


def test_eager_leaves_begin_with_the_first_update_and_lazy_ones_when_all_are_there() -> None:
    for eager in (True, False):
        machine, tree = Machine(), AggregationTree(3, expected=6, eager=eager)
        wanted = []
        for id in range(6):
            tree.arrived(machine.update(id, 1.0, 1.0))
            wanted.append(tree.wanted)
        assert wanted[:3] == ([1, 1, 1] if eager else [0, 0, 1])


def test_sums_are_merged_a_few_at_a_time_so_that_slots_come_free() -> None:
    machine, tree = Machine(), AggregationTree(1, eager=True, merge=3)
    most = 0
    for id in range(40):
        tree.arrived(machine.update(id, 1.0, 1.0))
        while (step := tree.step(machine.reserve)) is not None:
            tree.added(step.job)
            for key in tree.freed():
                machine.free(key)
        most = max(most, len(machine.slots))
    assert most <= 6


def test_a_lone_update_needs_no_sum() -> None:
    tree = AggregationTree(2, expected=1)
    tree.arrived(Addend(b"key", 3.0, 3.0, frozenset((5,))))
    assert tree.result == Addend(b"key", 3.0, 3.0, frozenset((5,)))


def test_what_a_tree_refuses() -> None:
    tree = AggregationTree(2, expected=2)
    tree.arrived(Addend(b"a", 1.0, 1.0, frozenset((1,))))
    with pytest.raises(UsageError, match="update 1 is in two"):
        tree.arrived(Addend(b"b", 1.0, 1.0, frozenset((1,))))
    with pytest.raises(UpdateRefused):
        tree.arrived(Addend(b"b", -1.0, -1.0, frozenset((2,))))
    tree.close()
    with pytest.raises(UsageError, match="after the last one"):
        tree.arrived(Addend(b"b", 1.0, 1.0, frozenset((2,))))
    with pytest.raises(UsageError, match="top that is elsewhere"):
        AggregationTree(2, nodes=0).merge(NOTHING)


def test_higher_levels_come_first() -> None:
    machine, tree = Machine(), AggregationTree(1, expected=None, nodes=2)
    for id in range(4):
        tree.arrived(machine.update(id, 1.0, 1.0))
    first = [tree.step(machine.reserve) for _ in range(2)]
    for step in first:
        assert step is not None
        tree.added(step.job)
    names = []
    while (step := tree.step(machine.reserve)) is not None:
        names.append(step.job.name)
        tree.added(step.job)
    assert names[0] == "middle"
    assert all(a != "leaf" or b != "top" for a, b in pairwise(names))
