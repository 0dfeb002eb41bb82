"""What the peers of LIFL tell each other.

Keys are fixed bytes, so that sizes do not depend on processes. Every message ends with a checksum
of its fields: a flipped bit in a key or a weight would spoil a sum that nobody can look into.
"""

from __future__ import annotations

from torch import Tensor

from shoal.wire.message import message

STORED, LATER, CLOSED, REFUSED = range(4)
"""What a gateway says of an update: it has it, has no room now, needs it no more, cannot use it."""


@message
class Plan:
    """To a gateway: what its node gets in this round, and who is the top.

    nodes: how many take part, for the top (0 for the others); goal: updates after which it is
    enough; warm: aggregators to have ready.
    """

    round: int
    attempt: int
    goal: int
    warm: int
    top: int
    nodes: int
    check: int = 0


@message
class Planned:
    """A gateway has taken up its part. Of its last round: arrivals per second, seconds per addition
    (0 without one)."""

    rate_per_s: float
    each_s: float
    check: int = 0


@message(tag=("round", "attempt"))
class Train:
    """To a client: the model to begin with, and the gateway that takes the update."""

    round: int
    attempt: int
    gateway: int
    params: Tensor
    check: int = 0


@message
class Update:
    """A client's result [dim] and its weight."""

    round: int
    attempt: int
    weight: float
    vector: Tensor
    check: int = 0


@message
class Taken:
    """What became of it: STORED, LATER, CLOSED or REFUSED."""

    answer: int
    check: int = 0


@message
class Add:
    """To an aggregator: the sum (+)= factor x addend, both by their keys.

    number rises with every request of a gateway. Without keys it asks for a sign of life.
    """

    number: int
    out: bytes
    source: bytes
    factor: float
    first: bool
    check: int = 0


@message
class Added:
    """It is in the sum."""

    number: int
    check: int = 0


@message
class Partial:
    """A node's sum, to the top; nothing is in it without ids.

    first_s, last_s: when the first and the last of its updates arrived.
    """

    round: int
    attempt: int
    factor: float
    weight: float
    ids: tuple[int, ...]
    vector: Tensor
    first_s: float
    last_s: float
    check: int = 0


@message
class Hello:
    """To the coordinator: are you there?"""

    check: int = 0


@message
class Got:
    """I am, or I have it."""

    check: int = 0


@message(tag=("round", "attempt"))
class Result:
    """The weighted mean over all nodes, to the coordinator."""

    round: int
    attempt: int
    weight: float
    ids: tuple[int, ...]
    vector: Tensor
    first_s: float
    last_s: float
    check: int = 0


@message
class Over:
    """To gateways: this attempt and all before it are done."""

    round: int
    attempt: int
    check: int = 0


@message
class Ended:
    """To everybody: the last round is over; the final model [dim]."""

    round: int
    params: Tensor
    check: int = 0
