"""A worker of sequential gradient coding: it does what it is told until it is told something else.

It keeps the parameters of the jobs under way and nothing for after a crash: the master sends again
what a worker lacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Peer
from shoal.kernel.tasks import TaskHandle
from shoal.parts.coding.sequential_scheme import MiniTask
from shoal.rounds.task import Batch
from shoal.systems.coding._sequential_wire import Answer, Assign
from shoal.systems.coding._sequential_work import mini_gradient

if TYPE_CHECKING:
    from shoal.systems.coding._sequential_bound import Bound

MASTER = PeerId(0)


class Worker:
    """Peer i is worker i - 1."""

    def __init__(self, program: Bound, peer: Peer) -> None:
        self.program = program
        self.peer = peer
        self.worker = peer.id - 1
        self.holds = program.rule.holds(self.worker)
        self.known: dict[int, Tensor] = {}
        self.life = -1
        self.round = 0
        self.answered: Answer | None = None
        self._batches: dict[int, tuple[Batch, Tensor]] = {}

    async def live(self) -> None:
        """Until the master says that it is over, or nothing is heard of it any more."""
        peer, quiet_s = self.peer, self.program.settings.quiet_s
        at_work: TaskHandle | None = None
        async with peer.tasks() as group:
            while True:
                envelope = await peer.recv(Assign, deadline=peer.now() + quiet_s)
                if envelope is None:
                    break
                told = envelope.message
                if (told.life, told.round) < (self.life, self.round):
                    continue
                if told.over:
                    peer.record("params", told.params[0])
                    break
                if self._again(told):
                    if self.answered is not None:
                        await peer.send(MASTER, self.answered)
                        continue
                    if at_work is not None and not at_work.done:
                        continue
                if at_work is not None and not at_work.done:
                    at_work.cancel()
                    peer.record("cancelled", self.round)
                self._take(told)
                at_work = group.start(self._work(told))
            if at_work is not None:
                at_work.cancel()

    def _again(self, told: Assign) -> bool:
        """Whether this was told before, and brings nothing that the worker lacks."""
        same = (told.life, told.round) == (self.life, self.round)
        return same and all(job in self.known for job in told.fresh)

    def _take(self, told: Assign) -> None:
        if told.life != self.life:
            # Another life of the master may begin from other parameters.
            self.known = {}
        self.life, self.round, self.answered = told.life, told.round, None
        for job, params in zip(told.fresh, told.params, strict=True):
            self.known[job] = params
        oldest = told.round - self.program.rule.delay
        self.known = {job: params for job, params in self.known.items() if job >= oldest}

    async def _work(self, told: Assign) -> None:
        peer, program = self.peer, self.program
        if any(job not in self.known for job in told.jobs):
            nothing = torch.zeros(0, 0, device="cpu", dtype=torch.float64)
            await peer.send(MASTER, Answer(told.life, told.round, nothing, True))
            return
        minis = [
            program.rule.task(self.worker, job, part)
            for job, part in zip(told.jobs, told.parts, strict=True)
        ]
        for mini in minis:
            assert self.holds.issuperset(mini.chunks)
        load = sum(map(self.program.load_of, minis))
        # All of it is injected: what arithmetic really takes comes on top, on real processes.
        await peer.sleep_until(peer.now() + program.delay_s(self.worker, told.round, load))
        results = [await self._gradient(mini) for mini in minis]
        peer.record("load", load, round=str(told.round))
        answer = Answer(told.life, told.round, torch.stack(results), False)
        self.answered = answer
        await peer.send(MASTER, answer)

    async def _gradient(self, mini: MiniTask) -> Tensor:
        if mini.part not in self._batches:
            self._batches[mini.part] = self.program.chunked.batch(mini)
        batch, share = self._batches[mini.part]
        return await gradient_of(self.peer, self.program, self.known[mini.job], batch, share)


async def gradient_of(
    peer: Peer, program: Bound, params: Tensor, batch: Batch, share: Tensor
) -> Tensor:
    """A mini-task on this peer; the time that it takes was slept before."""
    return await peer.compute(
        mini_gradient, params, batch.x, batch.y, batch.mask, share,
        static=(program.workload.task,), cost=Cost(),
    )  # fmt: skip
