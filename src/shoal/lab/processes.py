"""A cell whose peers are processes of this machine, of which the fault list kills some for real."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.lab.cell import Cell, Progress
from shoal.world.faults import Crash, Round
from shoal.world.record import Run

if TYPE_CHECKING:
    from shoal.engine.live.fleet import Event, Fleet, Post

RESTART_S = 0.2
"""Pause before a peer that was killed is started again; it then takes its time to come up."""

_UP = ("looking", "waiting", "running")


def run_processes(cell: Cell, progress: Progress | None = None) -> Run:
    """Run a cell as `shoal up` does, and return what its processes left.

    Crashes of the fault list send SIGKILL to the peers' processes: at seconds since the start of
    the run, within a quarter of a second, and not to a peer that is down or still comes up. A peer
    whose crash has an `until` is started again at once, from its store, whenever that is. All other
    faults mean what they mean on `live`. The run is `finished` when every process ended properly,
    restarted or not.

    Its numbers depend on this machine and its load, so no two runs are equal.
    """
    from shoal.engine.live.fleet import FleetSettings
    from shoal.lab.up import Up

    crashes, world = _parted(cell)
    hits = Counter(peer for crash in crashes if crash.until is not None for peer in crash.who)
    restarts = max(hits.values(), default=0)
    settings = FleetSettings(restarts=restarts, backoff_s=RESTART_S, backoff_most_s=RESTART_S)
    with TemporaryDirectory(prefix="shoal-") as folder:
        up = Up(world, world.scenario.peers, Path(folder) / "run", settings=settings, gone_s=2.0)
        killer = _Killer(crashes, cell.scenario.rounds, progress)
        return up.run(killer.look).run


def _parted(cell: Cell) -> tuple[list[Crash], Cell]:
    """The crashes in the order of their times, and the cell without them."""
    crashes: list[Crash] = []
    others: list[Any] = []
    for setting in cell.scenario.explicit_faults():
        fault = setting.explicit()
        if not isinstance(fault, Crash):
            others.append(setting)
            continue
        if isinstance(fault.at, Round) or fault.store == "lost":
            raise UsageError(
                f"{cell.arm}: a crash at {fault.at} with store={fault.store!r}; processes are "
                "killed at seconds and keep their stores (write at = 12.5)"
            )
        crashes.append(fault)
    if len({crash.until is None for crash in crashes}) > 1:
        raise UsageError(
            f"{cell.arm}: some crashes are for good and some are not; processes are started again "
            "all or not at all (give all an until, or none)"
        )
    crashes.sort(key=lambda crash: float(crash.at))  # type: ignore[arg-type]
    world = replace(cell.scenario, faults=tuple(others))
    return crashes, replace(cell, scenario=world, engine="live")


class _Killer:
    """Looks at the fleet a few times a second and does what is due."""

    def __init__(
        self, crashes: Sequence[Crash], rounds: int | None, progress: Progress | None
    ) -> None:
        self._due = list(crashes)
        self._rounds = rounds
        self._progress = progress

    def look(self, fleet: Fleet, events: list[Event]) -> None:
        now_s = max((_time_s(post) for post in fleet.posts), default=0.0)
        while self._due and fleet.begun and float(self._due[0].at) <= now_s:  # type: ignore[arg-type]
            for peer in self._due.pop(0).who:
                if fleet.posts[peer].state in _UP:
                    # It is reaped by this very thread, so the number is still its own.
                    with suppress(ProcessLookupError):
                        os.kill(fleet.posts[peer].pid, signal.SIGKILL)
        if self._progress is not None:
            part = max(0, fleet.round + 1) / self._rounds if self._rounds else 0.0
            self._progress(min(1.0, part), f"round {fleet.round + 1}, {now_s:.0f} s")


def _time_s(post: Post) -> float:
    """Seconds since the start of the run, as its process last said."""
    status = post.lives[-1].status if post.lives else None
    return 0.0 if status is None or status.state not in _UP else status.time_s
