"""Ring all-reduce over messages: reduce-scatter, then all-gather, in pieces that overlap.

With n peers the tensor has n chunks, chunk r with one element more when r < size mod n. In step s,
of 2 (n - 1), the peer at place i receives chunk (i - s - 1) mod n from its predecessor. In the
first n - 1 steps it combines the chunk with its own and passes it on; then chunk (i + 1) mod n is
finished at place i, and the other n - 1 steps pass the finished chunks around. Chunk c is combined
in the order of the ring from place c on: ((x_c + x_c+1) + x_c+2) + ..., bit for bit.

A chunk travels in pieces, and a piece is passed on as soon as it is combined, so that all links are
busy at once. The tensor itself is only read: a reduction that comes to nothing leaves no trace.
Patarasuk and Yuan 2009 (doi 10.1016/j.jpdc.2008.09.002), section 3; bytes per peer:
2 (n - 1) / n of the tensor.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.base.errors import UsageError, WireError
from shoal.base.ids import PeerId
from shoal.base.limits import check_positive
from shoal.kernel.peer import Peer
from shoal.parts.collective.quantised import HEAD_BYTES, Quantised
from shoal.wire.frame import place
from shoal.wire.message import message
from shoal.wire.recycled import LEAST_BYTES

OPS = ("sum", "avg", "prod", "min", "max")


@message(tag=("operation", "place"))
class Piece:
    """One piece of a chunk. place: step * pieces per chunk + piece; check: CRC-32 or 0."""

    operation: int
    place: int
    values: Tensor
    check: int


def chunk_bounds(size: int, peers: int) -> list[int]:
    """Where each chunk begins, and the end: peers + 1 numbers.

    >>> chunk_bounds(10, 4)
    [0, 3, 6, 8, 10]
    """
    each, more = divmod(size, peers)
    return [r * each + min(r, more) for r in range(peers + 1)]


def combine(op: str, received: Tensor, own: Tensor) -> Tensor:
    """`received` op `own`, written into `received`."""
    if op in ("sum", "avg"):
        return received.add_(own)
    if op == "prod":
        return received.mul_(own)
    return torch.minimum(received, own, out=received) if op == "min" else torch.maximum(
        received, own, out=received
    )  # fmt: skip


@dataclass
class Progress:
    """How far a reduction has come at one peer: pieces sent and received, payload bytes sent.

    stalled: nothing came for longer than the ring's `stall_s`.
    """

    sent: int = 0
    received: int = 0
    payload_bytes: int = 0
    stalled: bool = False


@dataclass(frozen=True)
class Ring:
    """All-reduce settings. op: sum, avg (divides once, at the end), prod, min or max.

    piece_bytes: most bytes of a piece; of chunks that would have more than `few` of these, pieces
    are up to `few` times as long, as each costs a peer some work. ahead: how many pieces a peer
    sends of its own before it has received as many, so that mailboxes stay small. direct_bytes:
    tensors up to this size go through `direct` where a `Communicator` can. quantise: float32
    travels as one byte per number. checked: a CRC-32 on every piece, for links without a checksum
    of their own. stall_s, slow_bytes_per_s: `progress.stalled` is set when nothing came for
    `stall_s` and the time that a piece takes at that rate; once pieces came, for `stall_s` or eight
    times the longest pause between two of them, if that is less.

    Assumes that every peer calls `reduce` with the same operation number, order, size and dtype,
    and that the messages of a live link arrive; a lost piece stalls the ring until it is cancelled.
    Raises WireError for a piece that is not what the ring's settings demand.

    >>> Ring(op="avg").pieces(10, 4)
    1
    """

    op: str = "sum"
    piece_bytes: int = 1 << 20
    few: int = 4
    ahead: int = 8
    direct_bytes: int = 1 << 18
    quantise: Quantised | None = None
    checked: bool = False
    stall_s: float = 2.0
    slow_bytes_per_s: float = 1e5

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise UsageError(f"ring: op={self.op!r}; need one of {', '.join(OPS)}")
        check_positive("ring", self, "piece_bytes", "few", "ahead", "stall_s", "slow_bytes_per_s")
        if self.direct_bytes < 0:
            raise UsageError(f"ring: direct_bytes={self.direct_bytes}; need 0 or more")

    def check(self, values: Tensor) -> None:
        """UsageError for a tensor that this ring cannot reduce in place."""
        if not values.is_contiguous() or not values.is_cpu:
            raise UsageError(
                f"all_reduce: a tensor on {values.device} with strides {values.stride()}; need a "
                "contiguous CPU tensor (use .cpu() and .contiguous())"
            )
        if values.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise UsageError(f"all_reduce: dtype {values.dtype}; need integers or real numbers")
        if self.op == "avg" and not values.dtype.is_floating_point:
            raise UsageError(
                f"all_reduce: avg of {values.dtype}; integers have no exact mean (use sum)"
            )
        if self.quantise is not None and values.dtype != torch.float32:
            raise UsageError(f"all_reduce: quantise of {values.dtype}; need float32 (convert it)")

    def piece_size(self, itemsize: int, chunk: int = 0) -> int:
        """Elements of a full piece of a chunk of so many."""
        least = max(1, self.piece_bytes // itemsize)
        return max(least, min(-(-chunk // self.few), self.few * least))

    def pieces(self, size: int, peers: int, itemsize: int = 4) -> int:
        """Pieces of the longest chunk."""
        longest = -(-size // peers)
        return -(-longest // self.piece_size(itemsize, longest))

    async def reduce(
        self, peer: Peer, operation: int, order: tuple[int, ...], values: Tensor,
        progress: Progress | None = None, told: Callable[[], None] = lambda: None,
    ) -> list[tuple[int, Tensor]]:  # fmt: skip
        """The reduction of everybody's `values` [size]: (where a piece begins, piece) of it all.

        order: the peers of the ring, this one among them. `values` is only read; write the pieces
        over it once all peers have theirs. `told` is called when `progress.stalled` changes. Mail
        that a cancelled call leaves behind has tags (operation, *): discard it.
        """
        return await _Reduction(self, peer, operation, order, values, progress, told).run()


@dataclass
class _Reduction:
    """One call of `Ring.reduce`."""

    ring: Ring
    peer: Peer
    operation: int
    order: tuple[int, ...]
    values: Tensor
    progress: Progress | None
    told: Callable[[], None]
    done: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        peers = len(self.order)
        self.count = self.progress or Progress()
        self.place = self.order.index(self.peer.id)
        self.next = PeerId(self.order[(self.place + 1) % peers])
        self.previous = PeerId(self.order[self.place - 1])
        longest = -(-self.values.numel() // peers)
        self.size = self.ring.piece_size(self.values.element_size(), longest)
        self.patience_s = self.ring.stall_s + (
            self.size * self.values.element_size() / self.ring.slow_bytes_per_s
        )
        self.longest_s = 0.0
        self.bounds = chunk_bounds(self.values.numel(), peers)
        self.pieces = self.ring.pieces(self.values.numel(), peers, self.values.element_size())

    def spans(self, chunk: int) -> list[tuple[int, int]]:
        """Where the pieces of a chunk begin and end; none of an empty chunk."""
        start, end = self.bounds[chunk], self.bounds[chunk + 1]
        return [(at, min(at + self.size, end)) for at in range(start, end, self.size)]

    async def run(self) -> list[tuple[int, Tensor]]:
        peers = len(self.order)
        codec = self.ring.quantise
        if peers == 1:
            return [(0, self.values.clone())]
        reducing = peers - 1
        last = 2 * peers - 3
        own = list(enumerate(self.spans(self.place)))
        first = taken = 0
        for step in range(last + 1):
            chunk = (self.place - step - 1) % peers
            for number, (start, end) in enumerate(self.spans(chunk)):
                while first < len(own) and first < taken + self.ring.ahead:
                    await self.send_own(*own[first])
                    first += 1
                held = received = await self.receive(step, number, end - start)
                taken += 1
                if codec is not None:
                    held = codec.decode(received)
                if step < reducing:
                    # What was received is this peer's to write into.
                    combine(self.ring.op, held, self.values[start:end])
                    if step == reducing - 1 and self.ring.op == "avg":
                        held /= peers
                    received = held if codec is None else codec.encode(held)
                    if codec is not None and step == reducing - 1:
                        held = codec.decode(received)
                if step >= reducing - 1:
                    self.done.append((start, held))
                if step < last:
                    await self.send((step + 1) * self.pieces + number, received)
        return self.done

    async def send_own(self, number: int, span: tuple[int, int]) -> None:
        # A copy, so that the caller may write its tensor as soon as an operation is given up,
        # whatever a broken link still holds.
        piece = self.values[span[0] : span[1]]
        codec = self.ring.quantise
        await self.send(number, _copy(piece) if codec is None else codec.encode(piece))

    async def send(self, place: int, values: Tensor) -> None:
        check = checksum(values, self.operation, place) if self.ring.checked else 0
        await self.peer.send(self.next, Piece(self.operation, place, values, check))
        self.count.sent += 1
        self.count.payload_bytes += values.numel() * values.element_size()

    async def receive(self, step: int, number: int, size: int) -> Tensor:
        tag = (self.operation, step * self.pieces + number)
        begun = self.peer.now()
        patience_s = self.patience_s
        if self.count.received:
            patience_s = min(patience_s, max(self.ring.stall_s, 8 * self.longest_s))
        while True:
            envelope = await self.peer.recv(
                Piece, tag=tag, source=self.previous, deadline=self.peer.now() + patience_s
            )
            if envelope is not None:
                break
            if not self.count.stalled:
                self.count.stalled = True
                self.told()
        self.longest_s = max(self.longest_s, self.peer.now() - begun)
        self.count.received += 1
        self.count.stalled = False
        values = envelope.message.values
        kind, length = self.values.dtype, size
        if self.ring.quantise is not None:
            kind, length = torch.uint8, size + HEAD_BYTES
        if values.dtype != kind or values.shape != (length,):
            raise WireError(
                f"ring: peer {self.previous} sent {values.dtype} {tuple(values.shape)} for "
                f"{kind} ({length},) (all peers need the same size, dtype and settings)"
            )
        if self.ring.checked and envelope.message.check != checksum(values, *tag):
            raise WireError(f"ring: a piece of peer {self.previous} was damaged on its way")
        return values


def _copy(values: Tensor) -> Tensor:
    """A copy, in memory that is used again."""
    if values.nbytes < LEAST_BYTES:
        return values.clone()
    return torch.frombuffer(place(values.nbytes, 0), dtype=values.dtype).copy_(values)


def checksum(values: Tensor, *place: int) -> int:
    """CRC-32 of the numbers and of where they belong, without which a flipped bit in the place
    would put right numbers into a wrong one."""
    return zlib.crc32(values.view(torch.uint8).numpy().data, zlib.crc32(struct.pack("<2q", *place)))
