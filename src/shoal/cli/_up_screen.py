"""How `shoal up` shows its processes: a screen on a terminal, elsewhere lines, or JSON Lines."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table

    from shoal.engine.live.fleet import Event, Fleet, Post
    from shoal.lab.up import Up

_STYLES = {
    "starting": "dim", "looking": "dim", "waiting": "dim", "running": "green", "done": "cyan",
    "ended": "dim", "stopping": "yellow", "pausing": "yellow", "died": "red", "failed": "red",
}  # fmt: skip
_WORTH_SEEING = ("failed", "died", "pausing", "stopping", "starting", "looking", "waiting")
_AROUND_TABLE = 10
"""lines of the screen besides the table's rows"""
_LATE_S = 5.0


class Shown(Protocol):
    """Shows what happens to a fleet; a context from the first process to the last."""

    def tell(self, fleet: Fleet, events: list[Event]) -> None: ...

    def stopping(self, hurry: bool) -> None:
        """Ctrl-C was pressed, once or again."""
        ...

    def __enter__(self) -> Shown: ...

    def __exit__(self, *error: object) -> None: ...


def shown(up: Up, *, quiet: bool, json: bool) -> Shown:
    """What suits the place that the output goes to."""
    if json:
        return _Json(up)
    if quiet:
        return _Lines(up, quiet=True)
    if not sys.stderr.isatty():
        return _Lines(up, quiet=False)
    from rich.console import Console

    return Screen(up, Console(stderr=True))


def _counts(fleet: Fleet) -> dict[str, int]:
    counts: dict[str, int] = {}
    for post in fleet.posts:
        counts[post.state] = counts.get(post.state, 0) + 1
    return counts


def _said(event: Event) -> str:
    text = f": {event.text}" if event.text else ""
    log = f" (log: {event.post.log})" if event.what in ("died", "failed") else ""
    return f"peer {event.post.peer} {event.what}{text}{log}"


class _Json:
    """An object for everything that happens to a process, and for progress about twice a second."""

    def __init__(self, up: Up) -> None:
        self._up = up
        self._last: Any = None
        self._next_s = 0.0

    def __enter__(self) -> _Json:
        from shoal.cli.console import json_line

        up = self._up
        host, port = up.bootstrap
        json_line(
            {
                "event": "up", "folder": str(up.folder), "peers": up.cell.scenario.peers,
                "processes": len(up.fleet.posts), "bootstrap": f"{host}:{port}",
            }
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def stopping(self, hurry: bool) -> None:
        from shoal.cli.console import json_line

        json_line({"event": "stopping", "hurry": hurry})

    def tell(self, fleet: Fleet, events: list[Event]) -> None:
        from shoal.cli.console import json_line

        for event in events:
            post = event.post
            json_line(
                {
                    "event": event.what, "peer": post.peer, "pid": post.pid, "text": event.text,
                    "restarts": post.restarts, "log": str(post.log),
                }
            )  # fmt: skip
        now = (fleet.round, _counts(fleet), sum(post.rejoined for post in fleet.posts))
        if now != self._last and monotonic() >= self._next_s:
            self._last, self._next_s = now, monotonic() + 0.4
            json_line(
                {
                    "event": "progress", "round": fleet.round, "rounds": self._up.rounds,
                    "states": now[1], "rejoined": now[2],
                }
            )  # fmt: skip


class _Lines:
    """What happens to a process at once, and progress at intervals."""

    def __init__(self, up: Up, *, quiet: bool) -> None:
        from shoal.cli.progress import Lines, interval_s

        self._up = up
        self._quiet = quiet
        self._lines = Lines("rounds")
        self._interval_s = interval_s()
        self._printed: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> _Lines:
        if not self._quiet:
            self._say(f"{len(self._up.fleet.posts)} processes, logs in {self._up.folder}")
            if self._up.invitation:
                self._say(f"others join by: {self._up.invitation}")
            self._printed = self._lines.printed(self._interval_s)
        self._printed.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._printed.__exit__(None, None, None)

    def stopping(self, hurry: bool) -> None:
        self._say("killing all processes" if hurry else "stopping; Ctrl-C again kills")

    def tell(self, fleet: Fleet, events: list[Event]) -> None:
        for event in events:
            if event.what not in ("started", "ended"):
                self._say(_said(event))
        note = ", ".join(f"{count} {state}" for state, count in _counts(fleet).items())
        total = self._up.rounds
        self._lines.tell(fleet.round + 1, max(total or 0, fleet.round + 1), note)

    def _say(self, text: str) -> None:
        from shoal.cli.console import say

        say(text, error=True)


class Screen:
    """One screen that is drawn again and again; what happened stays above it."""

    def __init__(self, up: Up, console: Console) -> None:
        self._up = up
        self._console = console
        self._note = ""
        self._begin_s = monotonic()
        self._live: Live

    def __enter__(self) -> Screen:
        from rich.live import Live

        self._live = Live(
            get_renderable=self.draw, console=self._console, refresh_per_second=4,
            transient=True,
        )  # fmt: skip
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    def stopping(self, hurry: bool) -> None:
        self._note = "killing all" if hurry else "stopping; Ctrl-C again kills"

    def tell(self, fleet: Fleet, events: list[Event]) -> None:
        # Printed above the screen, where they stay.
        for event in events:
            if event.what not in ("started", "ended"):
                style = "red" if event.what in ("died", "failed") else "yellow"
                self._live.console.print(_said(event), style=style, highlight=False)

    def draw(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        up, fleet = self._up, self._up.fleet
        room = max(3, self._console.height - _AROUND_TABLE)
        posts, hidden = chosen(fleet.posts, room)
        lines: list[Any] = [self._head(), self._bar(), self._table(posts)]
        if hidden:
            counts = ", ".join(f"{count} {state}" for state, count in _counts(fleet).items())
            lines.append(Text(f"  … {hidden} more; of all: {counts}", style="dim"))
        for name, value in (("logs", str(up.folder)), ("join", up.invitation)):
            if not value:
                continue
            text = Text(f"{name}  ", style="dim", no_wrap=True, overflow="ellipsis")
            lines.append(text.append(value, style="default"))
        lines.append(
            Text(self._note or "Ctrl-C stops all", style="yellow" if self._note else "dim")
        )
        return Group(*lines)

    def _head(self) -> Any:
        from rich.text import Text

        up, fleet = self._up, self._up.fleet
        minutes, seconds = divmod(int(monotonic() - self._begin_s), 60)
        text = Text(up.cell.arm, style="bold", no_wrap=True, overflow="ellipsis")
        text.append(f"  {len(fleet.posts)} of {up.cell.scenario.peers} peers here", style="default")
        if fleet.round >= 0:
            of = "" if up.rounds is None else f" of {up.rounds}"
            text.append(f"  round {fleet.round + 1}{of}", style="default")
        newest = up.accuracy()
        if newest is not None:
            text.append(f"  accuracy {newest[1]:.3f} after {newest[0] + 1}", style="default")
        return text.append(f"  {minutes}:{seconds:02d}", style="dim")

    def _bar(self) -> Any:
        from rich.progress_bar import ProgressBar

        total = self._up.rounds
        done = self._up.fleet.round + 1
        return ProgressBar(
            total=total or 1, completed=min(done, total) if total else 0,
            width=min(self._console.width, 72), pulse=total is None,
        )  # fmt: skip

    def _table(self, posts: list[Post]) -> Table:
        from rich import box
        from rich.table import Table

        from shoal.lab.text import number

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for head in ("peer", "pid"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for head in ("round", "sent", "received", "heard", "restarts"):
            table.add_column(head, justify="right", no_wrap=True)
        for post in posts:
            ago_s = monotonic() - post.heard_s
            heard = "" if post.over or post.state == "pausing" else f"{ago_s:.1f} s ago"
            traffic = [
                number(each, "bytes_sent") for each in (post.bytes_sent, post.bytes_received)
            ]
            table.add_row(
                str(post.peer), str(post.pid or ""), f"[{_STYLES[post.state]}]{_state(post)}[/]",
                str(post.round + 1) if post.round >= 0 else "", *traffic,
                f"[red]{heard}[/]" if heard and ago_s > _LATE_S else heard,
                str(post.restarts or ""),
            )  # fmt: skip
        return table


def _state(post: Post) -> str:
    if post.state == "pausing":
        return f"again in {max(0.0, post.resume_s - monotonic()):.0f} s"
    return "rejoined" if post.state == "running" and post.rejoined else post.state


def chosen(posts: list[Post], room: int) -> tuple[list[Post], int]:
    """The posts that fit, those that are not simply running first in line; how many do not."""
    if len(posts) <= room:
        return posts, 0
    first = sorted(
        posts,
        key=lambda p: _WORTH_SEEING.index(p.state) if p.state in _WORTH_SEEING else 99,
    )[:room]
    return sorted(first, key=lambda post: post.peer), len(posts) - room
