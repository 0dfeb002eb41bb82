"""The peer that holds part 0 of a pipeline, and leads it from iteration to iteration."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import PeerError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Peer
from shoal.parts.pipeline import _work as work
from shoal.parts.pipeline._keeper import Keeper
from shoal.parts.pipeline._wire import (
    BACKWARD,
    END,
    FORWARD,
    LAST,
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
from shoal.parts.pipeline.base import StageState, Unrecoverable
from shoal.parts.pipeline.leading import Leading
from shoal.parts.pipeline.plan import Plan
from shoal.tensor.types import Vector

PAUSE_S = 0.05


class _GaveUpError(Exception):
    """Nothing went on for as long as the head's patience lasts."""


class Head:
    """Sends microbatches around, has the stages apply their gradients, and has lost ones rebuilt.

    An iteration is attempted until all gradients are there. Then every part takes its step, part 0
    first; whoever holds a copy of part 0 does so before the others, so that a head that is lost
    finds a copy of the newest version anybody has. What of an attempt was dropped enters no step.
    A stage whose version is not that of the others is lost. A head that begins anew, with its
    stages further on, is lost itself: it takes its parameters from a copy and goes on.

    Source: CheckFree, arXiv 2506.15461; the protocol is our own, the paper restarts its processes.
    """

    def __init__(self, plan: Plan, leading: Leading, peer: Peer) -> None:
        self.plan = plan
        self.leading = leading
        self.peer = peer
        self.keeper = Keeper(peer, leading.keep_every)
        self.begun = plan.begun(0, peer.key("init"))
        self.state = self.begun
        self.version = 0
        self.attempt = 0
        self.struck: set[int] = set()
        self.limit_s = leading.timeout_s
        self.progress_s = peer.now()
        self.stages = tuple(range(1, plan.stages + 1))
        self.holders = plan.recovery.holders(plan.stages)

    async def live(self) -> None:
        """Until all iterations are applied; Unrecoverable when a part is lost for good."""
        peer, leading = self.peer, self.leading
        try:
            await self._mend()
            await self._evaluate()
            while self.version < leading.iterations:
                peer.enter_round(self.version)
                next_s = peer.now() + leading.pace_s
                await self._strike()
                if not (await self._attempt() and await self._commit()):
                    await self._mend()
                elif self.version % leading.evaluate_every == 0:
                    await self._evaluate()
                if peer.now() < next_s:
                    await peer.sleep_until(next_s)
            peer.record("version", self.version, ended="True")
        except _GaveUpError:
            peer.record("gave_up", self.version)
        except Unrecoverable:
            await self._end()
            raise
        await self._end()
        peer.record("outer", float(zlib.crc32(self.state.params.numpy().tobytes())))

    async def _end(self) -> None:
        nothing = torch.zeros(0, device="cpu")
        for stage in self.stages:
            await self.peer.send(PeerId(stage), Flow(END, LAST, LAST, 0, nothing))

    # An iteration.

    async def _attempt(self) -> bool:
        """All gradients of one iteration, and part 0's own step; False when it was dropped."""
        plan, peer = self.plan, self.peer
        micro = range(plan.schedule.micro)
        batches = {m: plan.batch(peer.key("batch", self.version, m)) for m in micro}
        began_s = peer.now()
        gradients = await self._around(batches, backwards=True)
        if gradients is None:
            return False
        params, state, square = await peer.compute(
            work.updated, self.state.params, self.state.optimizer,
            tuple(gradients[m] for m in micro),
            static=(plan.optimizer, self.state.scale, plan.clip),
            cost=Cost(flops=20.0 * len(self.state.params)), batch="never",
        )  # fmt: skip
        self.state = StageState(params, state, self.state.scale, float(square))
        peer.record("applied", self.attempt, update=str(self.version))
        self.version += 1
        self.progress_s = peer.now()
        self.limit_s = max(self.leading.timeout_s, 4.0 * (self.progress_s - began_s))
        await self.keeper.keep(self.version, self.state)
        return True

    async def _around(
        self, batches: Mapping[int, tuple[Tensor, Tensor]], backwards: bool
    ) -> dict[int, Any] | None:
        """Part 0's gradient (backwards) or the loss of every batch, by its number; None = dropped.

        What belongs to it is told apart from all before by the number of the attempt.
        """
        plan, peer, params = self.plan, self.peer, self.state.params
        self.attempt += 1
        now = (self.attempt, self.version)
        peer.discard(Flow, before=now)
        deadline = peer.now() + self.limit_s
        ends: dict[int, Vector] = {}
        losses: dict[int, Tensor] = {}
        done: dict[int, Any] = {}
        for micro, (tokens, _) in batches.items():
            x = await self._compute(work.embedded, 0, params, tokens)
            await self._send(plan.schedule.order(micro)[0], FORWARD, micro, x)
        while len(done) < len(batches):
            found = await peer.recv(Flow, tag=now, deadline=deadline)
            if found is None:
                self.limit_s = min(2.0 * self.limit_s, self.leading.patience_s)
                return None
            flow = found.message
            if flow.micro not in batches or flow.micro in done:
                continue
            if flow.what == LOST:
                return None
            tokens, targets = batches[flow.micro]
            if flow.what == BACKWARD and flow.micro in ends:
                own = await self._compute(work.backward_embedding, 1, params, tokens, flow.values)
                done[flow.micro] = ends[flow.micro] + own
            elif flow.what == FORWARD and not backwards:
                done[flow.micro] = await self._compute(work.judged, 1, params, flow.values, targets)
            elif flow.what == FORWARD and flow.micro not in ends:
                losses[flow.micro], gradient, ends[flow.micro] = await self._compute(
                    work.finished, 3, params, flow.values, targets
                )
                await self._send(
                    plan.schedule.order(flow.micro)[-1], BACKWARD, flow.micro, gradient
                )
        if backwards:
            mean = torch.stack([losses[micro] for micro in sorted(losses)]).mean()
            peer.record("training_loss", float(mean))
        return done

    async def _compute(self, function: Any, times: int, params: Vector, *args: Tensor) -> Any:
        """Part 0's products are those with the table of its output layer."""
        tokens = args[0].shape[0] * args[0].shape[1]
        return await self.peer.compute(
            function, params, *args, static=(self.plan.model,),
            cost=Cost(flops=2.0 * times * len(params) * tokens), batch="never",
        )  # fmt: skip

    async def _send(self, to: int, what: int, micro: int, values: Tensor) -> None:
        flow = Flow(what, self.version, self.attempt, micro, values)
        await self.peer.send(PeerId(to), flow)

    async def _commit(self) -> bool:
        """All stages take the step of the attempt that has just succeeded."""
        for group in (self.holders, [s for s in self.stages if s not in self.holders]):
            found = await self._ordered(
                {s: Apply(self.version - 1, self.attempt, self._copy(s)) for s in group}
            )
            if any(s not in found or found[s].version != self.version for s in group):
                return False
        return True

    def _copy(self, stage: int) -> Tensor:
        """Part 0's parameters for those who hold a copy, nothing for others."""
        return self.state.params if stage in self.holders else self.state.params[:0]

    async def _evaluate(self) -> None:
        """The validation loss, through all stages in their normal order."""
        windows = self.plan.text.validation
        batches = {self.plan.schedule.micro: (windows[:, :-1], windows[:, 1:])}
        found = await self._around(batches, backwards=False)
        if found is not None:
            (loss,) = found.values()
            self.peer.record("loss", float(loss), update=str(self.version))

    # Failures.

    async def _strike(self) -> None:
        """Parts that fail on purpose before this iteration, once."""
        version, trace = self.version, self.leading.trace
        lost = () if trace is None or version in self.struck else trace.at(version)
        if not lost:
            return
        self.struck.add(version)
        try:
            self.plan.recovery.check(lost, self.plan.stages)
        except Unrecoverable:
            if not self.leading.keep_every:
                raise
            await self._rewind(await self._standings())
            return
        # A holder that fails as well has lost its copy.
        spared = [s for s in self.holders if s not in lost]
        while 0 in lost and not await self._restore(version, spared):
            await self._pause()
        left = [stage for stage in lost if stage]
        while left := await self._rebuild(left):
            await self._mend()
            if self.version != version:
                return

    async def _standings(self) -> dict[int, Standing]:
        """Where all stages stand, once they all answer and none is at work on an order."""
        while True:
            found = await self._ordered({s: Ask(self.attempt) for s in self.stages})
            if len(found) == len(self.stages) and not any(each.busy for each in found.values()):
                self.attempt = max(self.attempt, *(each.attempt for each in found.values()))
                return found
            await self._pause()

    async def _mend(self) -> None:
        """Bring all parts to the newest version that anybody has."""
        while True:
            found = await self._standings()
            top = max(self.version, *(each.version for each in found.values()))
            behind = [s for s in self.stages if found[s].version == top - 1 and found[s].ready]
            lost = [s for s in self.stages if found[s].version != top and s not in behind]
            lost = [0, *lost] if self.version < top else lost
            if not (behind or lost):
                return
            held = [s for s in self.holders if found[s].copy == top]
            try:
                self.plan.recovery.check(lost, self.plan.stages)
                if 0 in lost and not held:
                    raise Unrecoverable(f"stage 0 is lost, and nobody has its copy of {top}")
            except Unrecoverable as error:
                if not self.leading.keep_every:
                    raise
                self.peer.record("unrecoverable", top, why=str(error))
                await self._rewind(found)
                continue
            if 0 in lost:
                await self._restore(top, held)
            elif behind:
                first = [s for s in behind if s in self.holders] or behind
                await self._ordered(
                    {s: Apply(top - 1, found[s].attempt, self._copy(s)) for s in first}
                )
            else:
                await self._rebuild(lost)
            await self._pause()

    async def _restore(self, version: int, holders: Sequence[int]) -> bool:
        """Part 0 from a copy of this version, bit for bit; whether one of these had it."""
        for stage in holders:
            held = await self._asked(stage, Give(version, True))
            if isinstance(held, Held):
                self.state = self.plan.restored(held.params)
                self.version = version
                self.peer.record("restored", version)
                return True
        return False

    async def _rebuild(self, lost: Collection[int]) -> list[int]:
        """Lost stages make themselves of others that stand where part 0 does; who did not."""
        if not lost:
            return []
        found = await self._ordered({s: Rebuild(self.version, self._copy(s)) for s in lost})
        done = [s for s, told in found.items() if not told.busy and told.version == self.version]
        return [s for s in lost if s not in done]

    async def _rewind(self, found: Mapping[int, Standing]) -> None:
        """All parts go back to the newest checkpoint that everybody keeps."""
        while True:
            common = set(self.keeper.kept()).intersection(*(each.kept for each in found.values()))
            version = max(common)
            state = self.keeper.load(version, self.begun)
            assert state is not None
            self.state, self.version = state, version
            self.peer.record("rewound", version)
            told = await self._ordered({s: Rewind(version, self._copy(s)) for s in self.stages})
            if len(told) == len(found) and all(t.version == version for t in told.values()):
                return
            await self._pause()
            found = await self._standings()

    async def _pause(self) -> None:
        now = self.peer.now()
        if now - self.progress_s > self.leading.patience_s:
            raise _GaveUpError
        await self.peer.sleep_until(now + PAUSE_S)

    # Questions.

    async def _ordered(self, orders: Mapping[int, Any]) -> dict[int, Standing]:
        """Where these stages stand after an order; whoever does not answer in time is left out."""
        found: dict[int, Standing] = {}

        async def one(stage: int, order: Any) -> None:
            answer = await self._asked(stage, order)
            if isinstance(answer, Standing):
                found[stage] = answer

        async with self.peer.tasks() as group:
            for stage, order in orders.items():
                group.start(one(stage, order))
        return found

    async def _asked(self, stage: int, question: Any) -> Any:
        deadline = self.peer.now() + self.limit_s
        try:
            return await self.peer.request(PeerId(stage), question, deadline=deadline)
        except PeerError:
            return None
