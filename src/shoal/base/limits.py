"""Bounds on everything that another peer could make grow. All sizes in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.base.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What one peer accepts from one other peer, and how much it keeps.

    frame_bytes: largest message; header_bytes: largest structured part of a message;
    mailbox_bytes: unread messages per sender; queue_bytes: unsent messages per receiver, beyond
    which `send` waits; in_flight: requests that a handler works on at once; closed_tags: how many
    closed tags per kind are remembered. On real connections: partial_bytes and open_frames: frames
    that are partly received, both per sender; window_bytes: what a sender may have on the way per
    connection, so bandwidth times round trip should be less.
    """

    frame_bytes: int = 1 << 30
    header_bytes: int = 1 << 20
    mailbox_bytes: int = 1 << 28
    queue_bytes: int = 1 << 28
    in_flight: int = 64
    closed_tags: int = 4096
    partial_bytes: int = 1 << 30
    open_frames: int = 256
    window_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        check_positive("Limits", self)
        if self.window_bytes < 1 << 20:
            raise UsageError(
                f"Limits: window_bytes={self.window_bytes}; need {1 << 20}, four chunks (raise it)"
            )


def check_positive(owner: str, settings: object, *names: str, finite: bool = False) -> None:
    """UsageError unless these attributes (all, when none is named) are positive.

    finite: refuse infinity as well. NaN never passes.

    >>> check_positive("Limits", Limits(), "frame_bytes")
    """
    for name in names or vars(settings):
        value = getattr(settings, name)
        if not value > 0 or (finite and value == math.inf):
            raise UsageError(f"{owner}: {name}={value}; need a positive number (raise it)")


DEFAULT = Limits()
