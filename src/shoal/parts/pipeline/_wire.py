"""What the peers of a pipeline tell each other, all of it checked."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from shoal.wire.message import message

FORWARD, BACKWARD, LOST, END = range(4)
"""What flows: activations, gradients, "I cannot do my part of this attempt", and the last word."""

LAST = 1 << 40
"""The number of the attempt that is none: that of the last word."""

M = TypeVar("M")


@message(tag=("attempt", "iteration"), checked=True)
class Flow:
    """Activations or gradients [batch, length, width] of a microbatch, from stage to stage.

    attempt: numbers all attempts at iterations, so that what is left of a dropped one is told
    apart; it comes first in the tag, since iterations may be made again. micro: from the schedule's
    number of microbatches on it is evaluated only.
    """

    what: int
    iteration: int
    attempt: int
    micro: int
    values: Tensor


@message(checked=True)
class Ask:
    """Part 0 to a stage: where do you stand?"""

    number: int


@message(checked=True)
class Standing:
    """A stage's answer to every order.

    version: updates that its parameters have behind them; attempt: the last one that it took part
    in; ready: whether it has all gradients of that attempt; busy: it works on an order; copy: the
    version of its copy of part 0, -1 = none; kept: versions of its checkpoints, newest first.
    """

    version: int
    attempt: int
    ready: bool
    busy: bool
    copy: int
    kept: tuple[int, ...]


@message(checked=True)
class Apply:
    """Take the step from `version` with the gradients of this attempt; copy: part 0's parameters
    after it, for those who hold them (else empty)."""

    version: int
    attempt: int
    copy: Tensor


@message(checked=True)
class Rebuild:
    """You are lost: make yourself of your neighbours, which stand at `version`."""

    version: int
    copy: Tensor


@message(checked=True)
class Rewind:
    """Go back to your checkpoint of `version`."""

    version: int
    copy: Tensor


@message(checked=True)
class Give:
    """What you hold at `version`, please: of yourself, or (outer) your copy of part 0."""

    version: int
    outer: bool


@message(checked=True)
class Held:
    """The answer to `Give`: parameters [dim], and the squared norm of the last gradient."""

    params: Tensor
    square: float
