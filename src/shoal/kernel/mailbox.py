"""Matching of messages to waits, for one peer. Unmatched mail is kept, bounded per sender."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from shoal.base.errors import UndeclaredMessage
from shoal.base.ids import ANY
from shoal.base.limits import Limits
from shoal.kernel.waits import GatherWait, Ready
from shoal.wire.message import Message


def require_message(kind: Any) -> None:
    """UndeclaredMessage unless `kind` is a class that was itself declared with `@message`."""
    # `code` in its own namespace: a bare subclass would travel under its parent's name.
    if not (isinstance(kind, type) and issubclass(kind, Message) and kind.__dict__.get("code")):
        name = kind.__name__ if isinstance(kind, type) else repr(kind)
        raise UndeclaredMessage(f"{name} is no message (declare the class with @message)")


class Mailbox:
    """Unread mail by kind and tag, and the waits that it may satisfy, oldest first."""

    __slots__ = (
        "_arrivals", "_closed", "_drop", "_floor", "_held_bytes", "_limit", "_tags", "mail",
        "waits",
    )  # fmt: skip

    def __init__(self, limits: Limits, drop: Callable[[str], None]) -> None:
        self.waits: dict[type, list[Any]] = {}
        self.mail: dict[type, dict[Any, deque[Any]]] = {}
        self._closed: dict[type, dict[Any, None]] = {}
        self._floor: dict[type, Any] = {}
        self._held_bytes: dict[int, int] = {}
        self._limit = limits.mailbox_bytes
        self._tags = limits.closed_tags
        self._arrivals = 0
        self._drop = drop

    def drop(self, reason: str) -> None:
        self._drop(reason)

    def put(self, envelope: Any) -> None:
        """Hand an arrived message to the first wait that takes it, or keep it."""
        for wait in self.waits.get(envelope.message.__class__, ()):
            if wait.accept(envelope):
                return
        self._keep(envelope)

    def _keep(self, envelope: Any) -> None:
        kind = envelope.message.__class__
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
        by_tag = self.mail.get(kind)
        if by_tag is None:
            by_tag = self.mail[kind] = {}
        queue = by_tag.get(tag)
        if queue is None:
            queue = by_tag[tag] = deque()
        self._arrivals += 1
        queue.append((self._arrivals, envelope))

    def _release(self, envelope: Any) -> None:
        source = envelope.source
        held = self._held_bytes[source] - envelope.size_bytes
        if held:
            self._held_bytes[source] = held
        else:
            del self._held_bytes[source]

    def take(self, kind: type, tag: Any, source: int | None) -> Any | None:
        """The oldest kept message that matches, or None."""
        by_tag = self.mail.get(kind)
        if not by_tag:
            return None
        if tag is ANY:
            tag = self._oldest(by_tag, source)
        queue = by_tag.get(tag)
        if queue is None:
            return None
        for position, (_, envelope) in enumerate(queue):
            if source is None or envelope.source == source:
                del queue[position]
                if not queue:
                    del by_tag[tag]
                self._release(envelope)
                return envelope
        return None

    @staticmethod
    def _oldest(by_tag: dict[Any, deque[Any]], source: int | None) -> Any:
        """The tag whose first matching message arrived first."""
        if len(by_tag) == 1:
            return next(iter(by_tag))
        best, oldest = None, None
        for tag, queue in by_tag.items():
            for arrival, envelope in queue:
                if source is None or envelope.source == source:
                    if oldest is None or arrival < oldest:
                        best, oldest = tag, arrival
                    break
        return best

    def waiting(self, kind: type) -> list[Any]:
        """The waits for a kind; UndeclaredMessage when it is no message class."""
        waits = self.waits.get(kind)
        if waits is None:
            require_message(kind)
            waits = self.waits[kind] = []
        return waits

    def gather(self, ready: Ready, kind: type, tag: Any, expect: set[int] | None,
               count: int | None) -> GatherWait:  # fmt: skip
        """A registered wait for several; mail of the tag that is here already goes to it."""
        waits = self.waiting(kind)
        wait = GatherWait(ready, self, kind, waits, tag, expect, count)
        waits.append(wait)
        by_tag = self.mail.get(kind)
        queue = by_tag.pop(tag, None) if by_tag else None
        while queue:
            _, envelope = queue.popleft()
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
        by_tag = self.mail.get(kind)
        if by_tag and tag in by_tag:
            self._forget(by_tag, tag)

    def discard(self, kind: type, before: Any) -> None:
        """Drop mail with tags below `before`, now and later."""
        floor = self._floor.get(kind)
        if floor is None or before > floor:
            self._floor[kind] = before
            by_tag = self.mail.get(kind, {})
            for tag in [tag for tag in by_tag if tag < before]:
                self._forget(by_tag, tag)
            closed = self._closed.get(kind, {})
            for tag in [tag for tag in closed if tag < before]:
                del closed[tag]

    def _forget(self, by_tag: dict[Any, deque[Any]], tag: Any) -> None:
        for _, envelope in by_tag.pop(tag):
            self._release(envelope)
            self._drop("closed")
