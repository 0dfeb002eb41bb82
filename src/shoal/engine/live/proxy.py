"""Faults of links, applied where a message is sent: partitions, loss, holds, flipped bits.

Loss is drawn by the same key as on the event engine (links, pair, kind and tag, number among equal
ones), so a message that is lost there is lost here. A flipped bit is tried on a copy of the frame:
what no longer decodes is dropped here, because on a byte stream it would take the connection and
all that is queued on it along.
"""

from __future__ import annotations

from typing import Any

from shoal.base import keyed
from shoal.base.errors import WireError
from shoal.base.limits import Limits
from shoal.wire import codec
from shoal.world.faults import Corrupt, Fault, Hold, Loss, Partition
from shoal.world.links import LinkModel

_MOST_TAGS = 256


class Proxy:
    """The faults that are in force, and what they do to one message."""

    def __init__(self, links: LinkModel, seed: int, limits: Limits) -> None:
        self._links: Any = links
        self._seed = seed
        self._limits = limits
        self._active: list[tuple[Fault, frozenset[int]]] = []
        self._random = self._links.loss > 0 or self._links.jitter_s > 0
        self._repeats: dict[tuple[int, int], dict[int, int]] = {}
        self._flips = 0

    @property
    def quiet(self) -> bool:
        """Nothing in force and nothing random: every message passes."""
        return not self._active and not self._random

    def begin(self, fault: Fault) -> None:
        self._active.append((fault, frozenset(fault.who)))

    def end(self, fault: Fault) -> None:
        self._active.remove((fault, frozenset(fault.who)))

    def stopped(self, source: int, to: int, key: int) -> str:
        """Why a message does not pass: "partition", "lost", or "" when it does."""
        passing = 1.0
        for fault, who in self._active:
            if isinstance(fault, Partition):
                inside = source in who
                if inside != (to in who) and (inside or not fault.one_way):
                    return "partition"
            elif isinstance(fault, Loss) and (source in who or to in who):
                passing *= 1.0 - fault.probability
        loss = 1.0 - passing
        if self._random or loss:
            draw = self._draw_key(source, to, key)
            if self._links.lost(source, to, draw, loss):
                return "lost"
        return ""

    def holding(self, source: int, to: int) -> Fault | None:
        """A fault that keeps messages of this pair back."""
        for fault, who in self._active:
            if isinstance(fault, Hold) and (source in who or to in who):
                return fault
        return None

    def flipped(
        self, source: int, key: int, frame: list[codec.Buffer]
    ) -> list[codec.Buffer] | None:
        """The frame as a bad link leaves it; None when it is no frame any more."""
        for number, (fault, who) in enumerate(self._active):
            if not (isinstance(fault, Corrupt) and source in who):
                continue
            self._flips += 1
            draw = keyed.fold(0, self._seed, "corrupt", source, key, self._flips, number)
            if keyed.unit(draw) >= fault.probability:
                continue
            damaged = bytearray(b"".join(frame))
            bit = keyed.fold(draw, 1) % (8 * len(damaged))
            damaged[bit // 8] ^= 1 << (bit % 8)
            try:
                codec.decode(damaged, self._limits)
            except WireError:
                return None
            frame = [damaged]
        return frame

    def _draw_key(self, source: int, to: int, key: int) -> int:
        counts = self._repeats.setdefault((source, to), {})
        number = counts.pop(key, 0)
        if number == 0 and len(counts) >= _MOST_TAGS:
            del counts[next(iter(counts))]
        counts[key] = number + 1
        return key if number == 0 else keyed.signed(keyed.fold(key, number))
