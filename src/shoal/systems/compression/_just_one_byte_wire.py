"""What the members of a group tell each other.

Every message is checked: a flipped bit that one of them applies would part it from the
others for good.
"""

from __future__ import annotations

import struct

from torch import Tensor

from shoal.parts.zeroth_order.replay import Log
from shoal.wire.checksum import checksum
from shoal.wire.message import Packed, message

_ID = struct.Struct("<H")


@message(checked=True)
class Offer:
    """A member's numbers for an iteration, to the sequencer; also says what the member holds.

    held: the term in which its last entry was accepted, -1 = it has none. digest: of its weights,
    0 = not asked for.
    """

    term: int
    iteration: int
    held: int
    codes: bytes
    digest: int


@message(checked=True)
class Ordered:
    """What an iteration applies, from the sequencer of a term (`Entry.pack`). An entry of no bytes:
    the last one is applied for good, and there will be no more."""

    term: int
    iteration: int
    entry: bytes


@message(checked=True)
class Drifted:
    """A member's weights before an iteration are not those of most others."""

    term: int
    iteration: int


@message(checked=True)
class Want:
    """A request for all entries from an iteration on (-1 = for weights and the last entry).

    The answer is a `Whole`.

    born: for a newcomer that holds nothing, when its life began (so that the sequencer tells its
    lives apart); else -1.
    """

    term: int
    iteration: int
    born: int


@message(checked=True)
class Whole:
    """Entries from an iteration on.

    before: the group before the first; weights: "params" before the first entry where the log
    does not reach back as far, else nothing. iteration -1: the sender has nothing to give (it is no
    sequencer, which its term shows, or has not let the newcomer in yet).
    """

    term: int
    iteration: int
    before: bytes
    log: Packed
    weights: dict[str, Tensor]
    done: bool


@message(checked=True)
class Beat:
    """A sign of life: of the sequencer, and back from a member. leaving: the sender goes."""

    term: int
    back: bool
    leaving: bool


@message(checked=True)
class Ask:
    """Would you follow me in this term? trial: a question that binds nobody.

    iteration, held: how far the candidate's log goes and the term of its last entry; own: the term
    that it is in.
    """

    term: int
    iteration: int
    held: int
    trial: bool
    own: int


@message(checked=True)
class Vote:
    """Yes, to an `Ask`."""

    term: int
    trial: bool


def digest(params: Tensor) -> int:
    """32 bits that tell weights apart, never 0."""
    return checksum(params) or 1


def ids(group: tuple[int, ...]) -> bytes:
    """Peers as bytes."""
    return b"".join(map(_ID.pack, group))


def group_of(data: bytes) -> tuple[int, ...]:
    """Inverse of `ids`."""
    return tuple(peer for (peer,) in _ID.iter_unpack(data))


def whole(log: Log, term: int, start: int, weights: dict[str, Tensor], done: bool) -> Whole:
    """All that a log has from an iteration on."""
    packed = Packed(log.pack(start))
    return Whole(term, start, ids(log.group_before(start)), packed, weights, done)


def nothing(term: int) -> Whole:
    """A `Whole` of nothing."""
    return Whole(term, -1, b"", Packed(b""), {}, False)
