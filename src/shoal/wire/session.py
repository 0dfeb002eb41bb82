"""What two peers share after a handshake: sealed records on a byte stream, one count per direction.

    record    length of the rest, 4 bytes little-endian; ciphertext; 16 bytes tag

The nonce of a record is its number, which is not sent: a record that was changed, left out, sent
twice, moved or sent back does not open. Records hold at most `RECORD_BYTES` of plaintext. (Noise
allows 65,535 bytes; longer records cost less, and the length is not of the essence.)
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

from shoal.base.errors import Forged
from shoal.wire.mux import Cutter
from shoal.wire.noise import TAG_BYTES, Buffer, CipherState, Unauthentic

LENGTH = struct.Struct("<I")
RECORD_BYTES = 1 << 17
OVERHEAD_BYTES = LENGTH.size + TAG_BYTES
REKEY_EVERY = 1 << 18
"""Records under one key: at most 2**31 blocks of AES, so that its birthday bound stays far away."""
SCRATCH_BYTES = 4 * (RECORD_BYTES + OVERHEAD_BYTES)
"""A good size for the memory that sessions seal into and receive into."""

_NOTHING = memoryview(b"")
# Shorter buffers are copied together into one record; longer ones are sealed where they are.
_JOINED_BYTES = 1 << 13
_local = threading.local()


class Session:
    """Seals what goes out and opens what comes in; the two directions are independent.

    Sessions of one thread may share the memory that `seal` and `space` work in: what must outlive
    a call is kept here, or is the caller's to copy.

    >>> from shoal.wire.mux import Cutter
    >>> from shoal.wire.noise import CipherState
    >>> def end(sends, receives):
    ...     keys = (CipherState("AESGCM", bytes(31) + byte) for byte in (sends, receives))
    ...     return Session(*keys)
    >>> here, there = end(b"1", b"2"), end(b"2", b"1")
    >>> memory = memoryview(bytearray(SCRATCH_BYTES))
    >>> sealed, taken = here.seal([b"some", b"thing"], memory)
    >>> len(sealed), taken
    (29, 9)
    >>> there.came(len(sealed), memory)
    >>> bytes(there.open(there.record()))
    b'something'
    """

    __slots__ = ("_borrowed", "_receives", "_sealed", "_sends")

    def __init__(self, sends: CipherState, receives: CipherState) -> None:
        self._sends = sends
        self._receives = receives
        self._sealed = _NOTHING
        self._borrowed = False

    @property
    def partial(self) -> bool:
        """Whether a record has begun to arrive and is not opened."""
        return len(self._sealed) > 0

    # Out.

    def seal(self, buffers: Sequence[Buffer], place: memoryview) -> tuple[memoryview, int]:
        """Records of as much of the buffers as the place has room for.

        Returns the part of the place that must now be written, all of it and in order, and how many
        bytes of the buffers it holds. The place must have room for a record of some thousand bytes.
        """
        if len(buffers) == 1 and len(buffers[0]) <= _JOINED_BYTES:
            # Most of what is sent is one small message.
            return place[: self._seal(buffers[0], place, 0)], len(buffers[0])
        end, at, taken = len(place), 0, 0
        short: list[Buffer] = []
        short_bytes = 0
        for buffer in buffers:
            size = len(buffer)
            if not size:
                continue
            if size <= _JOINED_BYTES:
                if short_bytes + size > RECORD_BYTES:
                    at = self._seal(b"".join(short), place, at)
                    taken += short_bytes
                    short, short_bytes = [], 0
                if at + OVERHEAD_BYTES + short_bytes + size > end:
                    break
                short.append(buffer)
                short_bytes += size
                continue
            if short:
                at = self._seal(b"".join(short), place, at)
                taken += short_bytes
                short, short_bytes = [], 0
            view = memoryview(buffer)
            start = 0
            while start < size:
                room = min(RECORD_BYTES, size - start, end - at - OVERHEAD_BYTES)
                if room < min(size - start, _JOINED_BYTES):
                    break
                at = self._seal(view[start : start + room], place, at)
                start += room
            taken += start
            if start < size:
                break
        if short:
            at = self._seal(short[0] if len(short) == 1 else b"".join(short), place, at)
            taken += short_bytes
        return place[:at], taken

    def _seal(self, plaintext: Buffer, place: memoryview, at: int) -> int:
        size = len(plaintext) + TAG_BYTES
        LENGTH.pack_into(place, at, size)
        begin = at + LENGTH.size
        self._sends.encrypt_into(plaintext, place[begin : begin + size])
        return begin + size

    # In.

    def space(self, memory: memoryview) -> memoryview:
        """The part of the memory into which the next bytes must be received."""
        rest = self._sealed
        if not rest:
            return memory
        memory[: len(rest)] = rest
        return memory[len(rest) :]

    def came(self, count: int, memory: memoryview) -> None:
        """So many bytes were received into `space(memory)`, which is borrowed until `record`
        returns None, or until `hold`."""
        self._sealed = memory[: len(self._sealed) + count]
        self._borrowed = True

    def hold(self) -> None:
        """Keep what came, and no `record` was, in memory of its own."""
        if self._borrowed:
            self._sealed = memoryview(bytes(self._sealed))
            self._borrowed = False

    def record(self) -> memoryview | None:
        """The next whole record, still sealed; give it to `open` before the next. None when it has
        not come yet. Raises Forged for an impossible length."""
        sealed = self._sealed
        have = len(sealed)
        if have >= LENGTH.size:
            (size,) = LENGTH.unpack_from(sealed)
            check_length(size)
            end = LENGTH.size + size
            if end == have:
                self._sealed = _NOTHING
                self._borrowed = False
                return sealed[LENGTH.size :]
            if end < have:
                self._sealed = sealed[end:]
                return sealed[LENGTH.size : end]
        self.hold()
        return None

    def open(self, record: memoryview, place: memoryview | None = None) -> Buffer:
        """The plaintext of the next record, in the place if one of its exact size is given.

        Raises Forged: the session is then of no more use.
        """
        try:
            if place is None:
                return self._receives.decrypt(record)
            self._receives.decrypt_into(record, place)
        except Unauthentic:
            raise Forged(
                f"record {self._receives.count}: not what the other side sealed at this place "
                "(changed, replayed, reordered or reflected)"
            ) from None
        return place


def memory() -> tuple[memoryview, memoryview]:
    """Two pieces of `SCRATCH_BYTES` that all sessions of a thread share, for what is sealed and for
    plaintext. They are good for one call; keep what must stay."""
    pieces = getattr(_local, "pieces", None)
    if pieces is None:
        pieces = memoryview(bytearray(SCRATCH_BYTES)), memoryview(bytearray(SCRATCH_BYTES))
        _local.pieces = pieces
    return pieces


def feed(session: Session, cutter: Cutter, plain: memoryview) -> bool:
    """Open the next record into a cutter that wants more bytes; False when none is whole.

    What belongs to a chunk is opened where it stays, the rest into `plain`, which is borrowed as
    the cutter's `feed` says. Raises Forged.
    """
    record = session.record()
    if record is None:
        return False
    size = len(record) - TAG_BYTES
    place = cutter.room(size)
    if place is None:
        place = plain[:size]
        session.open(record, place)
        cutter.feed(place)
    else:
        session.open(record, place)
        cutter.filled(size)
    return True


def check_length(size: int) -> None:
    """Raises Forged for a length that no record has."""
    if not TAG_BYTES < size <= RECORD_BYTES + TAG_BYTES:
        raise Forged(f"record of {size} bytes; they have {TAG_BYTES + 1} to {RECORD_BYTES + 16}")
