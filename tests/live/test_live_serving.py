"""Aggregators that are processes: the pool, its deaths, its back-pressure, and what is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.base.errors import ShoalError, UsageError
from shoal.lab.scenario import Scenario
from shoal.parts.serving.hierarchical_aggregator import HierarchicalAggregator
from shoal.parts.serving.shared_object_store import (
    Mapped,
    SharedObjectStore,
    StoreGone,
    UpdateRefused,
)
from shoal.systems.serving.lifl_machine import lifl_machine

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]

SIZE = 300_000
Updates = list[tuple[int, float, np.ndarray]]


def updates(count: int, seed: int = 0) -> Updates:
    rng = np.random.default_rng(seed)
    return [(i, float(i + 1), rng.standard_normal(SIZE, dtype=np.float32)) for i in range(count)]


def exact(given: Updates) -> np.ndarray:
    weight = sum(w for _, w, _ in given)
    return sum(w * values.astype(np.float64) for _, w, values in given) / weight


def near(mean: np.ndarray, given: Updates) -> bool:
    flat = exact(given)
    return bool(np.abs(mean - flat).max() <= 1e-6 * np.abs(flat).max() + 1e-7)


def stores(maps: Path) -> list[str]:
    """The inodes of the stores whose memory a process maps, one for each mapping."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    return [line.split()[4] for line in lines if "memfd:shoal-objects" in line]


def mappings(store: str) -> int:
    """How often the memory of a store is mapped, over all processes of this user."""
    return sum(stores(maps).count(store) for maps in Path("/proc").glob("[0-9]*/maps"))


@pytest.fixture(scope="module")
def pool() -> Iterator[HierarchicalAggregator]:
    with HierarchicalAggregator(SIZE, workers=3) as aggregator:
        yield aggregator


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 23])
def test_a_pool_gives_the_flat_weighted_mean(
    pool: HierarchicalAggregator, eager: bool, count: int
) -> None:
    pool.eager = eager
    given = updates(count)
    found = pool.aggregate(given, count)
    assert near(found.mean, given)
    assert (found.ids, found.deaths) == (frozenset(range(count)), 0)
    assert found.weight == sum(w for _, w, _ in given)
    assert pool.store.used == 0


def test_an_update_that_comes_again_counts_once(pool: HierarchicalAggregator) -> None:
    given = updates(4)
    assert near(pool.aggregate([*given, *given[:3]]).mean, given)


def test_tensors_come_as_they_are(pool: HierarchicalAggregator) -> None:
    given = updates(3)
    found = pool.aggregate((i, w, torch.from_numpy(values)) for i, w, values in given)
    assert near(found.mean, given)


def killing(
    pool: HierarchicalAggregator, given: Updates, wave: int
) -> Iterator[tuple[int, float, np.ndarray]]:
    for update in given:
        if update[0] % 5 == 2:
            # One that died before may not have been missed yet.
            with suppress(ProcessLookupError):
                os.kill(pool.pids[(update[0] + wave) % 3], signal.SIGKILL)
        yield update


def test_killed_workers_are_replaced_and_nothing_is_lost(pool: HierarchicalAggregator) -> None:
    """Some are killed as updates come, so in the middle of additions too."""
    deaths = 0
    for wave in range(4):
        given = updates(16, wave)

        found = pool.aggregate(killing(pool, given, wave))
        deaths += found.deaths
        assert near(found.mean, given)
        assert found.ids == frozenset(range(16))
        assert pool.store.used == 0
    assert deaths >= 4


def test_one_that_stands_still_is_replaced() -> None:
    given = updates(6)
    with HierarchicalAggregator(SIZE, workers=2, patience_s=1.0) as aggregator:
        os.kill(aggregator.pids[0], signal.SIGSTOP)
        found = aggregator.aggregate(given)
        assert near(found.mean, given)
        assert found.deaths == 1


def test_after_too_many_deaths_it_gives_up_and_can_be_used_again() -> None:
    given = updates(8)
    with HierarchicalAggregator(SIZE, workers=1, deaths=1) as aggregator:
        stop = threading.Event()

        def kill() -> None:
            while not stop.is_set():
                for pid in aggregator.pids:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                time.sleep(0.01)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with pytest.raises(ShoalError, match="died within one call"):
                aggregator.aggregate(given)
        finally:
            stop.set()
            killer.join()
        assert aggregator.store.used == 0
        aggregator.deaths = 16
        assert near(aggregator.aggregate(given).mean, given)


def test_few_slots_hold_many_updates_back() -> None:
    with HierarchicalAggregator(SIZE, workers=2, slots=11) as aggregator:
        given = updates(40)
        assert near(aggregator.aggregate(given).mean, given)


@pytest.mark.parametrize(
    ("update", "says"),
    [
        ((9, 1.0, np.zeros(3, np.float32)), "model has float32"),
        ((9, -1.0, np.zeros(SIZE, np.float32)), "weight -1"),
        ((9, 1.0, np.full(SIZE, np.nan, np.float32)), "not finite"),
    ],
)
def test_a_bad_update_ends_the_call_and_leaves_nothing(
    pool: HierarchicalAggregator, update: tuple[int, float, np.ndarray], says: str
) -> None:
    given = updates(5)
    with pytest.raises(UpdateRefused, match=says):
        pool.aggregate([*given, update])
    assert pool.store.used == 0
    assert near(pool.aggregate(given).mean, given)


def test_nothing_has_no_mean(pool: HierarchicalAggregator) -> None:
    with pytest.raises(UpdateRefused, match="have no mean"):
        pool.aggregate([])


def test_bad_pools_say_what_to_do() -> None:
    with pytest.raises(UsageError, match="workers=0"):
        HierarchicalAggregator(3, workers=0)
    with pytest.raises(UsageError, match="slots=4"):
        HierarchicalAggregator(3, workers=2, slots=4)


def own_store(ready: object, stay: object) -> None:
    store = SharedObjectStore(1 << 20, 4)
    ready.send(store.put(np.ones(1 << 20, np.float32)))  # type: ignore[attr-defined]
    with suppress(EOFError):
        stay.recv()  # type: ignore[attr-defined]


def test_a_killed_owner_leaves_no_memory() -> None:
    """Nobody has to clean up: the memory goes with the last process that maps it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    stay, held = context.Pipe()
    owner = context.Process(target=own_store, args=(theirs, held))
    owner.start()
    key = ours.recv()
    with Mapped() as mapped:
        assert mapped.view(key)[0] == 1.0
        (store,) = set(stores(Path(f"/proc/{owner.pid}/maps")))
        assert mappings(store) == 2
        os.kill(owner.pid or 0, signal.SIGKILL)
        owner.join()
        # Who has it still reads it; who has not can get it no more.
        assert mapped.view(key)[0] == 1.0
        with pytest.raises(StoreGone, match="cannot be opened"):
            Mapped().view(key)
    assert mappings(store) == 0
    stay.close()


def test_the_machine_loses_nothing_on_any_way() -> None:
    for transport in ("shared", "bytes", "socket", "broker", "tree", "killed"):
        run = lifl_machine(
            Scenario("m", peers=2, rounds=1), transport, megabytes=1.0, updates=6, workers=2,
            kills=2,
        )  # fmt: skip
        found = {row.name: row.value for row in run.rows}
        assert (found["wrong"], found["left"], found["lost"]) == (0.0, 0.0, 0.0)
        assert run.wall_s > 0
        assert run.cpu_s > 0
