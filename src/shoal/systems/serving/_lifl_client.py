"""A client of LIFL: it trains on its own data and hands the result to the gateway it was told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.base.errors import PeerError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Peer
from shoal.rounds.local import descend
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard, Task
from shoal.systems.serving._lifl_wire import LATER, Taken, Train, Update
from shoal.tensor.types import Key, Vector

if TYPE_CHECKING:
    from shoal.parts.optimise.sgd import SGD
    from shoal.systems.serving._lifl_bound import Bound


def train(
    params: Vector, shard: Shard, key: Key, task: Task, optimizer: SGD, steps: int, batch_size: int
) -> Vector:
    """Local training of one round: params [..., dim]."""
    step = Step(0, task, shard, key, torch.ones_like(shard.size, dtype=torch.bool))
    start = optimizer.init(params)
    return descend(
        task, optimizer, params, start, step, steps=steps, batch_size=batch_size
    )[0]  # fmt: skip


class Client:
    """One client in one incarnation.

    It keeps the result of its last round: asked again with the same model, it sends the same.
    """

    def __init__(self, bound: Bound, peer: Peer) -> None:
        self.bound = bound
        self.settings = bound.settings
        self.workload = bound.workload
        self.peer = peer
        self.shard = bound.workload.task.shard(peer.id)
        self.weight = float(self.shard.size)
        self._last: tuple[int, Tensor, Tensor] | None = None

    async def live(self) -> None:
        asked: Train | None = None
        while True:
            if asked is None:
                asked = await self._asked(self.bound.end_s)
            if asked is None:
                return
            asked = await self._take_part(asked)

    def close(self) -> None:
        pass

    async def _asked(self, until_s: float) -> Train | None:
        """The next request that fits the model, of several that wait the last one."""
        newest = None
        while True:
            envelope = await self.peer.recv(
                Train, deadline=self.peer.now() if newest is not None else until_s
            )
            if envelope is None:
                return newest
            found = envelope.message
            like = self.workload.initial
            if found.params.shape == like.shape:
                newest = found

    async def _take_part(self, asked: Train) -> Train | None:
        """Train and send; another request that came meanwhile."""
        peer, settings = self.peer, self.settings
        peer.enter_round(asked.round)
        await self._sleep_late(asked.round)
        vector = await self._trained(asked)
        update = Update(asked.round, asked.attempt, self.weight, vector)
        gateway = PeerId(asked.gateway)
        until_s = peer.now() + settings.collect_s
        patience_s = settings.patience_s + self.bound.costs.put_s * settings.capacity
        turn = 0
        while peer.now() < until_s:
            turn += 1
            try:
                taken = await peer.request(gateway, update, deadline=peer.now() + patience_s)
                if isinstance(taken, Taken) and taken.answer != LATER:
                    return None
            except PeerError:
                pass
            newer = await self._asked(peer.now() + settings.patience_s * turn / 4)
            if newer is not None:
                return newer
        return None

    async def _sleep_late(self, round: int) -> None:
        """A mobile device may hibernate before it begins."""
        settings, peer = self.settings, self.peer
        if peer.uniform("hibernates", round) < settings.hibernating:
            await peer.sleep_until(
                peer.now() + settings.hibernate_s * peer.uniform("hibernates for", round)
            )

    async def _trained(self, asked: Train) -> Tensor:
        peer, workload, settings = self.peer, self.workload, self.settings
        if self._last is not None:
            round, began, vector = self._last
            if round == asked.round and torch.equal(began, asked.params):
                return vector
        key = workload.there(peer.key("round", asked.round))
        cost = self.bound.cost
        if settings.client_s:
            spread = settings.client_spread * (2 * peer.uniform("takes", asked.round) - 1)
            cost = Cost(seconds=settings.client_s * (1 + spread))
        trained = await peer.compute(
            train, workload.there(asked.params), self.shard, key,
            static=(workload.task, *self.bound.training), cost=cost,
        )  # fmt: skip
        vector = self.bound.marked(trained.cpu(), peer.id)
        self._last = (asked.round, asked.params, vector)
        return vector
