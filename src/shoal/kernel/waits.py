"""What a task can wait for. A wait is a token: it resolves once, and late news find it done.

The classic fault of such kernels is the stale wake: a message or timer of an earlier wait resumes
a task that already waits for something else. Here timers and mailboxes refer to the wait, never
to the task, and `resolve` on a wait that is done does nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from shoal.base.errors import DeadlineExceeded
from shoal.base.ids import ANY

if TYPE_CHECKING:
    from shoal.kernel.mailbox import Mailbox
    from shoal.kernel.tasks import Task

Ready = deque[tuple["Task", Any, BaseException | None]]


class Wait:
    """Something that a task waits for. Subclasses say what the deadline means.

    A wait may be resolved before a task waits for it; awaiting it then returns at once.
    """

    __slots__ = ("done", "early", "task", "timed")

    def __init__(self, ready: Ready) -> None:
        # A task brings its own queue; `ready` says whose queue it will be.
        self.done = False
        self.timed = False
        self.task: Task | None = None

    def __await__(self) -> Generator[Wait, Any, Any]:
        return (yield self)

    def resolve(self, value: Any = None) -> None:
        """Wake the task with a value, once."""
        if not self.done:
            self.done = True
            self._wake(value, None)

    def fail(self, error: BaseException) -> None:
        """Wake the task with an exception, once."""
        if not self.done:
            self.done = True
            self._wake(None, error)

    def _wake(self, value: Any, error: BaseException | None) -> None:
        task = self.task
        if task is None:
            self.early = (value, error)
            return
        if self.timed:
            task.runtime.host.timer_dropped()
        task.runtime.ready.append((task, value, error))

    def expire(self) -> None:
        """The deadline came. The timer is gone from the heap already."""
        if not self.done:
            self.timed = False
            self.resolve(None)

    def abandon(self) -> None:
        """The task stopped waiting (cancelled, crashed)."""
        if not self.done:
            self.done = True
            if self.timed and self.task is not None:
                self.task.runtime.host.timer_dropped()


class RecvWait(Wait):
    """One message of a kind; None at the deadline."""

    __slots__ = ("source", "tag", "waits")

    def __init__(self, waits: list[Any], tag: Any, source: int | None) -> None:
        self.done = False
        self.timed = False
        self.task = None
        self.waits = waits
        self.tag = tag
        self.source = source

    def accept(self, envelope: Any) -> bool:
        tag, source = self.tag, self.source
        if (tag is ANY or envelope.message.tag == tag) and (
            source is None or envelope.source == source
        ):
            self.waits.remove(self)
            self.done = True
            # As `_wake`, without the call: every message comes this way.
            task = self.task
            if task is None or self.timed:
                self._wake(envelope, None)
            else:
                task.runtime.ready.append((task, envelope, None))
            return True
        return False

    def expire(self) -> None:
        if not self.done:
            self.waits.remove(self)
            self.timed = False
            self.resolve(None)

    def abandon(self) -> None:
        if not self.done:
            self.waits.remove(self)
            Wait.abandon(self)


class GatherWait(Wait):
    """One message from each of several senders; what came by the deadline.

    A gather that is cancelled takes what it already has with it.
    """

    __slots__ = ("count", "expect", "found", "kind", "mailbox", "tag", "waits")

    def __init__(self, ready: Ready, mailbox: Mailbox, kind: type, waits: list[Any], tag: Any,
                 expect: set[int] | None, count: int | None) -> None:  # fmt: skip
        super().__init__(ready)
        self.mailbox = mailbox
        self.kind = kind
        self.waits = waits
        self.tag = tag
        self.expect = expect
        self.count = count
        self.found: dict[int, Any] = {}

    def take(self, envelope: Any) -> None:
        """Keep a message that matches the tag, unless its sender is not expected or came twice."""
        source = envelope.source
        if source in self.found or (self.expect is not None and source not in self.expect):
            self.mailbox.drop("closed")
        else:
            self.found[source] = envelope.message

    def complete(self) -> bool:
        found = len(self.found)
        if self.count is not None and found >= self.count:
            return True
        return self.expect is not None and found == len(self.expect)

    def accept(self, envelope: Any) -> bool:
        if envelope.message.tag != self.tag:
            return False
        self.take(envelope)
        if self.complete():
            self.close()
            self.resolve(self.result())
        return True

    def result(self) -> dict[int, Any]:
        # Sorted, so that nothing computed from it depends on the order of arrival.
        return dict(sorted(self.found.items()))

    def close(self) -> None:
        self.waits.remove(self)
        self.mailbox.close(self.kind, self.tag)

    def expire(self) -> None:
        if not self.done:
            self.close()
            self.timed = False
            self.resolve(self.result())

    def abandon(self) -> None:
        if not self.done:
            self.waits.remove(self)
            Wait.abandon(self)


class ReplyWait(Wait):
    """The answer to a request; DeadlineExceeded at the deadline.

    `key` is (peer asked, number): an answer from anybody else is not an answer.
    """

    __slots__ = ("key", "pending", "what")

    def __init__(
        self, ready: Ready, pending: dict[tuple[int, int], Any], key: tuple[int, int], what: str
    ) -> None:
        super().__init__(ready)
        self.pending = pending
        self.key = key
        self.what = what
        pending[key] = self

    def late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"no answer to {self.what} before its deadline")

    def expire(self) -> None:
        if not self.done:
            self.timed = False
            self.pending.pop(self.key, None)
            self.fail(self.late())

    def abandon(self) -> None:
        if not self.done:
            self.pending.pop(self.key, None)
            Wait.abandon(self)
