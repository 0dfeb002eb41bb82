"""LIFL's coordinator: rounds, placement, plans, and the model that comes out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shoal.base.errors import PeerError
from shoal.kernel.peer import Envelope, Peer
from shoal.kernel.tasks import TaskHandle
from shoal.parts.serving.hierarchy import Hierarchy
from shoal.parts.serving.placement import Placement
from shoal.systems.serving._lifl_wire import (
    Ended,
    Got,
    Hello,
    Over,
    Plan,
    Planned,
    Result,
    Train,
)

if TYPE_CHECKING:
    from shoal.systems.serving._lifl_bound import Bound

LIVES = 1 << 16
"""Attempts of one incarnation; the next one's numbers begin above, so that none is used twice."""
TOLERANCE = 1e-3


class Coordinator:
    """The coordinator in one incarnation. A round is applied as a whole or not at all."""

    def __init__(self, bound: Bound, peer: Peer) -> None:
        self.bound = bound
        self.settings, self.workload, self.layout = bound.settings, bound.workload, bound.layout
        self.peer = peer
        self.params = bound.workload.initial
        self.first_round = 0
        self.loads: list[float | None] = [None] * self.layout.nodes
        self.hierarchy = Hierarchy(bound.settings.fan_in, bound.settings.smoothing)
        self._number = 0

    def close(self) -> None:
        pass

    async def live(self) -> None:
        """All rounds, then the end for everybody."""
        peer, bound = self.peer, self.bound
        peer.serve(Hello, self._hello)
        await self._remember()
        for round in range(self.first_round, bound.rounds):
            peer.enter_round(round)
            if self.settings.pace_s:
                await peer.sleep_until(max(peer.now(), round * self.settings.pace_s))
            if peer.now() >= bound.until_s:
                break
            await self._round(round)
            stored = {"params": self.params, "round": (round + 1).to_bytes(8, "little")}
            await peer.store.commit(stored)
            if (round + 1) % self.workload.report_every == 0:
                peer.record("params", self.params)
        peer.record("params", self.params)
        ended = Ended(max(0, peer.round), self.params.cpu())
        for other in peer.roster:
            if other != peer.id:
                await peer.send(other, ended)

    async def _hello(self, envelope: Envelope[Hello]) -> Got:
        return Got()

    async def _remember(self) -> None:
        store = self.peer.store
        life = store.get("life")
        lives = 0 if life is None else int.from_bytes(life, "little")
        self._number = lives * LIVES
        round, params = store.get("round"), store.get("params")
        if round is not None and params is not None:
            self.first_round = int.from_bytes(round, "little")
            self.params = self.workload.there(params)
        await store.commit({"life": (lives + 1).to_bytes(8, "little")})

    async def _round(self, round: int) -> None:
        down: set[int] = set()
        began_s = self.peer.now()
        for _ in range(self.settings.attempts):
            self._number += 1
            result = await self._attempt(round, self._number, down)
            if result is not None and self._apply(round, result):
                now = self.peer.now()
                self.peer.record("round_s", now - began_s)
                if result.ids:
                    self.peer.record("act_s", now - result.first_s)
                    self.peer.record("tail_s", now - result.last_s)
                return
        self.peer.record("skipped", 1.0)

    async def _attempt(self, round: int, attempt: int, down: set[int]) -> Result | None:
        peer, settings, layout = self.peer, self.settings, self.layout
        nodes = [node for node in range(layout.nodes) if node not in down]
        if not nodes:
            down.clear()
            await peer.sleep_until(peer.now() + settings.patience_s)
            return None
        clients = self.bound.chosen(round)[: int(settings.capacity) * len(nodes)]
        placed = Placement(settings.placement).assign(
            len(clients), [settings.capacity] * len(nodes)
        )
        counts = [placed.count(place) for place in range(len(nodes))]
        plans = self._plans(round, attempt, nodes, counts)
        failed = await self._tell(plans)
        if failed:
            down |= failed
            await self._over(plans, round, attempt)
            return None
        params = self.params.cpu()
        for client, place in zip(clients, placed, strict=True):
            gateway = layout.gateway(nodes[place])
            await peer.send(client, Train(round, attempt, gateway, params))
        result = await self._result(round, attempt)
        await self._over(plans, round, attempt)
        peer.discard(Result, before=(round, attempt + 1))
        if result is not None:
            peer.record("nodes", len(plans))
            peer.record("planned", sum(plan.warm for plan in plans.values()))
        return result

    def _plans(
        self, round: int, attempt: int, nodes: list[int], counts: list[int]
    ) -> dict[int, Plan]:
        """The plan of each node that gets updates."""
        settings = self.settings
        shape = self.hierarchy.plan(counts, [self.loads[node] for node in nodes])
        taking = [(node, plan) for node, plan in zip(nodes, shape, strict=True) if plan.updates]
        top = next(self.layout.gateway(node) for node, plan in taking if plan.top)
        plans = {}
        for node, plan in taking:
            goal = math.ceil(settings.goal * plan.updates)
            count = len(taking) if plan.top else 0
            warm = plan.leaves
            if not settings.reuse:
                # One for each sum that will be made.
                warm = -(-goal // settings.fan_in) + plan.middle + (count > 1)
            plans[node] = Plan(round, attempt, goal, warm, int(top), count)
        return plans

    async def _tell(self, plans: dict[int, Plan]) -> set[int]:
        """Give out the plans; nodes that did not answer."""
        asked: dict[int, TaskHandle] = {}
        async with self.peer.tasks() as group:
            for node, plan in plans.items():
                asked[node] = group.start(self._ask(node, plan))
        return {node for node, handle in asked.items() if not handle.result()}

    async def _ask(self, node: int, plan: Plan) -> bool:
        peer = self.peer
        gateway = self.layout.gateway(node)
        for _ in range(2):
            try:
                until_s = peer.now() + self.settings.patience_s
                planned = await peer.request(gateway, plan, deadline=until_s)
            except PeerError:
                continue
            if isinstance(planned, Planned):
                if planned.each_s > 0:
                    self.loads[node] = self.hierarchy.smoothed(
                        self.loads[node], planned.rate_per_s, planned.each_s
                    )
                return True
        return False

    async def _result(self, round: int, attempt: int) -> Result | None:
        peer = self.peer
        until_s = peer.now() + self.bound.attempt_s
        envelope = await peer.recv(Result, tag=(round, attempt), deadline=until_s)
        return None if envelope is None else envelope.message

    async def _over(self, plans: dict[int, Plan], round: int, attempt: int) -> None:
        for node in plans:
            await self.peer.send(self.layout.gateway(node), Over(round, attempt))

    def _apply(self, round: int, result: Result) -> bool:
        """Take the mean over, if every update is in it exactly once."""
        bound, peer = self.bound, self.peer
        off = bound.miscounted(result, bound.chosen(round))
        peer.record("miscounted", 0.0 if off <= TOLERANCE else min(off, 1e9))
        if off > TOLERANCE:
            return False
        peer.record("updates", len(result.ids), ids=" ".join(map(str, result.ids)))
        if result.weight > 0:
            self.params = self.workload.there(bound.unmarked(result.vector).clone())
        return True
