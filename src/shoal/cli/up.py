"""`shoal up`: a scenario or system as processes of this machine, which are watched."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.options import (
    Device,
    Json,
    Out,
    Peers,
    Quiet,
    Seed,
    Settings,
    system_names,
)  # fmt: skip

if TYPE_CHECKING:
    from shoal.cli._up_screen import Shown
    from shoal.lab.cell import Cell
    from shoal.lab.report import Report
    from shoal.lab.up import Up, Upped


def command(
    count: Annotated[int, typer.Argument(metavar="N", help="How many processes, a peer in each.")],
    what: Annotated[
        str, typer.Argument(metavar="FILE_OR_NAME", help="A .toml file, or a system's name.",
                            autocompletion=system_names),
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT",
                          help="Where others reach the first peer; port 0 is any free one."),
    ] = "127.0.0.1:0",
    allow: Annotated[
        Path | None, typer.Option("--allow",
                                  help="Names of those who may join from elsewhere, one a line."),
    ] = None,
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm of a file.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start a peer that died again, from its store."),
    ] = False,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="How often at most, each peer."),
    ] = 5,
    wait: Annotated[
        int | None, typer.Option("--wait", min=1, help="Start with so many peers (default: N)."),
    ] = None,
    start_s: Annotated[
        float, typer.Option("--start-s", min=0.1, help="How long to wait for the start."),
    ] = 300.0,
    gone_s: Annotated[
        float, typer.Option("--gone-s", min=0.1,
                            help="How long to wait at the end for peers that are silent."),
    ] = 10.0,
    seed: Seed = None, peers: Peers = None, device: Device = None, settings: Settings = None,
    out: Out = None, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Run a scenario on N processes of this machine, and watch them.

    Each peer is a process of its own, as `shoal peer` would start it, with a log and a store. A run
    has N peers unless --peers says more: the others join from anywhere, at any time, by the command
    that is shown. The report is that of `shoal run`; a peer that was killed counts with what it had
    told. Ctrl-C stops all and reports what there is.

    Nobody but the N may take part, unless --peers leaves room: then anybody who reaches --listen,
    or those whose names --allow lists.

    Examples:
      shoal up 8 dpsgd --set topology=ring --set rounds=40
      shoal up 6 examples/sockets.toml --restart
      shoal up 2 dpsgd --peers 3 --set topology=full --listen 192.168.1.5:7000
    """
    from shoal.base.errors import UsageError
    from shoal.cli._up_screen import shown
    from shoal.cli.console import report_folder, say
    from shoal.cli.peer import address, experiment_of_run, names_in
    from shoal.engine.live.fleet import FleetSettings
    from shoal.lab.joined import chosen
    from shoal.lab.store import Store, default_folder
    from shoal.lab.up import Up, report_of

    if count < 1:
        raise UsageError(f"up {count}: need at least 1 process (such as `shoal up 4 dpsgd`)")
    if not quiet and not json:
        say(f"preparing {count} processes …", "dim", error=True)
    experiment = experiment_of_run(what, seed, peers or count, device, settings)
    cell = chosen(experiment, arm)
    with Store() as store:
        reports = report_folder(out)
        up = Up(
            cell, count, _folder(default_folder() / "up", cell), listen=address(listen, "--listen"),
            allow=None if allow is None else names_in(allow), wait_for=wait,
            settings=FleetSettings(restarts=restarts if restart else 0), start_s=start_s,
            gone_s=gone_s,
        )  # fmt: skip
        stop, hurry = threading.Event(), threading.Event()
        with shown(up, quiet=quiet, json=json) as screen, _signals(stop, hurry, screen):
            upped = up.run(screen.tell, stop, hurry)
            report = report_of(experiment, cell, upped, store, up.folder.name)
            path = report.save(reports, f"{report.slug()}-up")
    if stop.is_set() and not json:
        say("stopped; the report tells how far it came", "yellow", error=True)
    (_show_json if json else _show)(up, upped, report, path)
    raise typer.Exit(130 if stop.is_set() else int(bool(upped.lost)))


def _folder(parent: Path, cell: Cell) -> Path:
    """The first folder for a run of this arm that is not there yet."""
    words = "".join(c if c.isalnum() else " " for c in cell.arm.lower()).split()
    name = "-".join(words) or "run"
    return next(
        folder for n in itertools.count(1) if not (folder := parent / f"{name}-{n}").exists()
    )


@contextmanager
def _signals(stop: threading.Event, hurry: threading.Event, screen: Shown) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the run; a second one kills. Neither cuts a file in half."""

    def asked(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()
        screen.stopping(hurry.is_set())

    before = {each: signal.signal(each, asked) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _show(up: Up, upped: Upped, report: Report, path: Path) -> None:
    from shoal.cli.console import say, show_report

    show_report(report, path)
    for post in up.fleet.posts:
        if post.restarts:
            times = "once" if post.restarts == 1 else f"{post.restarts} times"
            say(f"peer {post.peer}: started again {times} (log: {post.log})")
        if post.peer in upped.lost:
            say(f"peer {post.peer}: {post.state}: {post.why} (log: {post.log})", "red")


def _show_json(up: Up, upped: Upped, report: Report, path: Path) -> None:
    from shoal.cli.console import json_line, show_report_json

    restarts = {str(post.peer): post.restarts for post in up.fleet.posts if post.restarts}
    json_line(
        {
            "event": "end", "finished": upped.run.finished, "lost": upped.lost,
            "restarts": restarts,
        }
    )  # fmt: skip
    show_report_json(report, path)
