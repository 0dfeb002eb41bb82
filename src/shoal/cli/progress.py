"""How far a long command is, on stderr: a bar on a terminal, elsewhere plain lines."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.lab.experiment import Tick

EVERY_S = 10.0
"""Seconds between plain lines, unless SHOAL_PROGRESS_S says otherwise."""


class Tell(Protocol):
    """Takes what is done of a total, and what is in hand. earlier: it was done before this run."""

    def __call__(
        self, done: float, total: float, note: str = "", *, earlier: bool = False
    ) -> None: ...


@contextmanager
def progress(unit: str, *, quiet: bool, json: bool) -> Iterator[Tell | None]:
    """Shows the progress of a command that counts in `unit` ("runs"); None when quiet.

    With json there are plain lines even on a terminal, where a bar would run into stdout.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty() and not json:
        with _bar(unit) as tell:
            yield tell
    else:
        lines = Lines(unit)
        with lines.printed(interval_s()):
            yield lines.tell


def of_ticks(tell: Tell | None) -> Callable[[Tick], None] | None:
    """The progress of an experiment."""
    if tell is None:
        return None

    def tick(now: Tick) -> None:
        note = ""
        # A run without a horizon in seconds has a note before any part of it can be told.
        ended = now.reused or now.note.startswith("done")
        if now.part or (now.note and not ended):
            note = f"{now.cell}{' ' if now.note.startswith('and ') else ', '}{now.note}"
        tell(min(now.done + now.part, now.total), now.total, note, earlier=now.reused)

    return tick


class Lines:
    """The state of a command, as a line that can be printed at any time."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._watch = Stopwatch()
        self._first: tuple[float, float] | None = None
        self._now: tuple[float, float, str] | None = None

    def tell(self, done: float, total: float, note: str = "", *, earlier: bool = False) -> None:
        if earlier or self._first is None:
            self._first = (done, self._watch.wall_s)
        self._now = (done, total, note)

    def line(self) -> str:
        """ "12 of 40 runs, dpsgd, seed 3, round 20 of 50, about 40 s left"."""
        if self._now is None or self._first is None:
            return "starting"
        done, total, note = self._now
        first, since_s = self._first
        parts = [f"{int(done + 1e-9)} of {int(total)} {self.unit}", note]
        if first < done < total:
            left_s = (self._watch.wall_s - since_s) * (total - done) / (done - first)
            parts.append(f"about {_rough(left_s)} left")
        return ", ".join(filter(None, parts))

    @contextmanager
    def printed(self, every_s: float) -> Iterator[None]:
        """Prints the line at intervals, whether anything has happened or not."""
        ended = threading.Event()

        def go_on() -> None:
            while not ended.wait(every_s):
                print(self.line(), file=sys.stderr, flush=True)

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def interval_s() -> float:
    """Seconds between plain lines."""
    text = os.environ.get("SHOAL_PROGRESS_S", "")
    try:
        every_s = float(text) if text else EVERY_S
    except ValueError:
        every_s = 0.0
    if not 0.0 < every_s < threading.TIMEOUT_MAX:
        raise UsageError(f"SHOAL_PROGRESS_S={text}; need seconds above 0 (mend or unset it)")
    return every_s


def _rough(left_s: float) -> str:
    """A time as far as an estimate is worth.

    >>> _rough(7.3), _rough(43.0), _rough(100.0), _rough(5000.0)
    ('7 s', '40 s', '2 min', '83 min')
    """
    if left_s < 10:
        return f"{max(1, round(left_s))} s"
    return f"{round(left_s, -1):.0f} s" if left_s < 95 else f"{round(left_s / 60)} min"


@contextmanager
def _bar(unit: str) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(bar_width=32), TextColumn("{task.completed:.1f}/{task.total:.0f} " + unit),
        TimeElapsedColumn(), TextColumn("{task.fields[note]}", style="dim"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        # The columns format the total, which is known with the first word.
        task = shown.add_task("", total=1, note="")

        def tell(done: float, total: float, note: str = "", *, earlier: bool = False) -> None:
            shown.update(task, completed=done, total=total, note=note)

        yield tell
