"""What a peer's program holds of its group: joint calls, all-reduce, shared state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import PeerError, WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Envelope, Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.collective._errors import (
    ConnectionLost,
    Diverged,
    Evicted,
    MasterLost,
    Mismatch,
    PendingOperations,
    RevisionViolation,
    SyncFailed,
    TooFewPeers,
)
from shoal.parts.collective._wire import (
    ABORTED,
    COMMITTED,
    DIVERGED,
    DONE,
    FAILED,
    FEW,
    INITIATE,
    STARTED,
    Ruling,
    Status,
    Vote,
    Word,
)
from shoal.parts.collective.direct import Share, exchange, fits
from shoal.parts.collective.quantised import Quantised
from shoal.parts.collective.ring import Piece, Progress, Ring
from shoal.parts.collective.shared_state import (
    Plan,
    SharedState,
    digest,
    encode_offer,
    read_dissenters,
    read_plan,
)
from shoal.wire.message import message

T = TypeVar("T")
_AT_ONCE = 4
_PROBE_BYTES = 1 << 13
_PROBE_S = 0.05


@message
class Fetch:
    """Please send `count` elements of a tensor of the state that is being synchronised."""

    revision: int
    name: str
    start: int
    count: int


@message
class Content:
    """The answer to `Fetch`, and to `Probe` with an empty tensor."""

    values: Tensor


@message
class Probe:
    """So many bytes, to see how long they take."""

    values: Tensor


@dataclass
class _Operation:
    """An all-reduce of this peer that has not ended."""

    label: int
    serial: int
    signature: str
    after: int = 0
    epoch: int = 0
    loud: bool = True
    """whether the master hears of it; not while it is done without a word of the master"""
    phase: int = INITIATE
    word: Word | None = None
    progress: Progress = field(default_factory=Progress)
    result: list[tuple[int, Tensor]] = field(default_factory=list)

    def vote(self) -> Vote:
        number = self.word.operation if self.word is not None else 0
        count = self.progress
        return Vote(
            self.label, self.serial, self.phase, self.signature, number, count.sent,
            count.received, count.stalled, self.after, self.epoch,
        )  # fmt: skip


class Communicator:
    """A peer's membership in a group: `async with Communicator(peer, master) as group`.

    master: the peer that runs `Master`; group: collectives, shared state and the order of the ring
    stay within peers of equal number; other joint calls are of all groups. ring: pieces, checksums
    and patience of reductions. heartbeat_s: how often this peer reports; master_timeout_s: silence
    of the master after which every call raises MasterLost.

    All accepted peers must make the same joint calls in the same order, and none while one of its
    operations runs. Peers of a group start operations of equal tags in equal order. A failed
    operation leaves every tensor as it was; see `_errors` for what can be raised.

    Assumes that messages between two peers arrive in the long run or their link is broken for both;
    tensors must not be written while an operation on them runs.
    """

    def __init__(
        self, peer: Peer, master: PeerId, *, group: int = 0, ring: Ring | None = None,
        heartbeat_s: float = 0.1, master_timeout_s: float = 5.0, fetch_s: float = 5.0,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.master = master
        self.group = group
        self.ring: tuple[int, ...] = ()
        """the group's peers in the order of the ring"""
        self.everybody = 0
        """accepted peers of all groups"""
        self.epoch = 0
        self.committed = 0
        """the master's number of the last reduction that succeeded here; equal for all in it"""
        self.payload_bytes = 0
        """bytes of tensors that this peer sent in reductions, without headers"""
        self.rates: dict[int, float] = {}
        """bit/s to each other peer, as `optimize_topology` measured it"""
        self._settings = ring or Ring()
        self._heartbeat_s = heartbeat_s
        self._master_timeout_s = master_timeout_s
        self._fetch_s = fetch_s
        self._session = 0
        self._number = 0
        self._heard = 0
        self._known = False
        self._lost: Exception | None = None
        self._turn = 0
        self._call_name = ""
        self._detail = b""
        self._answer: tuple[int, str, bytes] = (0, "", b"")
        self._operations: dict[int, _Operation] = {}
        self._serials: dict[int, int] = {}
        self._latest = 0
        self._last: dict[int, Word] = {}
        self._indirect = -1
        self._waiting: list[TaskHandle] = []
        self._offered: SharedState | None = None
        self._tasks: TaskGroup = peer.tasks()

    # Life.

    async def __aenter__(self) -> Communicator:
        await self._tasks.__aenter__()
        now = self.peer.now()
        # Larger than those of earlier incarnations, whose clock showed less.
        self._session = int(now * 1e6) + 1
        self.peer.serve(Fetch, self._give)
        self.peer.serve(Probe, self._probed)
        self._own = [self._tasks.start(self._listen()), self._tasks.start(self._beat())]
        try:
            await self._until(lambda: self._known or None)
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if isinstance(error, GeneratorExit):
            return  # A crash: nobody would hear a goodbye.
        try:
            await self._speak(leaving=True)
        finally:
            for handle in self._own:
                handle.cancel()
            await self._tasks.__aexit__(kind, error, trace)

    @property
    def world_size(self) -> int:
        """Accepted peers of this group."""
        return len(self.ring)

    @property
    def rank(self) -> int:
        """This peer's place in the ring, -1 before it is accepted."""
        return self.ring.index(self.peer.id) if self.peer.id in self.ring else -1

    # Joint calls.

    async def update_topology(self) -> None:
        """Let the peers in that wait; returns when all accepted peers have called it."""
        await self._call("update_topology")

    async def are_peers_pending(self) -> bool:
        """Whether somebody waits to be let in; the same answer for all."""
        return (await self._call("peers_pending")) == b"\x01"

    async def optimize_topology(self, probe_bytes: int = 1 << 20) -> None:
        """Measure what every directed link of each group carries, and order its ring by it.

        Of more than 12 peers the order is the best that is found at once; the master looks for a
        better one afterwards, which the next call adopts if nobody came or went meanwhile.
        """
        largest = int.from_bytes(await self._call("measure"), "little")
        ring = self.ring
        rates = []
        for step in range(1, largest):
            # Everybody probes another distance at a time and waits for the slowest, so that no
            # link is measured while its ends are busy with others. In a smaller group there may be
            # nothing left to probe, and whoever was lost leaves no group with fewer steps.
            if step < len(ring):
                target = PeerId(ring[(ring.index(self.peer.id) + step) % len(ring)])
                rates.append((float(target), await self._rate(target, probe_bytes)))
            await self._call("measure")
        self.rates = {int(target): rate for target, rate in rates}
        await self._call("measured", np.array(rates, np.float64).tobytes())

    async def sync_shared_state(
        self, state: SharedState, strategy: str = "enforce_popular"
    ) -> None:
        """Make `state` equal in the whole group, by popularity; see `SharedState`, `Election`.

        strategy: "enforce_popular", "send_only" (keeps its own content) or "receive_only" (has no
        vote). Either everybody has all of it, or SyncFailed is raised and nothing has changed.
        """
        self._offered = state
        try:
            plan = read_plan(await self._call("sync", encode_offer(state.offer(strategy))))
            fetched: dict[str, Tensor] = {}
            whole = True
            try:
                for name, expected in plan.fetch:
                    fetched[name] = await self._fetch(state, plan, name, expected)
            except (PeerError, WireError):
                whole = False
            await self._call("synced", b"ok" if whole else b"failed")
        finally:
            self._offered = None
        for name, values in fetched.items():
            state.tensors[name].copy_(values.view_as(state.tensors[name]))
        state.revision = plan.revision

    async def _call(self, name: str, detail: bytes = b"") -> bytes:
        if self._operations or self._call_name:
            what = self._call_name or f"operations of tags {sorted(self._operations)}"
            raise PendingOperations(f"{name}: {what} still in flight (await it first)")
        if name != "update_topology":
            self._need_a_place(name)
        self._turn += 1
        self._call_name, self._detail = name, detail
        try:
            await self._speak()
            turn = self._turn
            answer, found = await self._until(
                lambda: self._answer[1:] if self._answer[0] == turn else None
            )
        finally:
            self._call_name, self._detail = "", b""
        if answer == "ok":
            return found
        if answer == "diverged":
            raise Diverged(f"{name}: other peers wait for something else (call in equal order)")
        if answer == "mismatch":
            who = read_dissenters(found)
            raise Mismatch(
                f"{name}: {_named(who)} other names, dtypes or shapes than the rest offers (offer "
                "the same)", who,
            )  # fmt: skip
        if answer == "revision":
            raise RevisionViolation(f"{name}: the revision is not the last agreed one plus one")
        raise SyncFailed(f"{name}: not every peer could fetch the state (update, and try again)")

    def _need_a_place(self, name: str) -> None:
        # The master waits for the votes of those whom it let in, so this one would wait for good.
        if self.rank < 0 and self._lost is None:
            raise TooFewPeers(f"{name}: this peer is not in the group (call update_topology first)")

    # All-reduce.

    async def all_reduce(
        self, values: Tensor, op: str = "sum", *, tag: int = 0, quantise: Quantised | None = None
    ) -> None:
        """Replace `values` (contiguous, on the CPU) by the group's reduction, equal bits for all.

        Tags tell operations apart that run at once. ConnectionLost: a participant is gone, and
        `values` is as it was, here and at every other survivor.
        """
        ring = replace(self._settings, op=op, quantise=quantise)
        ring.check(values)
        self._need_a_place("all_reduce")
        if self._call_name:
            raise PendingOperations(f"all_reduce: {self._call_name} is in flight (await it first)")
        if tag in self._operations:
            raise PendingOperations(f"all_reduce: tag={tag} is in flight (give each its own tag)")
        serial = self._serials[tag] = self._serials.get(tag, 0) + 1
        kind = (
            f"{op} {values.dtype} {values.numel()} {quantise} {ring.piece_bytes} {ring.few} "
            f"{ring.checked}"
        )
        own = self._operations[tag] = _Operation(tag, serial, kind)
        flat = values.view(-1)
        try:
            word = await self._without_master(own, ring, flat)
            if word is None:
                await self._speak()
                word = await self._until(lambda: own.word)
            if word.state == STARTED:
                work = self._tasks.start(self._reduce(own, word, ring, flat), isolate=True)
                try:
                    word = await self._until(lambda: _ended(own.word))
                finally:
                    work.cancel()
            if word.state == COMMITTED:
                await self._write(flat, own.result)
                self.committed = word.operation
            self._last[tag] = word
        finally:
            self._forget(own)
        self.payload_bytes += own.progress.payload_bytes
        if word.state == ABORTED:
            raise ConnectionLost(f"all_reduce: tag={tag} lost a peer and was undone (try again)")
        if word.state == FEW:
            raise TooFewPeers(f"all_reduce: {self.world_size} peers; need 2 (wait for others)")
        if word.state == DIVERGED:
            raise Diverged(f"all_reduce: tag={tag}: other peers wait for something else")
        if word.state != COMMITTED:
            who = tuple(peer for peer, _ in word.differ)
            want = "; ".join(f"peer {peer} calls {other!r}" for peer, other in word.differ)
            raise Mismatch(f"all_reduce: tag={tag}: {want}; this one {kind!r} (call equally)", who)

    async def all_reduce_with_retry(
        self, values: Tensor, op: str = "sum", *, tag: int = 0, quantise: Quantised | None = None
    ) -> None:
        """`all_reduce` on whoever is left, until it succeeds or fewer than two peers are left."""
        while True:
            try:
                return await self.all_reduce(values, op, tag=tag, quantise=quantise)
            except ConnectionLost:
                continue

    async def all_reduce_multiple_with_retry(
        self, tensors: list[Tensor], op: str = "sum", *, max_in_flight: int = 4,
        quantise: Quantised | None = None,
    ) -> None:  # fmt: skip
        """Several at once, tagged by their places in the list."""

        async def lane(first: int) -> None:
            for place in range(first, len(tensors), max_in_flight):
                await self.all_reduce_with_retry(tensors[place], op, tag=place, quantise=quantise)

        async with self.peer.tasks() as group:
            for first in range(min(max_in_flight, len(tensors))):
                group.start(lane(first))

    def all_reduce_async(
        self, values: Tensor, op: str = "sum", *, tag: int = 0, quantise: Quantised | None = None
    ) -> TaskHandle:
        """Begin `all_reduce`; `await handle.join()` gives its outcome."""
        return self._tasks.start(
            self.all_reduce(values, op, tag=tag, quantise=quantise), isolate=True
        )

    async def _without_master(self, own: _Operation, ring: Ring, flat: Tensor) -> Word | None:
        """Exchange a small tensor with all others before anything is agreed: who calls the same
        operation after the same one, in the same ring, means the same by it. The master hears of it
        when it is done, and nobody has it unless all have. What it says instead, or None where this
        is not possible."""
        last = self._last.get(own.label)
        if not (
            last is not None
            and last.state == COMMITTED
            and last.epoch == self.epoch != self._indirect
            and len(self.ring) > 1
            and fits(flat, ring)
        ):
            return None
        own.after, own.epoch, own.loud = last.operation, self.epoch, False
        work = self._tasks.start(self._share(own, ring, flat), isolate=True)
        try:
            word = await self._until(lambda: own.word)
        finally:
            work.cancel()
        if word.state != COMMITTED:
            for step in range(2):
                # Closes the tag, for what may still come.
                await self.peer.gather(Share, tag=(own.after, step), count=1, deadline=0.0)
            if own.epoch == self.epoch:
                # Some pair of peers is slow or broken. All see this word, and know it from now on.
                self._indirect = self.epoch
            own.after, own.epoch, own.phase, own.result = 0, 0, INITIATE, []
            own.progress = Progress(payload_bytes=own.progress.payload_bytes)
        return word

    async def _share(self, own: _Operation, ring: Ring, flat: Tensor) -> None:
        try:
            own.result = await exchange(
                ring, self.peer, own.after, self.ring, flat, own.progress,
                self.peer.now() + ring.stall_s,
            )  # fmt: skip
            own.phase = DONE
        except WireError:
            pass  # Without a result this is a vote to begin.
        own.loud = True
        await self._speak()

    async def _write(self, flat: Tensor, result: list[tuple[int, Tensor]]) -> None:
        """The result over the input. A long one in parts: this peer's reports must not be late."""
        rest = iter(result)
        try:
            for part, (start, piece) in enumerate(rest, 1):
                flat[start : start + piece.numel()] = piece
                if not part % _AT_ONCE and len(result) > _AT_ONCE:
                    await self.peer.sleep_until(self.peer.now() + 1e-6)
        finally:
            # Cancelled or not: it is committed.
            for start, piece in rest:
                flat[start : start + piece.numel()] = piece

    async def _reduce(self, own: _Operation, word: Word, ring: Ring, flat: Tensor) -> None:
        try:
            own.result = await ring.reduce(
                self.peer, word.operation, word.ring, flat, own.progress,
                lambda: self._tell_soon(),
            )  # fmt: skip
            own.phase = DONE
        except WireError:
            own.phase = FAILED
        await self._speak()

    def _forget(self, own: _Operation) -> None:
        del self._operations[own.label]
        running = [o.word.operation for o in self._operations.values() if o.word is not None]
        self.peer.discard(Piece, before=(min([*filter(None, running), self._latest + 1]), 0))

    # Words with the master.

    def _tell_soon(self) -> None:
        self._tasks.start(self._speak(), isolate=True)

    async def _speak(self, leaving: bool = False) -> None:
        self._number += 1
        votes = tuple(own.vote() for own in self._operations.values() if own.loud)
        status = Status(
            self._session, self._number, self.group, self._call_name, self._turn, self._detail,
            votes, leaving,
        )  # fmt: skip
        await self.peer.send(self.master, status)

    async def _beat(self) -> None:
        while self._lost is None:
            await self._speak()
            await self.peer.sleep_until(self.peer.now() + self._heartbeat_s)

    async def _listen(self) -> None:
        heard_s = self.peer.now()
        while True:
            # A damaged word is none: a link that damages all of them is as good as cut.
            deadline = heard_s + self._master_timeout_s
            envelope = await self.peer.recv(Ruling, source=self.master, deadline=deadline)
            if envelope is None:
                self._fail(MasterLost(f"no word from peer {self.master} (connect anew)"))
                return
            ruling = envelope.message
            heard_s = self.peer.now()
            if ruling.session != self._session or 0 < ruling.number <= self._heard:
                continue
            if not ruling.known:
                self._fail(Evicted("the master holds this peer for dead (connect anew)"))
                return
            self._heard = ruling.number
            self._take(ruling)

    def _take(self, ruling: Ruling) -> None:
        self._known = True
        if self._indirect == self.epoch and set(ruling.ring) == set(self.ring):
            # The same peers in another order: what a pair of them cannot do it still cannot.
            self._indirect = ruling.epoch
        self.ring, self.everybody, self.epoch = ruling.ring, ruling.world, ruling.epoch
        self._answer = (ruling.turn, ruling.answer, ruling.detail)
        for own in self._operations.values():
            if not own.loud and own.epoch != self.epoch:
                own.loud = True
                self._tell_soon()
        for word in ruling.words:
            own = self._operations.get(word.label)
            if own is not None and own.serial == word.serial:
                own.word = word
                self._latest = max(self._latest, word.operation)
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._lost = error
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for handle in waiting:
            handle.cancel()

    async def _until(self, found: Callable[[], T | None]) -> T:
        """What `found` returns, once that is not None; looked at after every word."""
        while True:
            if self._lost is not None:
                raise self._lost
            value = found()
            if value is not None:
                return value
            handle = self._tasks.start(self.peer.sleep_until(self.peer.now() + 3600.0))
            self._waiting.append(handle)
            try:
                await handle.join()
            finally:
                handle.cancel()

    # Between peers.

    async def _fetch(self, state: SharedState, plan: Plan, name: str, expected: bytes) -> Tensor:
        own = state.tensors[name]
        out = torch.empty(own.numel(), dtype=own.dtype, device=own.device)
        size = self._settings.piece_size(own.element_size())

        async def lane(first: int) -> None:
            for start in range(first * size, own.numel(), _AT_ONCE * size):
                count = min(size, own.numel() - start)
                content: Any = await self.peer.request(
                    PeerId(plan.source), Fetch(plan.revision, name, start, count),
                    deadline=self.peer.now() + self._fetch_s,
                )  # fmt: skip
                if content.values.dtype != own.dtype or content.values.shape != (count,):
                    raise WireError(f"sync: peer {plan.source} sent another shape of {name!r}")
                out[start : start + count] = content.values

        async with self.peer.tasks() as group:
            for first in range(_AT_ONCE):
                group.start(lane(first))
        if expected and digest(out) != expected:
            raise WireError(f"sync: {name!r} of peer {plan.source} is not what was agreed")
        return out

    async def _give(self, envelope: Envelope[Fetch]) -> Content:
        asked, state = envelope.message, self._offered
        if state is None or state.revision != asked.revision or asked.name not in state.tensors:
            raise SyncFailed(f"no {asked.name!r} of revision {asked.revision} here")
        flat = state.tensors[asked.name].view(-1)
        return Content(flat[asked.start : asked.start + asked.count].clone())

    async def _probed(self, envelope: Envelope[Probe]) -> Content:
        return Content(torch.tensor([self.peer.now()], dtype=torch.float64, device="cpu"))

    async def _rate(self, target: PeerId, most: int) -> float:
        """Bit/s to a peer; 0 = no answer. Probes grow until one takes long enough to be timed: on a
        slow link a long one would hold up this peer's reports."""
        size = min(_PROBE_BYTES, most)
        while True:
            took_s = await self._transfer_s(target, size)
            if size >= most or not took_s < _PROBE_S:
                return 8.0 * size / max(took_s, 1e-9)
            size = min(2 * size, most)

    async def _transfer_s(self, target: PeerId, size: int) -> float:
        """How long after an empty message one right behind it came; infinity without an answer."""
        deadline = self.peer.now() + self._fetch_s
        loads = [torch.zeros(count, dtype=torch.uint8, device="cpu") for count in (0, size)]
        asked: list[TaskHandle] = []
        try:
            async with self.peer.tasks() as group:
                asked += [
                    group.start(self.peer.request(target, Probe(load), deadline=deadline))
                    for load in loads
                ]
        except PeerError:
            return float("inf")
        first, last = (float(each.result().values[0]) for each in asked)
        return last - first


def _named(peers: tuple[int, ...]) -> str:
    return f"peer {peers[0]} has" if len(peers) == 1 else f"peers {peers} have"


def _ended(word: Word | None) -> Word | None:
    return word if word is not None and word.state != STARTED else None
