"""What the master and the workers of sequential gradient coding say to each other."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from shoal.wire.checksum import checksum
from shoal.wire.message import message

M = TypeVar("M")


@message(tag=("life", "round"))
class Assign:
    """Work for a round: parts of jobs, in order, and the parameters [fresh, dim] of the jobs that
    begin (or of all, for a worker that lacks some). Whatever the worker does for earlier rounds is
    cancelled. life: how often the master has begun; over: there is no more work."""

    life: int
    round: int
    jobs: tuple[int, ...]
    parts: tuple[int, ...]
    fresh: tuple[int, ...]
    params: Tensor
    over: bool
    check: int


@message(tag=("life", "round"))
class Answer:
    """The results [tasks, dim] of a round's work, in its order; none if `lacks`: the worker has not
    the parameters that it needs."""

    life: int
    round: int
    results: Tensor
    lacks: bool
    check: int


def sealed(kind: type[M], *fields: Any) -> M:
    """A message with its checksum."""
    return kind(*fields, checksum(*fields))  # pyright: ignore[reportCallIssue]


def intact(told: Any) -> bool:
    """Whether it is as it was sent."""
    fields = (getattr(told, name) for name in told.__struct_fields__[:-1])
    return told.check == checksum(*fields)
