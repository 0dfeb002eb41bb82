"""A peer that holds one stage of a pipeline."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import PeerError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Envelope, Peer
from shoal.parts.pipeline import _work as work
from shoal.parts.pipeline._keeper import Keeper
from shoal.parts.pipeline._wire import (
    END,
    FORWARD,
    LOST,
    Apply,
    Ask,
    Flow,
    Give,
    Held,
    Rebuild,
    Rewind,
    Standing,
)  # fmt: skip
from shoal.parts.pipeline.base import StageState
from shoal.parts.pipeline.plan import Plan
from shoal.tensor.types import Vector

HEAD = PeerId(0)


class Stage:
    """Passes activations and gradients on, and does what part 0 orders; see `Head`.

    keep_every: a checkpoint in the peer's store after so many updates (0 = none); patience_s: how
    long it waits for any word before it gives up; report_every: updates between records of
    "params". A stage that begins anew has version 0, which is how everybody sees that it is lost.
    """

    def __init__(
        self, plan: Plan, peer: Peer, *, keep_every: int, patience_s: float, report_every: int
    ) -> None:
        self.plan = plan
        self.peer = peer
        self.patience_s = patience_s
        self.report_every = report_every
        self.keeper = Keeper(peer, keep_every)
        self.begun = plan.begun(peer.id, peer.key("init"))
        self.state = self.begun
        self.version = 0
        self.attempt = 0
        self.busy = False
        self.copy: tuple[int, Vector] | None = None
        self.inputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Vector] = {}
        self.heard_s = peer.now()
        self.cost = Cost(flops=2.0 * plan.model.spec(1).dim * plan.batch_size * plan.text.length)

    async def live(self) -> None:
        """Until part 0 says that it is over, or nothing is heard any more."""
        peer = self.peer
        orders: tuple[tuple[Any, Callable[[Any], Awaitable[None]]], ...] = (
            (Apply, self._apply), (Rebuild, self._rebuild), (Rewind, self._rewind),
        )  # fmt: skip
        peer.serve(Ask, self._stand)
        peer.serve(Give, self._give)
        for kind, order in orders:
            peer.serve(kind, self._ordered(order))
        peer.record("stage_bytes", self.state.params.nbytes)
        peer.record("params", self.state.params)
        ended = False
        while not ended:
            heard_s = self.heard_s
            found = await peer.recv(Flow, deadline=heard_s + self.patience_s)
            if found is None:
                if self.heard_s == heard_s:
                    break
            else:
                self.heard_s = peer.now()
                ended = found.message.what == END
                await self._take(found.message)
        peer.record("version", self.version, ended=str(ended))
        peer.record("params", self.state.params)

    # What flows.

    async def _take(self, flow: Flow) -> None:
        if flow.what == END or flow.attempt < self.attempt:
            return
        if flow.attempt > self.attempt:
            self.attempt = flow.attempt
            self.inputs, self.gradients = {}, {}
            self.peer.discard(Flow, before=(flow.attempt, flow.iteration))
        known = self.inputs.get(flow.micro)
        if self.busy or flow.iteration != self.version:
            await self._lost(flow)
        elif flow.what == FORWARD:
            await self._forward(flow)
        elif known is None:
            await self._lost(flow)
        else:
            await self._backward(flow, known)

    async def _lost(self, flow: Flow) -> None:
        nothing = torch.zeros(0, device="cpu")
        told = Flow(LOST, flow.iteration, flow.attempt, flow.micro, nothing)
        await self.peer.send(HEAD, told)

    async def _forward(self, flow: Flow) -> None:
        peer, plan = self.peer, self.plan
        evaluated = flow.micro >= plan.schedule.micro
        if not evaluated:
            self.inputs[flow.micro] = flow.values
        y = await peer.compute(
            work.forwarded, self.state.params, flow.values, static=(plan.model,),
            cost=self._cost(flow, 1), batch="never",
        )  # fmt: skip
        if self._current(flow):
            order = plan.schedule.order(flow.micro)
            place = order.index(peer.id)
            to = order[place + 1] if place + 1 < len(order) else HEAD
            await self._pass_on(to, flow, y)

    async def _backward(self, flow: Flow, x: Tensor) -> None:
        peer, plan = self.peer, self.plan
        gradient, own = await peer.compute(
            work.backward, self.state.params, x, flow.values, static=(plan.model,),
            cost=self._cost(flow, 3), batch="never",
        )  # fmt: skip
        if self._current(flow):
            del self.inputs[flow.micro]
            self.gradients[flow.micro] = own
            order = plan.schedule.order(flow.micro)
            place = order.index(peer.id)
            await self._pass_on(order[place - 1] if place else HEAD, flow, gradient)

    def _cost(self, flow: Flow, times: int) -> Cost:
        """Backwards it is thrice the work: the forward pass again, and two products for each."""
        share = flow.values.shape[0] / self.plan.batch_size
        return Cost(flops=times * share * self.cost.flops)

    def _current(self, flow: Flow) -> bool:
        return (flow.iteration, flow.attempt) == (self.version, self.attempt) and not self.busy

    async def _pass_on(self, to: int, flow: Flow, values: Tensor) -> None:
        passed = Flow(flow.what, flow.iteration, flow.attempt, flow.micro, values)
        await self.peer.send(PeerId(to), passed)

    # What is ordered.

    def _standing(self) -> Standing:
        complete = len(self.gradients) == self.plan.schedule.micro
        copy = -1 if self.copy is None else self.copy[0]
        return Standing(self.version, self.attempt, complete, self.busy, copy, self.keeper.kept())

    async def _stand(self, envelope: Envelope[Ask]) -> Standing:
        self.heard_s = self.peer.now()
        return self._standing()

    def _ordered(
        self, order: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Envelope[Any]], Awaitable[Standing]]:
        """One order at a time; whoever asks again meanwhile is told that this stage is busy."""

        async def handle(envelope: Envelope[Any]) -> Standing:
            self.heard_s = self.peer.now()
            if not self.busy:
                self.busy = True
                try:
                    await order(envelope.message)
                finally:
                    self.busy = False
            return self._standing()

        return handle

    async def _apply(self, order: Apply) -> None:
        peer, plan = self.peer, self.plan
        micro = plan.schedule.micro
        if order.version == self.version - 1:
            self._hold(self.version, order.copy)
        if (order.version, order.attempt) != (self.version, self.attempt):
            return
        if len(self.gradients) < micro:
            return
        gradients = tuple(self.gradients[m] for m in range(micro))
        before = self.state
        params, state, square = await peer.compute(
            work.updated, before.params, before.optimizer, gradients,
            static=(plan.optimizer, before.scale, plan.clip),
            cost=Cost(flops=20.0 * len(before.params)), batch="never",
        )  # fmt: skip
        self.state = StageState(params, state, before.scale, float(square))
        self._moved(self.version + 1, order.copy)
        peer.enter_round(self.version)
        peer.record("applied", order.attempt, update=str(order.version))
        if self.version % self.report_every == 0:
            peer.record("params", self.state.params)
        await self.keeper.keep(self.version, self.state)

    async def _rebuild(self, order: Rebuild) -> None:
        peer, plan = self.peer, self.plan
        given: dict[int, StageState] = {}
        for source in plan.recovery.sources(peer.id, plan.stages):
            asked = Give(order.version, False)
            deadline = peer.now() + self.patience_s / 8
            held = await peer.request(PeerId(source), asked, deadline=deadline)
            given[source] = StageState(held.params, None, square=held.square)
        self.state = plan.rebuilt(peer.id, given, peer.key("again", order.version))
        self._moved(order.version, order.copy)
        peer.record("rebuilt", order.version)

    async def _rewind(self, order: Rewind) -> None:
        state = self.keeper.load(order.version, self.begun)
        if state is None:
            raise PeerError(f"stage {self.peer.id} keeps no checkpoint of version {order.version}")
        self.state = state
        self._moved(order.version, order.copy)
        self.peer.record("rewound", order.version)

    def _moved(self, version: int, copy: Tensor) -> None:
        self.version = version
        self.inputs, self.gradients = {}, {}
        self.copy = None
        self._hold(version, copy)

    def _hold(self, version: int, copy: Tensor) -> None:
        if len(copy):
            self.copy = (version, copy)

    async def _give(self, envelope: Envelope[Give]) -> Held:
        asked = envelope.message
        if asked.outer:
            if self.copy is None or self.copy[0] != asked.version:
                raise PeerError(f"stage {self.peer.id} has no copy of version {asked.version}")
            return Held(self.copy[1], 0.0)
        if self.busy or self.version != asked.version:
            raise PeerError(f"stage {self.peer.id} stands at {self.version}, not {asked.version}")
        return Held(self.state.params, self.state.square)
