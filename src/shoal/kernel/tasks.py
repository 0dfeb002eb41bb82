"""Structured tasks: every task belongs to a group, and a group ends with all its tasks."""

from __future__ import annotations

from collections.abc import Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any

from shoal.base.errors import Cancelled, Leaving, ProgramError
from shoal.kernel.waits import Ready, Wait

if TYPE_CHECKING:
    from shoal.kernel.runtime import Runtime

_CLOSINGS = 16


class Stop(Cancelled):
    """What a group throws into its own body when a child failed; void once the group has ended.

    The body may be on its way out already when the notice is queued. A notice that outlived its
    group would cancel whatever the task does next.
    """

    void = False


class Task:
    """A coroutine of one peer. It is either parked on a wait, in the ready queue, or done."""

    __slots__ = ("cancelled", "coroutine", "done", "error", "group", "isolated", "joins",
                 "runtime", "value", "wait")  # fmt: skip

    def __init__(self, runtime: Runtime, coroutine: Coroutine[Any, Any, Any],
                 group: TaskGroup | None, isolated: bool) -> None:  # fmt: skip
        self.runtime = runtime
        self.coroutine = coroutine
        self.group = group
        self.isolated = isolated
        self.cancelled = False
        self.done = False
        self.wait: Wait | None = None
        self.value: Any = None
        self.error: BaseException | None = None
        self.joins: list[Wait] = []

    def interrupt(self, error: BaseException) -> None:
        """Throw into the task at its await; it may clean up with further awaits."""
        if not self.done:
            if self.wait is not None:
                self.wait.abandon()
                self.wait = None
            self.runtime.ready.append((self, None, error))

    def cancel(self) -> None:
        """Throw `Cancelled` once: a second notice would cut the task's cleaning up short."""
        if not self.cancelled:
            self.cancelled = True
            self.interrupt(Cancelled())

    def finish(self, value: Any, error: BaseException | None) -> None:
        self.done = True
        self.value = value
        self.error = error
        runtime = self.runtime
        runtime.tasks_alive.pop(self, None)
        for wait in self.joins:
            wait.resolve(None)
        self.joins.clear()
        if self.group is not None:
            self.group.child_finished(self)
        else:
            runtime.root_finished(self)

    def kill(self) -> None:
        """Close the coroutine at once; nothing that it awaits in a `finally` is heard."""
        if self.done:
            return
        self.done = True
        if self.wait is not None:
            self.wait.abandon()
            self.wait = None
        self.joins.clear()
        for _ in range(_CLOSINGS):
            try:
                self.coroutine.close()
            except RuntimeError:
                # It awaited while being closed: nobody will answer, so it is closed there too.
                self.runtime.host.drop("awaited in a crash")
            except (Exception, Cancelled, Leaving):
                # A machine that stops runs no clean-up at all, so its failure means nothing.
                self.runtime.host.drop("raised in a crash")
                return
            else:
                return


class TaskHandle:
    """One task of a group."""

    __slots__ = ("_task",)

    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def done(self) -> bool:
        return self._task.done

    def cancel(self) -> None:
        """Ask the task to stop: `Cancelled` is thrown at its await, once."""
        self._task.cancel()

    def result(self) -> Any:
        """What the task returned, None if it was cancelled; raises its error, or ProgramError
        while it still runs."""
        task = self._task
        if not task.done:
            raise ProgramError("result() of a task that still runs (await join() first)")
        # Raised here, `Cancelled` would cancel whoever asks.
        if task.error is not None and not isinstance(task.error, Cancelled):
            raise task.error
        return task.value

    async def join(self) -> Any:
        """Wait for the task to end, then `result()`."""
        if not self._task.done:
            wait = Wait(self._task.runtime.ready)
            self._task.joins.append(wait)
            await wait
        return self.result()


class TaskGroup:
    """`async with peer.tasks() as group`: waits for all children; the first failure cancels the
    others and the body, and is raised. A child started with `isolate=True` fails alone: its error
    is kept in its handle.
    """

    __slots__ = ("_children", "_error", "_exit", "_inside", "_parent", "_runtime", "_stop",
                 "_stopping")  # fmt: skip

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._children: dict[Task, None] = {}
        self._parent: Task | None = None
        self._inside = False
        self._stopping = False
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        self._exit: Wait | None = None

    async def __aenter__(self) -> TaskGroup:
        if not self._runtime.alive:
            await Wait(self._runtime.ready)
        self._parent = self._runtime.current
        self._inside = True
        return self

    def start(self, coroutine: Coroutine[Any, Any, Any], isolate: bool = False) -> TaskHandle:
        """Run a coroutine beside the body; it takes its first step at the body's next await.

        In a group that is being cancelled it gets its first step and is then cancelled as well.
        """
        if not (self._inside and self._runtime.alive):
            coroutine.close()
            raise ProgramError("start() outside of `async with peer.tasks()` (enter the group)")
        task = self._runtime.spawn(coroutine, self, isolate)
        self._children[task] = None
        if self._stopping:
            task.cancel()
        return TaskHandle(task)

    def child_finished(self, task: Task) -> None:
        self._children.pop(task, None)
        error = task.error
        if error is not None and not isinstance(error, Cancelled) and not task.isolated:
            if self._error is None:
                self._error = error
                self._cancel_children()
                if self._exit is None and self._parent is not None:
                    self._stop = Stop()
                    self._parent.interrupt(self._stop)
            else:
                self._error.add_note(f"a sibling failed too: {error!r}")
        if not self._children and self._exit is not None:
            self._exit.resolve(None)

    def _cancel_children(self) -> None:
        self._stopping = True
        for child in list(self._children):
            child.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:  # fmt: skip
        if isinstance(error, GeneratorExit):
            return False
        body = error
        if error is not None:
            self._cancel_children()
        while self._children:
            self._exit = Wait(self._runtime.ready)
            try:
                await self._exit
            except GeneratorExit:
                raise
            except BaseException as told:
                # Told to stop while waiting: pass it on, and still leave no child behind.
                if error is None or error is self._stop:
                    error = told
                self._cancel_children()
        self._inside = False
        if self._stop is not None:
            self._stop.void = True
        if error is self._stop:
            error = None
        if self._error is not None:
            if error is None or isinstance(error, (Cancelled, Leaving)):
                raise self._error
            error.add_note(f"a child failed too: {self._error!r}")
        if error is not None and error is not body:
            raise error
        return False


def drain(ready: Ready) -> None:
    """Run every task that can run, until all are parked or done."""
    popleft = ready.popleft
    while ready:
        task, value, error = popleft()
        if task.done:
            continue
        runtime = task.runtime
        runtime.current = task
        try:
            if error is None:
                wait = task.coroutine.send(value)
            else:
                if isinstance(error, Stop) and error.void:
                    continue
                if task.wait is not None:
                    task.wait.abandon()
                wait = task.coroutine.throw(error)
        except StopIteration as stop:
            task.wait = None
            task.finish(stop.value, None)
        except BaseException as failure:
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise
            task.wait = None
            task.finish(None, failure)
        else:
            try:
                wait.task = task
                task.wait = wait
                if wait.done:
                    # Resolved before the task came to wait for it.
                    ready.append((task, *wait.early))
            except AttributeError:
                task.wait = None
                ready.append((task, None, _foreign(wait)))


def _foreign(awaited: Any) -> ProgramError:
    return ProgramError(
        f"a program awaited {type(awaited).__name__}, which is no effect of its peer (use "
        "peer.sleep_until, recv, compute ...; asyncio and other loops do not run here)"
    )
