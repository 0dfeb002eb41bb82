"""A tree of aggregators on the processes of this machine, over shared memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import numpy as np

from shoal.base.errors import ShoalError, UsageError
from shoal.parts.serving import _worker
from shoal.parts.serving.aggregation_tree import Addend, AggregationTree, Job
from shoal.parts.serving.shared_object_store import SharedObjectStore, StoreFull, UpdateRefused
from shoal.parts.serving.weighted_sum import check_weight

if TYPE_CHECKING:
    from torch import Tensor


MERGE = 4
"""How many sums of leaves are merged before their slots are freed."""

START_S = 60.0
"""How long a new process may take until it is ready, however busy the machine."""


@dataclass(frozen=True, eq=False)
class Aggregated:
    """What came out. mean: [*shape] of its own; weight: sum of weights; ids: the updates in it;
    deaths: how many aggregators died on the way."""

    mean: np.ndarray
    weight: float
    ids: frozenset[int]
    deaths: int


@dataclass(eq=False)
class _Worker:
    """A process, whether it said that it is ready, and the job to which it is adding."""

    process: BaseProcess
    requests: connection.Connection
    pid: int
    ready: bool = False
    job: Job | None = None


class HierarchicalAggregator:
    """Weighted means of updates, made by `workers` processes that add in shared memory.

    An update is copied once, into shared memory; from then on keys of 16 bytes go around, over Unix
    sockets. A worker that was killed is replaced, and what it was adding is added again, so that
    every update counts once. shape, dtype, slots: see `SharedObjectStore`; fan_in, eager: see
    `AggregationTree`. patience_s: a worker that takes longer than this for one addition is killed.
    deaths: how many workers may die within one call before it gives up.

    Assumes Linux. Workers are spawned, so a script needs the usual `if __name__ == "__main__"`.
    Order of arrival decides the order of additions, so results agree to rounding.
    Source: LIFL (Qi et al. 2024), sections on shared-memory processing and hierarchies.

    >>> updates = [(0, 1.0, np.float32([1, 2])), (1, 3.0, np.float32([5, 6]))]
    >>> with HierarchicalAggregator(2, workers=1) as aggregator:
    ...     aggregator.aggregate(updates).mean.tolist()
    [4.0, 5.0]
    """

    def __init__(
        self, shape: int | Sequence[int], *, workers: int = 4, slots: int | None = None,
        fan_in: int = 2, eager: bool = True, dtype: str = "float32", deaths: int = 16,
        patience_s: float = 60.0,
    ) -> None:  # fmt: skip
        if workers < 1 or fan_in < 1 or not patience_s > 0:
            raise UsageError(
                f"HierarchicalAggregator: workers={workers}, fan_in={fan_in}, "
                f"patience_s={patience_s}; need at least 1 of each, and a time above 0"
            )
        # Every worker writes into a slot, and what it writes becomes an addend of the next level.
        self._spare = 2 * workers
        slots = 4 * workers + fan_in + MERGE if slots is None else slots
        if slots <= self._spare + fan_in + MERGE:
            raise UsageError(
                f"HierarchicalAggregator: slots={slots} for {workers} workers; need more than "
                f"{self._spare + fan_in + MERGE} (raise it)"
            )
        self.fan_in, self.eager, self.deaths, self.patience_s = fan_in, eager, deaths, patience_s
        self.store = SharedObjectStore(shape, slots, dtype)
        self._context = multiprocessing.get_context("spawn")
        self._dead = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
            for worker in self._workers:
                if not worker.requests.poll(START_S):
                    raise ShoalError(f"aggregator {worker.pid} did not start within {START_S:g} s")
                worker.requests.recv()
                worker.ready = True
        except EOFError:
            self.close()
            raise ShoalError(
                'an aggregator ended as it started (a script needs `if __name__ == "__main__"`)'
            ) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> HierarchicalAggregator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of the workers."""
        return tuple(worker.pid for worker in self._workers)

    def aggregate(
        self, updates: Iterable[tuple[int, float, Tensor | np.ndarray]], expected: int | None = None
    ) -> Aggregated:
        """The weighted mean of updates (id, weight, numbers), in the order in which they come.

        A second update of the same id is passed over. While there is no slot the next update waits
        (back-pressure). UpdateRefused for one that does not fit; nothing of the call remains then.
        """
        tree = AggregationTree(self.fan_in, eager=self.eager, expected=expected, merge=MERGE)
        self._dead = 0
        seen: set[int] = set()
        try:
            for id, weight, values in updates:
                if id in seen:
                    continue
                seen.add(id)
                check_weight(weight)
                self._admit(tree, Addend(self._put(tree, values), weight, weight, frozenset((id,))))
            tree.close()
            while tree.result is None:
                self._turn(tree, None)
            return self._read(tree.result)
        finally:
            self._clear(tree)

    def close(self) -> None:
        """End the workers and give the memory back."""
        for worker in self._workers:
            worker.requests.close()
        for worker in self._workers:
            worker.process.join(5.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers.clear()
        self.store.close()

    def _put(self, tree: AggregationTree, values: Tensor | np.ndarray) -> bytes:
        while self.store.free <= self._spare:
            self._turn(tree, None)
            at_work = any(w.job is not None or not w.ready for w in self._workers)
            if self.store.free <= self._spare and not at_work:
                raise StoreFull(
                    f"{self.store.slots} slots hold updates that no sum takes yet (raise slots)"
                )
        return self.store.put(values)

    def _admit(self, tree: AggregationTree, addend: Addend) -> None:
        try:
            tree.arrived(addend)
        except UsageError:
            self.store.release(addend.key)
            raise
        self._turn(tree, 0.0)

    def _turn(self, tree: AggregationTree, timeout_s: float | None) -> None:
        """Give work to whoever has none, and hear what was done. None waits for something."""
        self._assign(tree)
        awaited = {w.requests: w for w in self._workers if w.job is not None or not w.ready}
        if not awaited:
            return
        # A process that only starts is given time to, while no other one is at work.
        slow = [worker for worker in awaited.values() if worker.ready] or list(awaited.values())
        patience_s = self.patience_s if slow[0].ready else START_S
        heard = connection.wait(list(awaited), patience_s if timeout_s is None else timeout_s)
        for one in heard:
            self._hear(tree, awaited[one])  # type: ignore[index]
        if not heard and timeout_s is None:
            for worker in slow:
                self._replace(tree, worker)
        self._assign(tree)

    def _assign(self, tree: AggregationTree) -> None:
        for key in tree.freed():
            self.store.release(key)
        for worker in self._workers:
            idle = worker.ready and worker.job is None
            step = tree.step(self.store.reserve) if idle else None
            if step is None:
                continue
            worker.job, addend = step.job, step.addend
            request = _worker.REQUEST.pack(step.job.out, addend.key, addend.factor, step.first)
            try:
                worker.requests.send_bytes(request)
            except OSError:
                self._replace(tree, worker)

    def _hear(self, tree: AggregationTree, worker: _Worker) -> None:
        try:
            problem = worker.requests.recv()
        except (EOFError, OSError):
            self._replace(tree, worker)
            return
        if not worker.ready:
            worker.ready = True
            return
        job, worker.job = worker.job, None
        assert job is not None
        if problem:
            tree.failed(job)
            self.store.release(job.out)
            raise ShoalError(f"aggregator {worker.pid}: {problem}")
        tree.added(job)

    def _replace(self, tree: AggregationTree, worker: _Worker) -> None:
        """A worker died: another one takes its place, and its job is to be done again."""
        job = worker.job
        self._renew(worker)
        if job is not None:
            tree.failed(job)
            self.store.release(job.out)
        self._dead += 1
        if self._dead > self.deaths:
            raise ShoalError(
                f"{self._dead} aggregators died within one call (out of memory? raise deaths to go "
                "on longer)"
            )

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker.serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, process.pid or 0)

    def _renew(self, worker: _Worker) -> None:
        """Whoever wrote into its slot is gone for certain when this returns."""
        worker.requests.close()
        worker.process.kill()
        worker.process.join()
        worker.process.close()
        new = self._start()
        worker.process, worker.requests, worker.pid = new.process, new.requests, new.pid
        worker.ready, worker.job = False, None

    def _read(self, result: Addend) -> Aggregated:
        if not result.weight > 0:
            raise UpdateRefused(
                f"{len(result.ids)} updates of weight {result.weight} have no mean (give weights)"
            )
        total = self.store.view(result.key)
        mean = total * self.store.dtype.type(result.factor / result.weight)
        return Aggregated(mean.reshape(self.store.shape), result.weight, result.ids, self._dead)

    def _clear(self, tree: AggregationTree) -> None:
        """Free all slots; a worker that still adds is heard first, so that it writes into none."""
        for worker in self._workers:
            if worker.job is None:
                continue
            try:
                heard = worker.requests.poll(self.patience_s) and worker.requests.recv() is not None
            except (EOFError, OSError):
                heard = False
            if heard:
                worker.job = None
            else:
                self._renew(worker)
        for job in tree.jobs:
            self.store.release(job.out)
        for key in tree.held():
            self.store.release(key)
