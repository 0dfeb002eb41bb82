"""A node's aggregators: which are warm, which are started and stopped, which do not answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup
from shoal.parts.serving.aggregation_tree import Job

if TYPE_CHECKING:
    from shoal.systems.serving.lifl import LIFL

COLD, STARTING, WARM, LOST = "cold", "starting", "warm", "lost"


@dataclass(eq=False)
class Worker:
    """An aggregator as its gateway knows it.

    job: the sum that it is for, when it is used once only; asked: it is adding; slots: what it may
    still write into although it does not answer; due: it stops when it has answered.
    """

    peer: PeerId
    state: str = COLD
    since_s: float = 0.0
    job: Job | None = None
    asked: bool = False
    due: bool = False
    starts: int = 0
    slots: list[bytes] = field(default_factory=list)


class Pool:
    """The aggregators of one node. reserved_s: time for which they held resources, from the order
    to start until they stopped; cold_starts: how many of these there were."""

    group: TaskGroup

    def __init__(self, settings: LIFL, peer: Peer, aggregators: Sequence[PeerId]) -> None:
        self.settings = settings
        self.peer = peer
        self.workers = [Worker(aggregator) for aggregator in aggregators]
        self.warm = 0
        self.reserved_s = 0.0
        self.cold_starts = 0

    @property
    def alive(self) -> int:
        """How many are warm or starting."""
        return sum(worker.state in (STARTING, WARM) for worker in self.workers)

    @property
    def idle(self) -> int:
        """How many of these do nothing."""
        return self.alive - sum(worker.state == WARM and worker.asked for worker in self.workers)

    @property
    def unbound(self) -> int:
        """How many are or could be free."""
        return sum(worker.state != LOST and worker.job is None for worker in self.workers)

    def free(self) -> list[Worker]:
        """Who can be asked now."""
        return [w for w in self.workers if w.state == WARM and not w.asked]

    def grow(self, wanted: int, ready: Callable[[], None]) -> None:
        """Start more for work that nobody can take: to the plan, or one for each piece of it."""
        starting = sum(worker.state == STARTING for worker in self.workers)
        more = wanted - starting
        if self.settings.planning and not self.settings.always_on:
            more = min(more, max(1, self.warm) - self.alive)
        self.start(more, ready)

    def start(self, count: int, ready: Callable[[], None]) -> None:
        """Order up to so many cold ones to start; `ready` is called when one is warm."""
        cold = [worker for worker in self.workers if worker.state == COLD][: max(0, count)]
        for worker in cold:
            worker.state, worker.since_s = STARTING, self.peer.now()
            worker.starts += 1
            self.cold_starts += 1
            if self.settings.cold_start_s:
                self.group.start(self._warm_up(worker, worker.starts, ready))
            else:
                worker.state = WARM
        if cold and not self.settings.cold_start_s:
            ready()

    async def _warm_up(self, worker: Worker, start: int, ready: Callable[[], None]) -> None:
        await self.peer.sleep_until(worker.since_s + self.settings.cold_start_s)
        if worker.state == STARTING and worker.starts == start:
            worker.state = WARM
            ready()

    def stop(self) -> None:
        """Stop all, those that are adding as soon as they have answered."""
        for worker in self.workers:
            if worker.state in (STARTING, WARM):
                worker.due = worker.asked
                if not worker.asked:
                    self._stop(worker, COLD)

    def settle(self) -> None:
        """Who has answered stops if it is due, or if the sum that it was for is made."""
        for worker in self.free():
            if worker.due or (worker.job is not None and worker.job.over):
                self._stop(worker, COLD)

    def end(self) -> None:
        """Nobody waits for answers any more."""
        for worker in self.workers:
            worker.asked = False
        self.stop()

    def lose(self, worker: Worker) -> None:
        """It does not answer."""
        if worker.state == WARM:
            self._stop(worker, LOST)
        worker.state = LOST

    def found(self, worker: Worker, ready: Callable[[], None]) -> None:
        """It answers again, and may be started."""
        worker.state = COLD
        if self.settings.always_on:
            self.start(1, ready)

    def unbind(self) -> None:
        """The sums that they were for are no more."""
        for worker in self.workers:
            worker.job = None

    def _stop(self, worker: Worker, state: str) -> None:
        self.reserved_s += self.peer.now() - worker.since_s
        worker.state, worker.job, worker.due = state, None, False
