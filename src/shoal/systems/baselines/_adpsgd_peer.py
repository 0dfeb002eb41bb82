"""One peer of AD-PSGD: updates of its own, and the two ends of an exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.base.errors import PeerError, WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Envelope, Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard, Task
from shoal.tensor.types import Key, Vector
from shoal.wire.message import Packed, message

if TYPE_CHECKING:
    from shoal.systems.baselines.adpsgd import Bound

_TICK_S = 1e-6

CLOSED = -1
"""In the place of a number: the peer has ended, and the exchange has not taken place."""


@message(checked=True)
class Offer:
    """An active peer's model, for exchange `number` with this neighbour."""

    number: int
    payload: Packed


@message(checked=True)
class Answer:
    """The passive peer's model as it was before that exchange."""

    number: int
    payload: Packed


@message
class Done:
    """An active peer has no exchange open any more."""


def displacement(
    params: Vector, shard: Shard, key: Key, task: Task, optimizer: SGD, steps: int, batch_size: int
) -> Vector:
    """By how much local steps move parameters [..., dim]; 0 where the result is not finite."""
    active = torch.ones(params.shape[:-1], dtype=torch.bool, device=params.device)
    step = Step(0, task, shard, key, active)
    state = optimizer.init(params)
    moved, _ = descend(task, optimizer, params, state, step, steps=steps, batch_size=batch_size)
    moved = moved - params
    return torch.where(moved.isfinite().all(-1, keepdim=True), moved, 0.0)


class Node:
    """What one peer keeps, and what it does."""

    def __init__(self, bound: Bound, peer: Peer) -> None:
        workload = bound.workload
        self.bound, self.peer, self.workload = bound, peer, workload
        self.shard = workload.task.shard(peer.id)
        stored = peer.store.get("params")
        if stored is None:
            peer.record("fresh", 1)
        self.params = workload.start(peer.id) if stored is None else workload.there(stored)
        self.codec = workload.transform.init(self.params)
        self.active = peer.id in bound.active
        self.numbers: dict[int, int] = {}
        self.pending: dict[int, Offer] = {}
        self.answers: dict[int, Answer] = {}
        for other in peer.roster:
            self._remember(other)
        self.closed, self.asked_s = False, 0.0
        self.exchanging: TaskHandle | None = None

    def _remember(self, other: PeerId) -> None:
        pending, answer = (self.peer.store.get(f"{what} {other}") for what in ("offer", "answer"))
        if answer is not None:
            self.answers[other] = answer
        if pending is not None:
            self.numbers[other] = pending.number + 1
            if pending.number > self._settled(other):
                self.pending[other] = pending

    def _settled(self, other: PeerId) -> int:
        settled = self.peer.store.get(f"settled {other}")
        return -1 if settled is None else int.from_bytes(settled, "little")

    # Learning.

    async def learn(self, group: TaskGroup) -> None:
        """An update per period; what has been exchanged meanwhile stays."""
        peer, bound, period_s = self.peer, self.bound, self.bound.settings.period_s
        # A random phase keeps periods from marching in step; it is a draw, so it is repeatable.
        start = period_s * peer.uniform("phase")
        turn = max(0, int(peer.now() / period_s))
        while start + turn * period_s < bound.end_s:
            await peer.sleep_until(start + turn * period_s)
            # Who could not keep up leaves out the turns that it has missed.
            turn = max(turn, int((peer.now() - start) / period_s))
            if peer.now() >= bound.end_s:
                break
            peer.enter_round(turn)
            if self.active and (self.exchanging is None or self.exchanging.done):
                self.exchanging = group.start(self._exchange_one(turn))
            moved = await peer.compute(
                displacement, self.params, self.shard, self.workload.there(peer.key("turn", turn)),
                static=bound.static, cost=bound.cost,
            )  # fmt: skip
            self.params = self.params + moved
            if (turn + 1) % self.workload.report_every == 0:
                peer.record("params", self.params)
            await peer.store.commit({"params": self.params})
            turn += 1

    async def finish(self) -> None:
        """Settle what is open, or answer until nobody asks any more."""
        peer, patience_s = self.peer, self.bound.settings.patience_s
        opposite = [other for other in peer.neighbors if self._opposite(other)]
        if self.active:
            if self.exchanging is not None:
                await self.exchanging.join()
            for other in list(self.pending):
                await self._settle(PeerId(other), patience_s)
            for other in opposite:
                await peer.send(other, Done())
        else:
            asking, self.asked_s = set(opposite), peer.now()
            while asking and self.asked_s + patience_s - peer.now() > _TICK_S:
                done = await peer.recv(Done, deadline=self.asked_s + patience_s)
                if done is not None:
                    asking.discard(done.source)
        self.closed = True
        peer.record("params", self.params)

    def _opposite(self, other: PeerId) -> bool:
        return (other in self.bound.active) != self.active

    # Averaging.

    async def _exchange_one(self, turn: int) -> None:
        options = [other for other in self.peer.neighbors if self._opposite(other)]
        if not options:
            return
        other, settings = self.peer.choice(options, "partner", turn), self.bound.settings
        # Who was silent the last time is asked once, so that the dead cost little.
        again = other in self.pending
        await self._settle(other, settings.retry_s if again else settings.patience_s)

    async def _settle(self, other: PeerId, patience_s: float) -> None:
        """Offer to a neighbour, or offer again what is open with it, until it answers."""
        peer, retry_s = self.peer, self.bound.settings.retry_s
        offer = self.pending.get(other)
        if offer is None:
            number = self.numbers.get(other, 0)
            offer = Offer(number, self._packed(other, number))
            self.numbers[other] = number + 1
            self.pending[other] = offer
            await peer.store.commit({f"offer {other}": offer})
        give_up_s = peer.now() + patience_s
        while give_up_s - peer.now() > _TICK_S:
            ask_s = min(peer.now() + retry_s, give_up_s)
            try:
                answer = await peer.request(other, offer, deadline=ask_s)
            except PeerError:
                # Nobody may be there to say so at once; the pause is the same.
                await peer.sleep_until(ask_s)
                continue
            theirs = self._read(answer)
            if answer.number == CLOSED or theirs is not None:
                await self._conclude(other, offer, answer, theirs)
                return

    async def _conclude(
        self, other: PeerId, offer: Offer, answer: Answer, theirs: Vector | None
    ) -> None:
        """The active end: half of the difference of what both have told."""
        del self.pending[other]
        mine = self._read(offer)
        counts = False
        if theirs is not None and mine is not None and answer.number == offer.number:
            self.params = self.params + 0.5 * (theirs - mine)
            counts = True
        # A peer that has lost its memory goes on behind what the other end remembers.
        self.numbers[other] = max(self.numbers[other], answer.number + 1)
        settled = offer.number.to_bytes(8, "little")
        await self.peer.store.commit({"params": self.params, f"settled {other}": settled})
        if counts:
            self.peer.record("averaged", offer.number, other=str(other))

    async def answer(self, envelope: Envelope[Offer]) -> Answer:
        """The passive end: one assignment, so that nothing can come between; then it is kept."""
        offer, source = envelope.message, envelope.source
        self.asked_s = self.peer.now()
        known = self.answers.get(source)
        if known is not None and offer.number <= known.number:
            return known
        theirs = self._read(offer)
        if theirs is None:
            raise WireError(f"offer {offer.number} was damaged on its way")
        if self.closed or self.active:
            return Answer(CLOSED, Packed(b""))
        answer = Answer(offer.number, self._packed(source, offer.number))
        mine = self._read(answer)
        assert mine is not None
        self.params = self.params + 0.5 * (theirs - mine)
        self.answers[source] = answer
        await self.peer.store.commit({"params": self.params, f"answer {source}": answer})
        self.peer.record("averaged", offer.number, other=str(source))
        return answer

    def _packed(self, other: int, number: int) -> Packed:
        key = self.workload.there(self.peer.key("encode", other, number))
        payload, self.codec = self.workload.transform.encode(self.params, self.codec, key)
        return Packed(payload)

    def _read(self, told: Offer | Answer) -> Vector | None:
        """The vector that both ends take it for; None when it was damaged, or is none."""
        content, transform = told.payload.content, self.workload.transform
        if told.number == CLOSED:
            return None
        try:
            if isinstance(content, bytes | bytearray | memoryview):
                content = self.workload.there(transform.unpack(content))
            vector: Tensor = transform.decode(content)  # type: ignore[arg-type]
        except WireError:
            return None
        fits = vector.shape == self.params.shape and bool(vector.isfinite().all())
        return vector.to(self.params.dtype) if fits else None
