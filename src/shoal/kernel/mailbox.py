"""Matching of messages to waits, for one peer. Unmatched mail is kept, bounded per sender."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from shoal.base.ids import ANY
from shoal.base.limits import Limits
from shoal.kernel.waits import GatherWait, Ready, RecvWait


class Mailbox:
    """Unread mail by kind and tag, and the waits that it may satisfy, oldest first."""

    __slots__ = ("_closed", "_drop", "_floor", "_held_bytes", "_limit", "_mail", "_tags", "waits")

    def __init__(self, limits: Limits, drop: Callable[[str], None]) -> None:
        self.waits: dict[type, list[Any]] = {}
        self._mail: dict[type, dict[Any, deque[Any]]] = {}
        self._closed: dict[type, dict[Any, None]] = {}
        self._floor: dict[type, Any] = {}
        self._held_bytes: dict[int, int] = {}
        self._limit = limits.mailbox_bytes
        self._tags = limits.closed_tags
        self._drop = drop

    def drop(self, reason: str) -> None:
        self._drop(reason)

    def put(self, envelope: Any) -> None:
        """Hand an arrived message to the first wait that takes it, or keep it."""
        kind = envelope.message.__class__
        waits = self.waits.get(kind)
        if waits:
            for wait in waits:
                if wait.accept(envelope):
                    return
        tag = envelope.message.tag
        closed = self._closed.get(kind)
        if closed is not None and tag in closed:
            self._drop("closed")
            return
        floor = self._floor.get(kind)
        if floor is not None and tag < floor:
            self._drop("closed")
            return
        source = envelope.source
        held = self._held_bytes.get(source, 0) + envelope.size_bytes
        if held > self._limit:
            self._drop("mailbox")
            return
        self._held_bytes[source] = held
        by_tag = self._mail.get(kind)
        if by_tag is None:
            by_tag = self._mail[kind] = {}
        queue = by_tag.get(tag)
        if queue is None:
            queue = by_tag[tag] = deque()
        queue.append(envelope)

    def _release(self, envelope: Any) -> None:
        source = envelope.source
        held = self._held_bytes[source] - envelope.size_bytes
        if held:
            self._held_bytes[source] = held
        else:
            del self._held_bytes[source]

    def take(self, kind: type, tag: Any, source: int | None) -> Any | None:
        """The oldest kept message that matches, or None."""
        by_tag = self._mail.get(kind)
        if not by_tag:
            return None
        # Over all tags the oldest tag comes first: dicts keep the order of first arrival.
        for found in list(by_tag) if tag is ANY else (tag,):
            queue = by_tag.get(found)
            if queue is None:
                continue
            for position, envelope in enumerate(queue):
                if source is None or envelope.source == source:
                    del queue[position]
                    if not queue:
                        del by_tag[found]
                    self._release(envelope)
                    return envelope
        return None

    def recv(self, ready: Ready, kind: type, tag: Any, source: int | None) -> RecvWait:
        """A registered wait for one message."""
        waits = self.waits.get(kind)
        if waits is None:
            waits = self.waits[kind] = []
        wait = RecvWait(ready, self, waits, tag, tag is ANY, source)
        waits.append(wait)
        return wait

    def gather(self, ready: Ready, kind: type, tag: Any, expect: set[int] | None,
               count: int | None) -> GatherWait:  # fmt: skip
        """A registered wait for several; already `done`-able mail is taken from the box."""
        waits = self.waits.setdefault(kind, [])
        wait = GatherWait(ready, self, kind, waits, tag, expect, count)
        waits.append(wait)
        by_tag = self._mail.get(kind)
        queue = by_tag.pop(tag, None) if by_tag else None
        while queue:
            envelope = queue.popleft()
            self._release(envelope)
            if wait.complete():
                self._drop("closed")
            else:
                wait.take(envelope)
        return wait

    def close(self, kind: type, tag: Any) -> None:
        """Drop mail of this tag from now on (the latest `closed_tags` tags are remembered)."""
        closed = self._closed.setdefault(kind, {})
        closed[tag] = None
        if len(closed) > self._tags:
            del closed[next(iter(closed))]
        by_tag = self._mail.get(kind)
        if by_tag and tag in by_tag:
            self._forget(by_tag, tag)

    def discard(self, kind: type, before: Any) -> None:
        """Drop mail with tags below `before`, now and later."""
        floor = self._floor.get(kind)
        if floor is None or before > floor:
            self._floor[kind] = before
            by_tag = self._mail.get(kind, {})
            for tag in [tag for tag in by_tag if tag < before]:
                self._forget(by_tag, tag)
            closed = self._closed.get(kind, {})
            for tag in [tag for tag in closed if tag < before]:
                del closed[tag]

    def _forget(self, by_tag: dict[Any, deque[Any]], tag: Any) -> None:
        for envelope in by_tag.pop(tag):
            self._release(envelope)
            self._drop("closed")
