"""The processes of a run on this machine: each one peer that joins by address, kept up and watched.

The run belongs to the peers, not to this process: it starts them, hears what they report, starts
again those that die, and takes what they leave. It holds the other end of their standard input, so
that they end with it whatever becomes of it.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic, strftime

from shoal.base.errors import SimulationError, UsageError
from shoal.base.limits import check_positive
from shoal.engine.live import control
from shoal.engine.live.launch import Observer
from shoal.engine.live.lives import Life
from shoal.world.record import Happening, Run

TELL_S = 0.25
_REASON_CHARS = 300
_TAIL_BYTES = 4096
_OVER = ("ended", "died", "failed")


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """How processes are kept up; times in seconds.

    restarts: how often each peer that died is started again, from its store. backoff_s: the pause
    before that, doubled with every death of the same peer up to backoff_most_s. stop_s: how long
    they may take to end when told to; then they are killed. alone_s: how long a peer may go on when
    the run is over for another one: whoever comes back too late would wait for all the others.
    """

    restarts: int = 0
    backoff_s: float = 0.5
    backoff_most_s: float = 30.0
    stop_s: float = 15.0
    alone_s: float = 30.0

    def __post_init__(self) -> None:
        check_positive("FleetSettings", self, "backoff_s", "backoff_most_s", "stop_s", "alone_s")
        if self.restarts < 0:
            raise UsageError(f"FleetSettings: restarts={self.restarts}; need 0 or more")

    def pause_s(self, deaths: int) -> float:
        """The pause after a peer's death.

        >>> settings = FleetSettings(backoff_s=1.0, backoff_most_s=5.0)
        >>> [settings.pause_s(deaths) for deaths in (1, 2, 3, 4)]
        [1.0, 2.0, 4.0, 5.0]
        """
        return min(self.backoff_s * 2.0 ** min(deaths - 1, 60), self.backoff_most_s)


@dataclass
class Post:
    """One peer's place among the processes. All times are `time.monotonic` seconds.

    state: "starting"; then what the peer says ("looking", "waiting", "running", "done",
    "stopping"); "pausing" before a restart; at last "ended" (properly), "died" (killed) or "failed"
    (with an error, see `why`).
    """

    peer: int
    command: tuple[str, ...]
    log: Path
    state: str = "starting"
    pid: int = 0
    restarts: int = 0
    why: str = ""
    heard_s: float = 0.0
    lives: list[Life] = field(default_factory=list)
    resume_s: float = 0.0

    @property
    def over(self) -> bool:
        return self.state in _OVER

    @property
    def round(self) -> int:
        return max((life.round for life in self.lives), default=-1)

    @property
    def bytes_sent(self) -> int:
        return sum(life.bytes_sent for life in self.lives)

    @property
    def bytes_received(self) -> int:
        return sum(life.bytes_received for life in self.lives)

    @property
    def rejoined(self) -> bool:
        """Whether the process that lives now found its peer in its store."""
        return bool(self.lives) and self.lives[-1].rejoined


@dataclass(frozen=True)
class Event:
    """Something that happened to a process: "started", "restarted", "died", "failed", "ended"."""

    what: str
    post: Post
    text: str


class _Process:
    """One process, and the thread that reads its reports; `take` gets None as the last one."""

    def __init__(self, post: Post, take: Callable[[control.Report | None], None]) -> None:
        ours, theirs = os.pipe()
        command = [*post.command, "--reports", str(theirs)]
        post.log.parent.mkdir(parents=True, exist_ok=True)
        with post.log.open("ab") as log:
            log.write(f"--- {strftime('%F %T')} {' '.join(post.command)}\n".encode())
            log.flush()
            self.popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(theirs,),
                # Ctrl-C reaches the terminal's group; these end when this process says so.
                start_new_session=True,
                env={
                    **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
                    "PYTHONUNBUFFERED": "1",
                },
            )  # fmt: skip
        os.close(theirs)
        self._pipe = Connection(ours, writable=False)
        self._take = take
        self._reader = threading.Thread(target=self._read, name="shoal reports", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # A process that is killed may leave half a report.
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                self._take(pickle.loads(self._pipe.recv_bytes()))
        self._take(None)

    def ask_to_stop(self) -> None:
        with suppress(OSError):
            assert self.popen.stdin is not None
            self.popen.stdin.close()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.popen.kill()

    def bury(self, timeout_s: float) -> int:
        """Leave nothing of it behind; its exit code."""
        self.ask_to_stop()
        try:
            code = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.popen.wait()
        self._reader.join()
        self._pipe.close()
        return code


class Fleet:
    """Runs one process per post until all are over.

    commands: what starts each peer; `--reports FD` is added, where it must send pickled
    `control.Report`s. logs: where each one's output goes.
    """

    def __init__(self, commands: Sequence[Sequence[str]], logs: Sequence[Path],
                 settings: FleetSettings, observer: Observer | None = None) -> None:  # fmt: skip
        self.posts = [
            Post(peer, tuple(command), log)
            for peer, (command, log) in enumerate(zip(commands, logs, strict=True))
        ]
        self.happenings: list[Happening] = []
        self.begun = False
        """whether the run itself has begun"""
        self.settings = settings
        self._observer = observer
        self._processes: dict[int, _Process] = {}
        self._inbox: SimpleQueue[tuple[Post, control.Report | None]] = SimpleQueue()
        self._events: list[Event] = []
        self._start_s = 0.0
        self._stop_by_s: float | None = None
        self._over_s: float | None = None

    @property
    def round(self) -> int:
        return max(post.round for post in self.posts)

    def run(
        self, tell: Callable[[Fleet, list[Event]], None] | None = None,
        stop: threading.Event | None = None, hurry: threading.Event | None = None,
    ) -> None:  # fmt: skip
        """Until all are over. stop: end them properly; hurry: kill them. `tell` gets this and what
        happened since its last call, about four times a second."""
        try:
            for post in self.posts:
                self._begin(post, "started")
            while not all(post.over for post in self.posts):
                self._turn()
                if stop is not None and stop.is_set():
                    self.stop()
                if hurry is not None and hurry.is_set():
                    self._kill_all()
                if tell is not None:
                    events, self._events = self._events, []
                    tell(self, events)
        finally:
            self._kill_all()
            for process in self._processes.values():
                process.bury(self.settings.stop_s)
            self._processes.clear()

    def stop(self) -> None:
        """Tell all to end, and start none again."""
        if self._stop_by_s is not None:
            return
        self._stop_by_s = monotonic() + self.settings.stop_s
        for process in self._processes.values():
            process.ask_to_stop()
        for post in self.posts:
            if post.state == "pausing":
                post.state = "died"

    def runs(self, seed: int, peers: int) -> list[Run]:
        """What each process left, those that were killed included."""
        return [life.left(seed, peers) for post in self.posts for life in post.lives]

    @property
    def whole(self) -> bool:
        """Whether every peer ended properly with its run done, restarted or not."""
        return all(
            post.state == "ended" and (run := post.lives[-1].run) is not None and run.finished
            for post in self.posts
        )

    def _kill_all(self) -> None:
        self.stop()
        for process in self._processes.values():
            process.kill()

    def _turn(self) -> None:
        """Take what is reported within a moment, and do what is due."""
        end = monotonic() + TELL_S
        while (left := end - monotonic()) > 0:
            try:
                post, report = self._inbox.get(timeout=left)
            except Empty:
                break
            if report is None:
                self._gone(post)
            else:
                self._take(post, report)
        now = monotonic()
        for post in self.posts:
            if post.state == "pausing" and now >= post.resume_s:
                self._restart(post)
        if self._over_s is not None and now >= self._over_s + self.settings.alone_s:
            self.stop()
        if self._stop_by_s is not None and now >= self._stop_by_s:
            for process in self._processes.values():
                process.kill()

    def _begin(self, post: Post, what: str) -> None:
        post.state = "starting"
        post.lives.append(Life(post.peer))
        process = _Process(post, lambda report: self._inbox.put((post, report)))
        self._processes[post.peer] = process
        post.pid = process.popen.pid
        post.heard_s = monotonic()
        self._event(what, post, f"process {post.pid}")

    def _event(self, what: str, post: Post, text: str) -> None:
        self._events.append(Event(what, post, text))
        if what != "started":
            time_s = monotonic() - self._start_s if self.begun else 0.0
            # Short, since it stands at a mark in the report's plots; logs have the rest.
            self.happenings.append(
                Happening(time_s, text if what == "died" else what, (post.peer,))
            )

    def _take(self, post: Post, report: control.Report) -> None:
        post.heard_s = monotonic()
        life = post.lives[-1]
        life.take(report)
        if isinstance(report, control.Told):
            post.state = report.status.state
            if not self.begun and post.state in ("running", "done"):
                self.begun = True
                self._start_s = post.heard_s - report.status.time_s
        elif isinstance(report, control.Observed) and self._observer is not None:
            self._observer.params(report.peer, report.round, report.time_s, report.params)

    def _gone(self, post: Post) -> None:
        code = self._processes.pop(post.peer).bury(self.settings.stop_s)
        run = post.lives[-1].run
        # Whoever has had its last word has ended, also at the horizon, before all were done.
        if code == 0 or run is not None:
            post.state = "ended"
            if self._over_s is None and run is not None and run.finished:
                self._over_s = monotonic()
            self._events.append(Event("ended", post, ""))
            return
        killed = code < 0
        post.why = f"killed by {signal.Signals(-code).name}" if killed else _last_words(post.log)
        with post.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {strftime('%F %T')} process {post.pid}: {_how(code)}\n")
        what = "died" if killed else "failed"
        self._event(what, post, post.why)
        post.state = what
        # Misuse (2) would only happen again.
        again = code != 2 and post.restarts < self.settings.restarts and self._needed(post)
        if again and self._stop_by_s is None:
            post.state = "pausing"
            post.resume_s = monotonic() + self.settings.pause_s(post.restarts + 1)
        elif not self.begun and self._stop_by_s is None:
            raise SimulationError(
                f"peer {post.peer} {what} before the run began: {post.why} (see {post.log})"
            )

    def _needed(self, post: Post) -> bool:
        """A peer whose others have all ended has nobody to come back to."""
        others = [other for other in self.posts if other is not post]
        return not others or not all(other.over for other in others)

    def _restart(self, post: Post) -> None:
        if not self._needed(post):
            post.state = "died"
            return
        post.restarts += 1
        self._begin(post, "restarted")


def free_port(host: str) -> int:
    """A port of this machine that is free now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, 0), family=family) as found:
            return found.getsockname()[1]
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}: {error.strerror} (name an address of this machine)"
        ) from None


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _last_words(log: Path) -> str:
    """Why a process says that it failed: the last line of its log that names an error."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    named = [line for line in lines if line.startswith(("error: ", "internal error: "))]
    said = (named or [line for line in lines if line.strip()] or [""])[-1]
    return said.removeprefix("error: ")[:_REASON_CHARS]
