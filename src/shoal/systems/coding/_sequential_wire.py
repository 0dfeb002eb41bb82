"""What the master and the workers of sequential gradient coding say to each other."""

from __future__ import annotations

from torch import Tensor

from shoal.wire.message import message


@message(tag=("life", "round"), checked=True)
class Assign:
    """Work for a round: parts of jobs, in order, and the parameters [fresh, dim] of the jobs that
    begin (or of all, for a worker that lacks some). Whatever the worker does for earlier rounds is
    cancelled. life: greater each time that the master begins; over: there is no more work, and the
    parameters are those of the first model."""

    life: int
    round: int
    jobs: tuple[int, ...]
    parts: tuple[int, ...]
    fresh: tuple[int, ...]
    params: Tensor
    over: bool


@message(tag=("life", "round"), checked=True)
class Answer:
    """The results [tasks, dim] of a round's work, in its order; none if `lacks`: the worker has not
    the parameters that it needs."""

    life: int
    round: int
    results: Tensor
    lacks: bool
