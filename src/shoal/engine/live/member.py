"""One process of a run, seen from both ends: a thread of this process, or a spawned one."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol

from shoal.base.errors import ProgramError, UsageError
from shoal.engine.live import control
from shoal.engine.live.driver import Driver
from shoal.engine.live.garbage import keep_collections_short
from shoal.tensor.threads import one_thread

Tell = Callable[[control.Report], None]


class Member(Protocol):
    """What the launcher needs of a process of its run; the last report is `Done` or `Gone`."""

    def begin(self) -> None: ...

    def send(self, command: control.Command) -> None:
        """Never raises: whether the process still lives is told by its reports."""
        ...

    def end(self, timeout_s: float) -> bool:
        """Leave nothing behind; whether it ended by itself."""
        ...


def _pass_on(driver: Driver, command: control.Command) -> None:
    """Give a command to a driver from another thread, whether its loop runs yet, or no more."""
    try:
        driver.loop.call_soon_threadsafe(driver.control, command)
    except RuntimeError:
        return  # The loop is closed: the run is over here.


class InThread:
    """The peers live in this process, on a loop of their own in a thread of their own.

    So a running loop of the caller (a notebook's) is no obstacle.
    """

    def __init__(self, plan: control.Plan, tell: Tell) -> None:
        self._tell = tell
        self._loop = asyncio.SelectorEventLoop()
        self._driver = Driver(plan, tell, self._loop)
        self._thread = threading.Thread(target=self._run, name="shoal live", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def send(self, command: control.Command) -> None:
        _pass_on(self._driver, command)

    def end(self, timeout_s: float) -> bool:
        if self._thread.ident is None:
            self._loop.close()
            return True
        self.send(control.Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._driver.run())
        except BaseException as error:
            # The thread's edge: the launcher raises it.
            self._tell(control.Failed(error))
        finally:
            self._loop.close()


class Spawned:
    """The peers live in a process of their own, started afresh (never forked).

    Both directions of the pipe have a thread of their own, so that neither a busy launcher nor a
    busy child stops the other.
    """

    def __init__(self, plan: bytes, tell: Tell) -> None:
        self._plan = plan
        self._tell = tell
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._theirs: Connection | None = theirs
        self._process = context.Process(target=_child, args=(theirs,), daemon=True)
        self._reader = threading.Thread(target=self._read, name="shoal member", daemon=True)

    def begin(self) -> None:
        # Ctrl-C reaches the whole group; the child inherits that it is blocked and ends when this
        # process says so, or is gone.
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        assert self._theirs is not None
        self._theirs.close()
        self._theirs = None
        self._reader.start()

    def send(self, command: control.Command) -> None:
        try:
            self._pipe.send_bytes(pickle.dumps(command, protocol=5))
        except OSError:
            return  # It is gone; the reader says so.

    def end(self, timeout_s: float) -> bool:
        if self._theirs is not None:
            self._theirs.close()
            self._pipe.close()
            return True
        self.send(control.Stop())
        self._process.join(timeout_s)
        alone = self._process.exitcode is not None
        for stop in (self._process.terminate, self._process.kill):
            if self._process.exitcode is None:
                stop()
                self._process.join(2.0)
        self._reader.join(2.0)
        self._pipe.close()
        if self._process.exitcode is not None:
            self._process.close()
        return alone

    def _read(self) -> None:
        try:
            self._pipe.send_bytes(self._plan)
            while True:
                report = pickle.loads(self._pipe.recv_bytes())
                self._tell(report)
                if isinstance(report, control.Done):
                    return
        except (EOFError, OSError):
            self._process.join(2.0)
            self._tell(control.Gone(self._process.exitcode))
        except Exception as error:
            # What the child sent cannot be read here, such as an error class of its own making.
            self._tell(control.Failed(error))
            self._tell(control.Gone(None))


# In the child.


def _child(pipe: Connection) -> None:
    # For a torch that a program loads only when it runs, too.
    with one_thread():
        _serve(pipe)


def _serve(pipe: Connection) -> None:
    reports: SimpleQueue[control.Report | None] = SimpleQueue()
    writer = threading.Thread(target=_write, args=(pipe, reports), daemon=True)
    writer.start()
    try:
        plan = _receive_plan(pipe)
        keep_collections_short()
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            loop = runner.get_loop()
            driver = Driver(plan, lambda report: reports.put(_portable(report)), loop)
            threading.Thread(target=_listen, args=(pipe, driver), daemon=True).start()
            runner.run(driver.run())
    except EOFError:
        pass  # The launcher is gone before it began.
    except BaseException as error:
        # The process's edge: the launcher raises it.
        reports.put(_portable(control.Failed(error)))
    reports.put(None)
    writer.join(10.0)


def _receive_plan(pipe: Connection) -> control.Plan:
    data = pipe.recv_bytes()
    try:
        return pickle.loads(data)
    except Exception as error:
        raise UsageError(
            f"run_live: a new process cannot import the programs: {type(error).__name__}: {error} "
            "(define them in a module or script, not in a notebook cell or `python -c`; "
            "processes=1 has no such limit)"
        ) from None


def _listen(pipe: Connection, driver: Driver) -> None:
    try:
        while True:
            _pass_on(driver, pickle.loads(pipe.recv_bytes()))
    except (EOFError, OSError):
        _pass_on(driver, control.Stop())
        # Nobody is left to end this process if a program keeps its loop busy for ever.
        guard = threading.Timer(driver.plan.settings.stop_s, os._exit, (1,))
        guard.daemon = True
        guard.start()


def _write(pipe: Connection, reports: SimpleQueue[control.Report | None]) -> None:
    try:
        while (report := reports.get()) is not None:
            try:
                data = pickle.dumps(report, protocol=5)
            except Exception as error:
                data = pickle.dumps(control.Failed(ProgramError(f"cannot be reported: {error}")))
            pipe.send_bytes(data)
    except OSError:
        return  # The launcher is gone; the listener ends the run.


def _portable(report: control.Report) -> control.Report:
    """The report with an error that another process can read, and where it came from."""
    if not isinstance(report, control.Failed):
        return report
    error: Any = report.error
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        notes = getattr(error, "__notes__", ())
        error = ProgramError(f"{type(error).__name__}: {error}")
        for note in notes:
            error.add_note(note)
    error.add_note(f"in another process:\n{trace}")
    return control.Failed(error)
