"""`run_live`: all peers of a network on real sockets, in this process or in several."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing import process as current
from queue import Empty, SimpleQueue
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Protocol

from shoal.base.errors import SimulationError, UsageError
from shoal.base.limits import DEFAULT, Limits
from shoal.base.stopwatch import Stopwatch
from shoal.engine.live import control
from shoal.engine.live.member import InThread, Member, Spawned
from shoal.engine.live.merging import merged
from shoal.engine.live.schedule import check_faults
from shoal.engine.live.settings import LiveSettings
from shoal.kernel.peer import Program
from shoal.tensor.threads import one_thread
from shoal.wire.frame import agreement
from shoal.world.network import Network
from shoal.world.record import Happening, Row, Run

if TYPE_CHECKING:
    from torch import Tensor

# How far ahead the start is announced: longer than a command takes to reach a process.
_AHEAD_NS = {True: 10_000_000, False: 200_000_000}


class Observer(Protocol):
    """Sees what peers record under "params"; measures, but never answers."""

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None: ...

    def rows(self) -> list[Row]: ...


def run_live(
    programs: Program | Callable[[int], Program], network: Network, *, seed: int = 0,
    processes: int = 1, settings: LiveSettings | None = None, observer: Observer | None = None,
    limits: Limits = DEFAULT, progress: Callable[[float, int], None] | None = None,
) -> Run:  # fmt: skip
    """Run one program on every peer (or `programs(peer)` on each) over loopback TCP until all are
    done or `settings.horizon_s` is over.

    With several processes, peer p lives in process p % processes; programs and network must then be
    picklable and importable, and a script must call this under `if __name__ == "__main__":`. A
    process that dies is reported among `Run.happenings`, and the others go on; `finished` is then
    False. An error that a program does not handle ends the run and is raised here. `progress` gets
    (seconds since the start, events) a few times a second.

    `network.links` and `network.device` are not imitated, but for `links.loss` and the faults.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Hello:
    ...     async def run(self, peer):
    ...         peer.record("id", peer.id)
    >>> sorted(row.value for row in run_live(Hello(), Network(2)).rows)
    [0.0, 1.0]
    """
    settings = settings or LiveSettings()
    check_faults(network.faults)
    if network.nats:
        raise UsageError(
            f"run_live: {len(network.nats)} NAT boxes; they exist on the virtual network only (use "
            "the event engine, or leave nats empty)"
        )
    if not 1 <= processes <= network.peers:
        raise UsageError(
            f"run_live: processes={processes}; need 1 to {network.peers}, one peer each at least"
        )
    if getattr(current.current_process(), "_inheriting", False):
        raise UsageError(
            "run_live: called while a new process imports this script (put the call under "
            '`if __name__ == "__main__":`)'
        )
    _check_host(settings.host)
    factory = programs if callable(programs) else control.ByPeer((programs,) * network.peers)
    plans = [
        control.Plan(
            factory, network, seed, settings, limits, tuple(range(part, network.peers, processes)),
            lead=part == 0, observed=observer is not None, counted=progress is not None,
        )
        for part in range(processes)
    ]  # fmt: skip
    with one_thread():
        return _Launch(plans, observer, progress).run()


def _check_host(host: str) -> None:
    """Say that peers cannot listen there before there are any."""
    try:
        socket.create_server((host, 0)).close()
    except OSError as error:
        raise UsageError(
            f"run_live: cannot listen on {host}: {error.strerror} (name an address of this machine)"
        ) from None


def _packed(plans: Sequence[control.Plan]) -> list[bytes]:
    """The plans as bytes, all with every program, so that every process imports every module."""
    peers = range(plans[0].network.peers)
    programs = control.ByPeer(tuple(plans[0].program(peer) for peer in peers))
    try:
        return [pickle.dumps(_replaced(plan, programs), protocol=5) for plan in plans]
    except Exception as error:
        raise UsageError(
            f"run_live: the programs or the network cannot go to another process: {error} (define "
            "classes and functions at the top of a module, or use processes=1)"
        ) from error


def _replaced(plan: control.Plan, programs: control.ByPeer) -> control.Plan:
    return control.Plan(**{**vars(plan), "program": programs})


class _Launch:
    """One run, from the first process to the merged result."""

    def __init__(self, plans: Sequence[control.Plan], observer: Observer | None,
                 progress: Callable[[float, int], None] | None) -> None:  # fmt: skip
        self._plans = plans
        self._settings = plans[0].settings
        self._observer = observer
        self._progress = progress
        self._inbox: SimpleQueue[tuple[int, control.Report]] = SimpleQueue()
        self._members: list[Member] = []
        self._alive = dict.fromkeys(range(len(plans)))
        self._idle = [False] * len(plans)
        self._entered = [0] * len(plans)
        self._round = -1
        self._events = [0] * len(plans)
        self._ready: dict[int, control.Ready] = {}
        self._runs: dict[int, Run] = {}
        self._deaths: list[Happening] = []
        self._start_s = 0.0

    def run(self) -> Run:
        watch = Stopwatch()
        try:
            self._begin()
            finished = self._watch()
            self._collect()
        finally:
            late = [m for m in self._members if not m.end(self._settings.stop_s)]
        if late:
            raise SimulationError(
                f"{len(late)} of {len(self._members)} processes did not end in "
                f"{self._settings.stop_s} s: a program holds its loop (use peer.compute for work)"
            )
        return self._merge(watch, finished and not self._deaths)

    def _begin(self) -> None:
        plans = self._plans
        if len(plans) == 1:
            self._members.append(InThread(plans[0], lambda r: self._inbox.put((0, r))))
        else:
            for part, data in enumerate(_packed(plans)):
                self._members.append(
                    Spawned(data, lambda report, part=part: self._inbox.put((part, report)))
                )
        for member in self._members:
            member.begin()
        limit = monotonic() + self._settings.start_s
        while len(self._ready) < len(plans):
            if not self._next(limit):
                raise SimulationError(
                    f"{len(plans) - len(self._ready)} of {len(plans)} processes did not come up in "
                    f"{self._settings.start_s} s (raise start_s on a slow machine)"
                )
            if self._deaths:
                raise SimulationError(f"a process died before the start: {self._deaths[0].what}")
        self._announce()

    def _announce(self) -> None:
        addresses = {p: a for ready in self._ready.values() for p, a in ready.addresses.items()}
        digest = agreement(os.urandom(16), self._schemas())
        ahead = _AHEAD_NS[len(self._members) == 1]
        self._start_s = monotonic() + ahead / 1e9
        keys = {p: key for ready in self._ready.values() for p, key in ready.keys.items()}
        self._broadcast(control.Start(addresses, digest, time_ns() + ahead, keys))

    def _schemas(self) -> dict[str, str]:
        """Every message that any process declares; all must mean the same by a name."""
        merged: dict[str, str] = {}
        for ready in self._ready.values():
            for kind, text in ready.schemas.items():
                if merged.setdefault(kind, text) != text:
                    raise UsageError(
                        f"run_live: two processes declare {kind} differently: {merged[kind]} and "
                        f"{text} (declare it once, at the top of a module)"
                    )
        return merged

    def _watch(self) -> bool:
        """Until all programs are done; False when the horizon came first."""
        end = self._start_s + self._settings.horizon_s
        while self._alive:
            if all(self._idle[part] for part in self._alive):
                return True
            if monotonic() >= end:
                return False
            self._next(end)
        raise SimulationError(
            f"all {len(self._members)} processes died; the last: {self._deaths[-1].what}"
        )

    def _collect(self) -> None:
        self._broadcast(control.Stop())
        limit = monotonic() + self._settings.stop_s
        while len(self._runs) < len(self._alive):
            if not self._next(limit):
                return

    def _broadcast(self, command: control.Command, besides: int = -1) -> None:
        for part in self._alive:
            if part != besides:
                self._members[part].send(command)

    def _next(self, limit_s: float) -> bool:
        """Take one report, or show progress; False when the limit is over."""
        left = limit_s - monotonic()
        if left <= 0:
            return False
        try:
            # A short wait at a time keeps Ctrl-C and the progress display alive.
            part, report = self._inbox.get(timeout=min(left, 0.25))
        except Empty:
            return True
        self._take(part, report)
        return True

    def _take(self, part: int, report: control.Report) -> None:
        match report:
            case control.Ready():
                self._ready[part] = report
            case control.Idle():
                # News from before a round that it did not know of yet do not count.
                self._idle[part] = report.idle and report.entered == self._entered[part]
            case control.Entered():
                self._pass_round(part, report)
            case control.Observed():
                if self._observer is not None:
                    self._observer.params(report.peer, report.round, report.time_s, report.params)
            case control.Counted():
                self._events[part] = report.events
                if self._progress is not None:
                    self._progress(max(0.0, monotonic() - self._start_s), sum(self._events))
            case control.Failed():
                raise report.error
            case control.Done():
                self._runs[part] = report.run
            case control.Gone():
                self._bury(part, report.code)

    def _pass_round(self, part: int, report: control.Entered) -> None:
        if report.round <= self._round:
            return
        self._round = report.round
        for other in self._alive:
            if other != part:
                self._idle[other] = False
                self._entered[other] += 1
        self._broadcast(report, besides=part)

    def _bury(self, part: int, code: int | None) -> None:
        if part in self._runs:
            return
        self._alive.pop(part, None)
        peers = self._plans[part].peers
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        self._deaths.append(
            Happening(max(0.0, monotonic() - self._start_s), f"process {part} died ({how})", peers)
        )

    def _merge(self, watch: Stopwatch, finished: bool) -> Run:
        plan = self._plans[0]
        parts = [self._runs[part] for part in sorted(self._runs)]
        run = merged(parts, plan.seed, plan.network.peers)
        run.finished = finished
        run.settings = {**asdict(self._settings), "processes": len(self._plans)}
        run.happenings += self._deaths
        run.happenings.sort(key=lambda happening: happening.time_s)
        if self._observer is not None:
            run.rows += self._observer.rows()
        run.wall_s = watch.wall_s
        run.cpu_s = watch.cpu_s
        if len(self._plans) > 1:
            run.cpu_s += sum(run.cpu_s for run in parts)
        return run
