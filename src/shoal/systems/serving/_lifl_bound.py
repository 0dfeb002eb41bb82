"""LIFL with its task: who is what, how long things may take, and what the peers run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.base import keyed as draws
from shoal.base.errors import Leaving, PeerError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Peer
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.workload import Workload
from shoal.systems.serving._lifl_aggregator import Aggregator
from shoal.systems.serving._lifl_client import Client, train
from shoal.systems.serving._lifl_coordinator import Coordinator
from shoal.systems.serving._lifl_costs import Costs, costs_of
from shoal.systems.serving._lifl_gateway import Gateway
from shoal.systems.serving._lifl_layout import Layout
from shoal.systems.serving._lifl_wire import Ended, Hello, Result
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops

if TYPE_CHECKING:
    from shoal.systems.serving.lifl import LIFL


@dataclass(frozen=True, eq=False)
class Bound:
    """LIFL with its task: the program that peers run.

    A vector on its way is the model [dim] and a mark for each client, which is 1 in that client's
    update: in a weighted sum the marks are the weights that went in, so that the coordinator sees
    what was really added, whatever was said about it.
    """

    settings: LIFL
    workload: Workload
    layout: Layout
    dtype: str

    @cached_property
    def costs(self) -> Costs:
        return costs_of(self.settings.costs)

    @cached_property
    def rounds(self) -> int:
        return 1 << 30 if self.workload.rounds is None else self.workload.rounds

    @property
    def until_s(self) -> float:
        return math.inf if self.workload.seconds is None else self.workload.seconds

    @cached_property
    def dim(self) -> int:
        return len(self.workload.initial)

    @property
    def numbers(self) -> int:
        return self.dim + len(self.layout.clients)

    @property
    def slots(self) -> int:
        settings, layout = self.settings, self.layout
        spare = 2 * layout.each + layout.nodes + settings.fan_in + settings.merge
        return settings.slots or int(settings.capacity) + spare + 1

    @cached_property
    def attempt_s(self) -> float:
        """How long the coordinator waits for the result of an attempt."""
        settings, costs = self.settings, self.costs
        work_s = settings.capacity * (costs.put_s + 3 * costs.add_s) + 2 * costs.send_s
        late_s = settings.client_s * (1 + settings.client_spread) + settings.hibernate_s
        starts_s = 4 * settings.cold_start_s
        return settings.collect_s + 8 * settings.patience_s + work_s + late_s + starts_s

    @cached_property
    def end_s(self) -> float:
        """When the coordinator is through at the latest; then everybody else ends by itself."""
        settings = self.settings
        round_s = settings.pace_s + settings.attempts * (self.attempt_s + 2 * settings.patience_s)
        whole_s = self.rounds * round_s if self.workload.rounds is not None else math.inf
        return min(whole_s, self.until_s + round_s) + settings.patience_s

    @cached_property
    def training(self) -> tuple[SGD, int, int]:
        return SGD(self.settings.lr), self.settings.steps, self.settings.batch_size

    @cached_property
    def cost(self) -> Cost:
        """What a client's work takes, counted once."""
        if self.settings.client_s:
            return Cost(seconds=self.settings.client_s)
        params = self.workload.initial
        key = keyed.key_of(self.workload.seed, "cost", device=params.device)
        shard = self.workload.task.shard(self.layout.clients[0])
        flops = count_flops(train, params, shard, key, self.workload.task, *self.training)
        return Cost(flops=flops)

    def chosen(self, round: int) -> list[PeerId]:
        """The clients of a round, drawn by key."""
        settings, clients, seed = self.settings, self.layout.clients, self.workload.seed
        if not settings.most:
            return list(clients)
        span = settings.most - settings.fewest + 1
        count = settings.fewest + int(span * draws.uniform(seed, "concurrency", round))
        order = sorted(clients, key=lambda c: (draws.uniform(seed, "client", round, c), c))
        return sorted(order[: max(1, count)])

    def marked(self, params: Tensor, client: int) -> Tensor:
        """A client's vector: [numbers] from [dim]."""
        mark = torch.zeros(len(self.layout.clients), dtype=params.dtype, device=params.device)
        mark[client - self.layout.clients[0]] = 1.0
        return torch.cat([params, mark])

    def unmarked(self, vector: Tensor) -> Tensor:
        return vector[: self.dim]

    def miscounted(self, result: Result, chosen: list[PeerId]) -> float:
        """How far any client's weight in the result is from the right one, in its own weight."""
        if not result.weight > 0:
            return 0.0
        if len(result.vector) != self.numbers or not set(result.ids) <= set(chosen):
            return math.inf
        found = result.vector[self.dim :].double() * result.weight
        sizes = torch.tensor(
            [float(self.workload.task.shard(c).size) for c in self.layout.clients],
            dtype=torch.float64, device="cpu",
        )  # fmt: skip
        inside = torch.tensor(
            [client in set(result.ids) for client in self.layout.clients], device="cpu"
        )
        off = (found - torch.where(inside, sizes, 0.0)).abs() / sizes.clamp(min=1.0)
        return float(off.max())

    async def run(self, peer: Peer) -> None:
        """One peer, in the role that its number gives it."""
        role = {
            "coordinator": Coordinator, "gateway": Gateway, "aggregator": Aggregator,
            "client": Client,
        }[self.layout.role(peer.id)](self, peer)  # fmt: skip
        try:
            if isinstance(role, Coordinator):
                await role.live()
                return
            async with peer.tasks() as group:
                life = group.start(role.live())
                await self._until_ended(peer)
                life.cancel()
        except Leaving:
            return
        finally:
            role.close()

    async def _until_ended(self, peer: Peer) -> None:
        """Until the coordinator says so, or is gone; the final model is everybody's."""
        quiet_s = self.settings.quiet_s
        # Whoever begins later than the others may have come too late.
        until_s = quiet_s if peer.now() < self.settings.patience_s else peer.now()
        while peer.now() < self.end_s:
            envelope = await peer.recv(Ended, deadline=min(self.end_s, until_s))
            if envelope is None:
                if not await self._coordinated(peer):
                    return
                until_s = peer.now() + quiet_s
                continue
            ended = envelope.message
            if ended.params.shape == self.workload.initial.shape:
                peer.enter_round(ended.round)
                peer.record("params", self.workload.there(ended.params))
                return

    async def _coordinated(self, peer: Peer) -> bool:
        """Whether the coordinator answers, within a while."""
        patience_s = self.settings.patience_s
        until_s = peer.now() + self.settings.quiet_s
        while peer.now() < until_s:
            try:
                await peer.request(PeerId(0), Hello(), deadline=peer.now() + patience_s)
                return True
            except PeerError:
                await peer.sleep_until(peer.now() + patience_s)
        return False
