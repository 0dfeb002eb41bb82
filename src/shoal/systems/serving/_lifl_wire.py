"""What the peers of LIFL tell each other.

Keys are fixed bytes, so that sizes do not depend on processes. Every message is checked: a flipped
bit in a key or a weight would spoil a sum that nobody can look into.
"""

from __future__ import annotations

from torch import Tensor

from shoal.wire.message import message

STORED, LATER, CLOSED, REFUSED = range(4)
"""What a gateway says of an update: it has it, has no room now, needs it no more, cannot use it."""


@message(checked=True)
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


@message(checked=True)
class Planned:
    """A gateway has taken up its part. Of its last round: arrivals per second, seconds per addition
    (0 without one)."""

    rate_per_s: float
    each_s: float


@message(tag=("round", "attempt"), checked=True)
class Train:
    """To a client: the model to begin with, and the gateway that takes the update."""

    round: int
    attempt: int
    gateway: int
    params: Tensor


@message(checked=True)
class Update:
    """A client's result [dim] and its weight."""

    round: int
    attempt: int
    weight: float
    vector: Tensor


@message(checked=True)
class Taken:
    """What became of it: STORED, LATER, CLOSED or REFUSED."""

    answer: int


@message(checked=True)
class Add:
    """To an aggregator: the sum (+)= factor x addend, both by their keys.

    number rises with every request of a gateway. Without keys it asks for a sign of life.
    """

    number: int
    out: bytes
    source: bytes
    factor: float
    first: bool


@message(checked=True)
class Added:
    """It is in the sum."""

    number: int


@message(checked=True)
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


@message(checked=True)
class Hello:
    """To the coordinator: are you there?"""


@message(checked=True)
class Got:
    """I am, or I have it."""


@message(tag=("round", "attempt"), checked=True)
class Result:
    """The weighted mean over all nodes, to the coordinator."""

    round: int
    attempt: int
    weight: float
    ids: tuple[int, ...]
    vector: Tensor
    first_s: float
    last_s: float


@message(checked=True)
class Over:
    """To gateways: this attempt and all before it are done."""

    round: int
    attempt: int


@message(checked=True)
class Ended:
    """To everybody: the last round is over; the final model [dim]."""

    round: int
    params: Tensor
