"""The usual loop of a client: rest, pull, make local steps, push, and again.

When it rests and how many steps it makes are its own habits, so a server can only guess; unless the
server says how many steps it wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shoal.base.errors import Leaving
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskHandle
from shoal.parts.asynchronous._messages import Bye, Finished
from shoal.parts.asynchronous.client import Client, Model, ServerLost
from shoal.parts.asynchronous.local import perform
from shoal.tensor.types import Vector

if TYPE_CHECKING:
    from shoal.parts.asynchronous.learning import Learning


class Worker:
    """One life of a client."""

    def __init__(self, learning: Learning, peer: Peer) -> None:
        self.learning = learning
        self.peer = peer
        workload, terms = learning.workload, learning.terms
        self.client = Client(
            peer, workload, terms.server, patience_s=terms.patience_s, give_up_s=terms.give_up_s
        )
        self.shard = workload.task.shard(peer.id)
        self.weight = float(self.shard.size)
        rest = learning.habits.rest
        self.ready = None if rest is None else rest.begin(peer)
        self.end_s = float("inf") if workload.seconds is None else workload.seconds
        self.last: tuple[int, Vector] | None = None
        self.busy_s = 0.0

    async def run(self) -> None:
        """Until the server says that it is over, or is lost, or the horizon comes."""
        try:
            async with self.peer.tasks() as group:
                life = group.start(self._live())
                ending = group.start(self._until_finished(life))
                await life.join()
                ending.cancel()
        except Leaving:
            return
        self.peer.record("busy_s", self.busy_s)
        version, params = 0, self.learning.initial
        if self.last is not None:
            version, params = self.last
        elif self.client.model is not None:
            version, params = self.client.model.version, self.client.model.params
        self.peer.enter_round(max(0, version - 1))
        self.peer.record("params", params)

    async def _live(self) -> None:
        client = self.client
        try:
            await client.resume()
            rest_s = self._rest_s(0, 0)
            model: Model | None = None
            while True:
                if model is None:
                    if rest_s > 0:
                        await self.peer.sleep_until(self.peer.now() + rest_s)
                    model = await client.pull()
                steps = model.steps or self.learning.habits.steps(self.peer, model.number)
                work = await self._work(model, steps)
                rest_s = self._rest_s(model.number, steps)
                model = await client.push(
                    work, model, steps=steps, weight=self.weight, again=rest_s <= 0
                )
        except ServerLost:
            return

    def _rest_s(self, number: int, steps: int) -> float:
        if self.ready is None:
            return 0.0
        now_s = self.peer.now()
        return self.ready(number, steps, now_s) - now_s

    async def _work(self, model: Model, steps: int) -> Vector:
        peer, learning = self.peer, self.learning
        there = learning.workload.there
        cost = learning.cost(peer.id, model.number, steps)
        began_s = peer.now()
        work = await peer.compute(
            perform, model.params, self.shard, there(peer.key("work", model.number)),
            there(torch.tensor(steps, dtype=torch.int64, device="cpu")),
            static=(learning.workload.task, learning.work), cost=cost,
        )  # fmt: skip
        self.busy_s += peer.now() - began_s
        return work

    async def _until_finished(self, life: TaskHandle) -> None:
        """Hear that it is over, even in the middle of a work that nobody wants any more."""
        learning, server = self.learning, PeerId(self.learning.terms.server)
        like = learning.initial
        while True:
            envelope = await self.peer.recv(Finished, source=server, deadline=self.end_s)
            if envelope is None:
                break
            told = envelope.message
            # What was damaged on its way will be said again.
            if told.params.shape == like.shape:
                self.last = (told.version, learning.workload.there(told.params))
                await self.peer.send(server, Bye(told.version))
                break
        life.cancel()
