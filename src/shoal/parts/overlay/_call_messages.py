"""The small messages of a call: what opens, answers and cancels it."""

from __future__ import annotations

from shoal.wire.message import Packed, message

RUNNING, ANOTHER_LIFE, BUSY = "running", "another life", "busy"
"""Statuses of a `Reply` that leave the call open."""
DONE, FAILED, UNSERVED, REFUSED, TOO_LARGE, CANCELLED = (
    "done", "failed", "unserved", "refused", "too large", "cancelled",
)  # fmt: skip
"""Statuses that end it."""


@message(tag=("life", "call"))
class Open:
    """Run this. life, call: the caller's life, and its number of the call; callee: for which life
    of the called peer; turn: counts the caller's messages of this kind; awaited: all calls of this
    peer that the caller waits for; left_s: until its deadline; whole: the payload is here, else it
    comes in pieces; compression: wanted of the answer."""

    life: int
    callee: int
    call: int
    turn: int
    awaited: tuple[int, ...]
    left_s: float
    method: str
    stream: bool
    compression: str
    form: str
    size: int
    whole: bool
    body: Packed


@message(tag=("caller", "call"))
class Reply:
    """What became of a call. life: of the answering peer; caller: that of the asking one; refused:
    the callee's life that the refused message was for; whole: the answer is here, otherwise it
    comes in pieces; form, size: of the answer; error, text: class and text of an exception."""

    life: int
    caller: int
    call: int
    status: str
    refused: int = 0
    error: str = ""
    text: str = ""
    form: str = ""
    size: int = 0
    whole: bool = True
    body: Packed = Packed(b"")


@message(tag=("life", "call"))
class Cancel:
    """The caller gave it up."""

    life: int
    call: int
