"""`shoal peer`: one peer of a run, which needs nothing but addresses to find the others."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    from torch import Tensor

    from shoal.engine.live.control import Report, Told
    from shoal.engine.live.joining import Status
    from shoal.lab.cell import Cell
    from shoal.lab.experiment import Experiment
    from shoal.wire.identity import Identity
    from shoal.world.record import Row, Run


def command(
    what: Annotated[
        str | None, typer.Argument(metavar="FILE_OR_NAME",
                                   help="A .toml file, a system's name, or the run.json of a run.",
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
    carriers: Annotated[
        str, typer.Option("--carriers", metavar="tcp,quic",
                          help="How connections that both sides open past routers may go."),
    ] = "tcp",
    upnp: Annotated[
        str, typer.Option("--upnp", metavar="auto|HOST",
                          help="Have the router open ports for this peer, until it ends."),
    ] = "off",
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm of a file.")] = None,
    wait: Annotated[
        int | None, typer.Option("--wait", min=1, help="Start with so many peers (default: all)."),
    ] = None,
    kept: Annotated[
        int, typer.Option("--kept", min=0,
                          help="Give ids below this one only to those that ask for them by --id."),
    ] = 0,
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
    show_public_key: Annotated[
        bool, typer.Option("--show-public-key",
                           help="Print the public key in hexadecimal digits, for rosters."),
    ] = False,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="Stop when standard input is closed."),
    ] = False,
    reports: Annotated[int | None, typer.Option("--reports", min=0, hidden=True)] = None,
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
      shoal peer lattica --peers 8 --listen 0.0.0.0:7000 --upnp auto
      shoal peer lattica --peers 8 --bootstrap 203.0.113.7:7000 --carriers tcp,quic
      shoal peer --key me.key --show-name
    """
    from shoal.base.errors import UsageError

    identity = _identity(key, store)
    if show_name:
        typer.echo(identity.name)
        raise typer.Exit
    if show_public_key:
        typer.echo(identity.public.hex())
        raise typer.Exit
    if what is None:
        raise UsageError("FILE_OR_NAME is missing (such as `shoal peer dpsgd`)")
    from shoal.engine.live.garbage import keep_collections_short
    from shoal.engine.live.joining import Joining
    from shoal.lab.joined import run_peer

    cell = cell_of(what, arm, seed, peers, device, settings)
    joining = Joining(
        listen=address(listen, "--listen"),
        advertise=None if advertise is None else address(advertise, "--advertise"),
        bootstrap=tuple(address(a, "--bootstrap") for a in (bootstrap or "").split(",") if a),
        peer=id, identity=identity, allow=None if allow is None else names_in(allow),
        wait_for=wait, kept=kept, gone_s=gone_s,
    )  # fmt: skip
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if until_eof:
        threading.Thread(target=_follow, args=(stop,), daemon=True).start()
    teller = _Teller(quiet, json) if reports is None else _Reporter(reports)
    keep_collections_short()
    run = run_peer(
        cell, joining, store="" if store is None else str(store), start_s=start_s,
        tell=teller.tell, stop=stop, observer=teller if isinstance(teller, _Reporter) else None,
        carriers=carriers_in(carriers), upnp=upnp,
    )  # fmt: skip
    teller.end(run)
    raise typer.Exit(0 if run.finished or stop.is_set() else 1)


def cell_of(
    what: str, arm: str | None, seed: int | None, peers: int | None, device: str | None,
    settings: list[str] | None,
) -> Cell:  # fmt: skip
    """The run that the words of a command describe, on real sockets."""
    from shoal.base.errors import UsageError
    from shoal.lab.joined import chosen, load_cell

    if what.endswith(".json"):
        if arm is not None or seed is not None or peers is not None or settings:
            raise UsageError(
                f"{what}: a run is described there wholly (leave out --arm, --seed, --peers, --set)"
            )
        return load_cell(what, device)
    return chosen(experiment_of_run(what, seed, peers, device, settings), arm)


def experiment_of_run(
    what: str, seed: int | None, peers: int | None, device: str | None, settings: list[str] | None
) -> Experiment:
    """What a file or a system's card describes, on real sockets."""
    from shoal.cli.run import experiment_of

    experiment = experiment_of(what)
    experiment.engine = "live"
    experiment.overrides = overrides(settings, peers, device)
    if seed is not None:
        experiment.seeds = (seed,)
    return experiment


def _identity(key: Path | None, store: Path | None) -> Identity:
    from shoal.wire.identity import Identity

    if key is not None:
        return Identity.load_or_new(key)
    return Identity.new() if store is None else Identity.load_or_new(store / "peer.key")


def address(text: str, option: str) -> tuple[str, int]:
    """`HOST:PORT` or `[HOST]:PORT` as an address."""
    from shoal.base.errors import UsageError

    host, colon, port = text.strip().rpartition(":")
    if not colon or not port.isdigit() or int(port) >= 1 << 16:
        raise UsageError(f"{option} {text}; need HOST:PORT (such as 192.168.1.5:7000)")
    return host.strip("[]") or "0.0.0.0", int(port)


def carriers_in(text: str) -> tuple[Literal["tcp", "quic"], ...]:
    """A list of carriers, each once."""
    from shoal.base.errors import UsageError

    known: tuple[Literal["tcp", "quic"], ...] = ("tcp", "quic")
    named = [each.strip() for each in text.split(",")]
    if not set(named) <= set(known) or len(set(named)) != len(named):
        raise UsageError(f"--carriers {text}; need tcp, quic or tcp,quic")
    return tuple(each for each in known if each in named)


def names_in(path: Path) -> frozenset[str]:
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

    def tell(self, told: Told) -> None:
        from shoal.cli.console import json_line, say

        status = told.status
        if self._json:
            for row in told.rows:
                json_line(
                    {
                        "event": "row", "name": row.name, "value": row.value, "time_s": row.time_s,
                        "round": row.round, "peer": row.peer, "labels": dict(row.labels),
                    }
                )  # fmt: skip
            for each in told.happenings:
                json_line({"event": "happening", "time_s": each.time_s, "what": each.what})
            if status != self._last:
                json_line({"event": "status", "pid": os.getpid(), **vars(status)})
            self._last = status
            return
        if self._quiet:
            return
        for each in told.happenings:
            say(f"{each.time_s:.1f} s: {each.what}", error=True)
        if self._last != (now := (status.state, status.known)):
            self._last = now
            say(_line(status), error=True)

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


def _line(status: Status) -> str:
    host, port = status.address
    who = status.peer if status.peer >= 0 else "?"
    others = "1 other peer" if status.known == 1 else f"{status.known} other peers"
    again = ", rejoined from its store" if status.rejoined else ""
    return f"peer {who}: {status.state} at {host}:{port}, knows {others}{again}"


class _Reporter:
    """Tells the process that started this one (`shoal up`), and a log what a person would see.

    What travels is pickled, over a pipe that only the two hold.
    """

    def __init__(self, descriptor: int) -> None:
        from multiprocessing.connection import Connection

        self._pipe = Connection(descriptor, readable=False)
        self._log = _Teller(quiet=False, json=False)

    def tell(self, told: Told) -> None:
        self._log.tell(told)
        self._send(told)

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None:
        """As an observer: the models are measured by the process at the other end."""
        from shoal.engine.live.control import Observed

        self._send(Observed(peer, round, time_s, params))

    def rows(self) -> list[Row]:
        return []

    def end(self, run: Run) -> None:
        from shoal.engine.live.control import Done

        self._send(Done(run))

    def _send(self, report: Report) -> None:
        # Whoever listened may be gone; standard input then says so, too.
        with suppress(BrokenPipeError):
            self._pipe.send_bytes(pickle.dumps(report, protocol=5))
