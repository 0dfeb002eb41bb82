"""One peer of DADAO: its events in the order of their dates, exchanges with one other at a time.

Both ends of an edge know when its clock rings, so neither asks the other: at the event each sends
what it has, and applies the difference once it has the other's. An event that one has reached and
the other has not is waited for. Dates order all events, so peers cannot wait for each other in a
circle; and messages that are late change when things happen, not what is computed.

What is lost is asked for again. A peer that stays silent for too long is passed over from then on,
until it is heard; half an exchange that comes after that is still applied, carried by the flow from
its date to now, so that the two ends stay each other's opposite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.base.errors import Leaving, WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Envelope, Peer
from shoal.rounds.method import freeze, thaw
from shoal.rounds.task import Shard, Task
from shoal.systems.training._dadao_flow import Y_FAST, Z_FAST, Constants, X, Y, Z, flow
from shoal.systems.training._dadao_loop import GRADIENT, agenda
from shoal.tensor.types import Key, Vector
from shoal.wire.message import Packed, message

if TYPE_CHECKING:
    from shoal.systems.training.dadao import Bound

FINISHED, LEAVING = -1, -2
"""In the place of a number: all events are done; the peer goes."""

_REMEMBERED = 64
"""Exchanges per neighbour that are kept open after it was given up."""
_TICK_S = 1e-6
_WHOLE = 1 << 30


@message(checked=True)
class Half:
    """One end of exchange `number` of an edge. again: the other end's is missing, tell it again."""

    number: int
    again: bool
    payload: Packed


@message
class Progress:
    """Where a peer's life stands: how many of its events are done, and the date of its state."""

    place: int
    date: float


def spike(
    state: Tensor, move: Tensor, shard: Shard, key: Key, task: Task, constants: Constants,
    batch_size: int | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A gradient event: the state [..., 6, dim] carried by the flow [..., 6, 6], then the jump.

    batch_size: of a drawn batch, None = all samples; dtype: of the task's parameters.
    """
    state = move @ state
    x = state[..., X, :]
    point = x.to(dtype)
    if batch_size is not None:
        batches = [task.batch(shard, key, batch_size)]
    else:
        batches = list(task.epoch(shard, key, _WHOLE))
    change = -constants.nu * x - state[..., Y_FAST, :]
    for batch in batches:
        change = change + task.grad(point, batch).to(state.dtype)
    return state + _column(constants.gradient_jump(), state) * change.unsqueeze(-2)


def _column(jump: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(jump).to(like.device).unsqueeze(-1)


class Node:
    """What one peer keeps, and what it does."""

    def __init__(self, bound: Bound, peer: Peer) -> None:
        workload = bound.workload
        self.bound, self.peer, self.workload = bound, peer, workload
        self.shard = workload.task.shard(peer.id)
        start = workload.start(peer.id)
        self.dtype = start.dtype
        self.state = start.new_zeros((6, start.shape[-1]), dtype=torch.float64)
        self.state[X] = start.to(torch.float64)
        self.mean, self.gradients = self.state[X], 0
        self.codec = workload.transform.init(start)
        self.date, self.place, self.mark = 0.0, 0, 0
        self.generator = bound.constants.generator()
        self.gossip_jump = _column(bound.constants.gossip_jump(), self.state)
        own = agenda(
            workload.seed, bound.rates, bound.until, bound.settings.gradient_rates, peer.id
        )
        self.events: list[tuple[float, int, int]] = []
        """(date, the other peer or GRADIENT, the exchange's number on its edge)"""
        counts: dict[int, int] = {}
        for date, a, b in zip(
            own.dates.tolist(), own.first.tolist(), own.second.tolist(), strict=True
        ):
            other = b if b == GRADIENT else a + b - peer.id
            number = counts.get(other, 0)
            counts[other] = number + 1
            self.events.append((date, other, number))
        ends = [(int(a), int(b)) for a, b in bound.rates.edges]
        self.neighbors = {a + b - peer.id for a, b in ends if peer.id in (a, b)}
        self.passed = dict.fromkeys(self.neighbors, -1)
        self.kept: dict[int, dict[int, Half]] = {other: {} for other in self.neighbors}
        self.early: dict[tuple[int, int], Vector] = {}
        self.doubts: dict[tuple[int, int], tuple[Vector, float]] = {}
        self.silent: set[int] = set()
        self.finished: set[int] = set()
        self.unsure: set[int] = set()

    async def live(self) -> None:
        """All events, then wait for those who still need something."""
        self._remember()
        while self.place < len(self.events):
            date, other, number = self.events[self.place]
            await self._marks(date)
            if self.peer.now() >= self.bound.end_s:
                break
            await self._listen(date * self.bound.unit_s)
            if other == GRADIENT:
                await self._gradient(date)
            else:
                await self._exchange(date, other, number)
            self.place += 1
            await self._commit(other)
        await self._marks(self.bound.until)
        self._record(self.bound.until)
        await self.say(FINISHED)
        await self._linger()
        self._record_sums()

    # Memory.

    def _remember(self) -> None:
        """Go on from what an earlier life committed, or begin where the run is by now."""
        progress = self.peer.store.get("progress")
        if progress is not None:
            self.state, self.codec = thaw((self.state, self.codec), self.peer.store.get)
            self.place, self.date = progress.place, progress.date
            self.unsure = set(self.neighbors)
            for other in self.neighbors:
                half = self.peer.store.get(f"half {other}")
                if half is not None:
                    self.kept[other][half.number] = half
        else:
            self.peer.record("fresh", 1)
            if self.peer.now() > self.bound.patience_s:
                now = self.peer.now() / self.bound.unit_s
                self.place = sum(date < now for date, _, _ in self.events)
        for _, other, number in self.events[: self.place]:
            if other != GRADIENT:
                self.passed[other] = number
        self.mark = int(self.events[self.place - 1][0]) + 1 if self.place else 0

    async def _commit(self, other: int) -> None:
        items = {"progress": Progress(self.place, self.date), **freeze((self.state, self.codec))}
        if other != GRADIENT and self.kept[other]:
            items[f"half {other}"] = self.kept[other][max(self.kept[other])]
        await self.peer.store.commit(items)

    # Time.

    async def _marks(self, date: float) -> None:
        """Whole units of time up to a date: rounds, for reports and faults."""
        while self.mark <= date and self.mark < self.bound.until:
            await self._listen(self.mark * self.bound.unit_s)
            if self.mark and self.mark % self.workload.report_every == 0:
                self._record(float(self.mark))
            self.peer.enter_round(self.mark)
            self.mark += 1

    def _record(self, date: float) -> None:
        """Report x, or with drawn batches its mean over the gradients, as it is at this date."""
        x = self.mean
        if self.bound.settings.batch_size is None:
            x = self._moved(max(date, self.date))[X]
        self.peer.record("params", x.to(self.dtype))

    def _record_sums(self) -> None:
        """What must be 0 over all peers, once nobody misses a half, and the size of its parts."""
        state = self._moved(max(self.bound.until, self.date))
        self.peer.record("dual_sum", float(state[Z].sum()))
        self.peer.record("fast_dual_sum", float(state[Z_FAST].sum()))
        self.peer.record("dual_size", float(state[Y : Z_FAST + 1].abs().sum()))

    def _moved(self, date: float) -> Tensor:
        return self._flow(date - self.date) @ self.state

    def _flow(self, elapsed: float) -> Tensor:
        return torch.from_numpy(flow(self.generator, elapsed)).to(self.state.device)

    async def _listen(self, until_s: float) -> None:
        """Wait, and take what has come and comes meanwhile."""
        while (envelope := await self.peer.recv(Half, deadline=until_s)) is not None:
            await self._take(envelope)

    # Events.

    async def _gradient(self, date: float) -> None:
        bound, peer = self.bound, self.peer
        key = self.workload.there(peer.key("gradient", self.place))
        self.state = await peer.compute(
            spike, self.state, self._flow(date - self.date), self.shard, key,
            static=(self.workload.task, bound.constants, bound.settings.batch_size, self.dtype),
            cost=bound.cost,
        )  # fmt: skip
        self.date = date
        self.gradients += 1
        self.mean = self.mean + (self.state[X] - self.mean) / self.gradients

    async def _exchange(self, date: float, other: int, number: int) -> None:
        self.state, self.date = self._moved(date), date
        half, mine = self._encoded(other, number)
        kept = self.kept[other]
        kept[number] = half
        for old in [n for n in kept if n < number - 1 and (other, n) not in self.doubts]:
            del kept[old]
        await self.peer.send(PeerId(other), half)
        theirs = await self._other_half(other, number, half)
        self.passed[other] = number
        if theirs is not None:
            self._apply(other, number, mine - theirs, 0.0)
            return
        self.silent.add(other)
        self.doubts[other, number] = (mine, date)
        for key in [key for key in self.doubts if key[0] == other][:-_REMEMBERED]:
            del self.doubts[key]

    def _encoded(self, other: int, number: int) -> tuple[Half, Vector]:
        """y + z as it is sent, and as the other end reads it: both ends use the same numbers."""
        transform, there = self.workload.transform, self.workload.there
        key = there(self.peer.key("gossip", other, number))
        told = (self.state[Y] + self.state[Z]).to(self.dtype)
        payload, self.codec = transform.encode(told, self.codec, key)
        again = other in self.unsure
        self.unsure.discard(other)
        half = Half(number, again, Packed(payload))
        return half, transform.decode(payload).to(torch.float64)

    async def _other_half(self, other: int, number: int, half: Half) -> Vector | None:
        """The other end's vector; None when it was silent for too long."""
        peer, bound = self.peer, self.bound
        give_up_s = peer.now() + (0.0 if other in self.silent else bound.patience_s)
        ask_s = peer.now() + bound.retry_s
        while (other, number) not in self.early:
            wait_s = min(ask_s, give_up_s)
            if wait_s - peer.now() > _TICK_S:
                envelope = await peer.recv(Half, deadline=wait_s)
                if envelope is not None:
                    await self._take(envelope)
            elif give_up_s - peer.now() <= _TICK_S:
                return None
            else:
                await self._again(other, half, asking=True)
                ask_s = peer.now() + bound.retry_s
            if other in self.silent:
                give_up_s = peer.now()
        return self.early.pop((other, number))

    def _apply(self, other: int, number: int, gap: Vector, elapsed: float) -> None:
        """The jump of an exchange that was `elapsed` ago, where it would be by now."""
        jump = self.gossip_jump * gap
        self.state = self.state + (self._flow(elapsed) @ jump if elapsed else jump)
        if self.bound.settings.audit:
            self.peer.record("exchanged", number, other=str(other))

    # Mail.

    async def _take(self, envelope: Envelope[Half]) -> None:
        half, source = envelope.message, int(envelope.source)
        if source not in self.neighbors:
            return
        if half.number < 0:
            (self.finished if half.number == FINISHED else self.silent).add(source)
            return
        theirs = self._read(half)
        if theirs is None:
            return
        self.silent.discard(source)
        number, kept = half.number, self.kept[source].get(half.number)
        if half.again and kept is not None:
            await self._again(source, kept, asking=False)
        doubt = self.doubts.pop((source, number), None)
        if doubt is not None:
            mine, date = doubt
            self._apply(source, number, mine - theirs, self.date - date)
        elif self.passed[source] < number <= self.passed[source] + _REMEMBERED:
            self.early[source, number] = theirs

    def _read(self, half: Half) -> Vector | None:
        """The vector of a half; None when it is none."""
        content, transform = half.payload.content, self.workload.transform
        try:
            if isinstance(content, bytes | bytearray | memoryview):
                content = self.workload.there(transform.unpack(content))
            vector = transform.decode(content)  # type: ignore[arg-type]
        except WireError:
            return None
        fits = vector.shape == self.state[X].shape and bool(vector.isfinite().all())
        return vector.to(torch.float64) if fits else None

    async def _again(self, other: int, half: Half, asking: bool) -> None:
        told = Half(half.number, asking, half.payload)
        await self.peer.send(PeerId(other), told)

    async def say(self, what: int) -> None:
        """Tell the neighbours that all is done, or not to wait for this peer."""
        for other in sorted(self.neighbors - self.silent):
            await self.peer.send(PeerId(other), Half(what, False, Packed(b"")))

    async def _linger(self) -> None:
        """Stay while somebody may still miss a half."""
        end_s = min(self.peer.now() + self.bound.patience_s, self.bound.end_s)
        while self.neighbors - self.silent - self.finished and end_s - self.peer.now() > _TICK_S:
            envelope = await self.peer.recv(Half, deadline=end_s)
            if envelope is not None:
                await self._take(envelope)


async def live(bound: Bound, peer: Peer) -> None:
    """The whole life of a peer."""
    node = Node(bound, peer)
    async with peer.tasks() as group:
        life = group.start(node.live())
        try:
            await life.join()
        except Leaving:
            life.cancel()
            await node.say(LEAVING)
