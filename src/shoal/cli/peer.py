"""`shoal peer`: one peer of a run, which needs nothing but addresses to find the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.options import (
    Device,
    Json,
    Peers,
    Quiet,
    Seed,
    Settings,
    overrides,
    system_names,
)  # fmt: skip

if TYPE_CHECKING:
    from shoal.engine.live.joining import Status
    from shoal.wire.identity import Identity
    from shoal.world.record import Row, Run


def command(
    what: Annotated[
        str | None, typer.Argument(metavar="FILE_OR_NAME",
                                   help="A .toml file, or a system's name.",
                                   autocompletion=system_names),
    ] = None,
    id: Annotated[
        int | None, typer.Option("--id", min=0, help="Which peer to be (default: a free one)."),
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen."),
    ] = "127.0.0.1:0",
    advertise: Annotated[
        str | None, typer.Option("--advertise", metavar="HOST:PORT",
                                 help="Where others reach it, if elsewhere."),
    ] = None,
    bootstrap: Annotated[
        str | None, typer.Option("--bootstrap", metavar="HOST:PORT,..",
                                 help="Addresses of other peers; without any, found the run."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="Key file; made if it is not there."),
    ] = None,
    allow: Annotated[
        Path | None, typer.Option("--allow",
                                  help="Names of those who may take part, one a line."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store",
                                  help="Folder to go on from after a crash (one for each peer)."),
    ] = None,
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm of a file.")] = None,
    wait: Annotated[
        int | None, typer.Option("--wait", min=1, help="Start with so many peers (default: all)."),
    ] = None,
    start_s: Annotated[
        float, typer.Option("--start-s", min=0.1, help="How long to wait for the start."),
    ] = 600.0,
    gone_s: Annotated[
        float, typer.Option("--gone-s", min=0.1,
                            help="How long to wait at the end for peers that are silent."),
    ] = 10.0,
    show_name: Annotated[
        bool, typer.Option("--show-name", help="Print the name of the key, for --allow lists."),
    ] = False,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="Stop when standard input is closed."),
    ] = False,
    seed: Seed = None, peers: Peers = None, device: Device = None, settings: Settings = None,
    quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Be one peer of a run on real machines.

    All peers are started with the same file or name, settings and seed. One is started without
    --bootstrap and founds the run; it begins when all are there, or as many as its --wait says.
    Others may come later, and one that was killed goes on from its --store.

    Messages between peers are encrypted, and --allow says who may take part; without it anybody who
    reaches a peer may. Addresses are exchanged in the clear.

    Examples:
      shoal peer dpsgd --peers 2 --set topology=full --listen 0.0.0.0:7000
      shoal peer dpsgd --peers 2 --set topology=full --bootstrap 192.168.1.5:7000
      shoal peer --key me.key --show-name
    """
    from shoal.base.errors import UsageError
    from shoal.cli.run import experiment_of

    identity = _identity(key, store)
    if show_name:
        typer.echo(identity.name)
        raise typer.Exit
    if what is None:
        raise UsageError("FILE_OR_NAME is missing (such as `shoal peer dpsgd`)")
    from shoal.engine.live.joining import Joining
    from shoal.lab.joined import chosen, run_peer

    experiment = experiment_of(what)
    experiment.engine = "live"
    experiment.overrides = overrides(settings, peers, device)
    if seed is not None:
        experiment.seeds = (seed,)
    joining = Joining(
        listen=_address(listen, "--listen"),
        advertise=None if advertise is None else _address(advertise, "--advertise"),
        bootstrap=tuple(_address(a, "--bootstrap") for a in (bootstrap or "").split(",") if a),
        peer=id, identity=identity, allow=None if allow is None else _names(allow),
        wait_for=wait, gone_s=gone_s,
    )  # fmt: skip
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if until_eof:
        threading.Thread(target=_follow, args=(stop,), daemon=True).start()
    teller = _Teller(quiet, json)
    run = run_peer(
        chosen(experiment, arm), joining, store="" if store is None else str(store),
        start_s=start_s, tell=teller.tell, stop=stop,
    )  # fmt: skip
    teller.end(run)
    raise typer.Exit(0 if run.finished or stop.is_set() else 1)


def _identity(key: Path | None, store: Path | None) -> Identity:
    from shoal.wire.identity import Identity

    if key is not None:
        return Identity.load_or_new(key)
    return Identity.new() if store is None else Identity.load_or_new(store / "peer.key")


def _address(text: str, option: str) -> tuple[str, int]:
    """`HOST:PORT` or `[HOST]:PORT` as an address."""
    from shoal.base.errors import UsageError

    host, colon, port = text.strip().rpartition(":")
    if not colon or not port.isdigit() or int(port) >= 1 << 16:
        raise UsageError(f"{option} {text}; need HOST:PORT (such as 192.168.1.5:7000)")
    return host.strip("[]") or "0.0.0.0", int(port)


def _names(path: Path) -> frozenset[str]:
    """The list of who may take part."""
    from shoal.base.errors import UsageError
    from shoal.wire.identity import is_name

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--allow {path}: {error.strerror} (name a file)") from None
    names = set()
    for number, line in enumerate(lines, 1):
        name = line.partition("#")[0].strip()
        if name and not is_name(name):
            raise UsageError(
                f"{path}:{number}: {name!r} is no peer's name (`shoal peer --key FILE --show-name` "
                "prints one)"
            )
        names.add(name)
    return frozenset(names - {""})


def _follow(stop: threading.Event) -> None:
    """Whoever started this process holds the other end of its standard input."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()
    # A program that keeps its loop busy must not outlive its parent either.
    threading.Timer(30.0, os._exit, (1,)).start()


class _Teller:
    """What the peer is doing: JSON Lines on stdout, or a line on stderr when its state changes."""

    def __init__(self, quiet: bool, json: bool) -> None:
        self._quiet = quiet
        self._json = json
        self._last: Any = None

    def tell(self, status: Status, rows: list[Row]) -> None:
        from shoal.cli.console import json_line, say

        if self._json:
            for row in rows:
                json_line(
                    {
                        "event": "row", "name": row.name, "value": row.value, "time_s": row.time_s,
                        "round": row.round, "peer": row.peer, "labels": dict(row.labels),
                    }
                )  # fmt: skip
            if status != self._last:
                json_line({"event": "status", "pid": os.getpid(), **vars(status)})
            self._last = status
        elif not self._quiet and self._last != (now := (status.state, status.known)):
            self._last = now
            host, port = status.address
            who = status.peer if status.peer >= 0 else "?"
            say(
                f"peer {who}: {status.state} at {host}:{port}, {status.known} other peers known"
                + (", rejoined" if status.rejoined else ""),
                error=True,
            )

    def end(self, run: Run) -> None:
        from shoal.cli.console import json_line, say

        last = {
            row.name: row.value for row in run.rows if row.peer >= 0 or row.name != "bytes_sent"
        }
        figures = {
            "seconds": run.virtual_s, "messages_sent": run.messages_sent,
            "messages_delivered": run.messages_delivered, "bytes_sent": sum(run.bytes_sent),
            "finished": run.finished,
        }  # fmt: skip
        if self._json:
            json_line({"event": "end", **figures, "last": last})
            return
        for name, value in {**figures, **last}.items():
            say(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
