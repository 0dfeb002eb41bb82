"""A run as processes of this machine, each one a peer that joins by address like any other."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch
from shoal.lab import launch as seam
from shoal.lab.build import build, check, check_apart
from shoal.lab.cell import Cell
from shoal.world.record import Run

if TYPE_CHECKING:
    from shoal.engine.live.fleet import Event, Fleet, FleetSettings
    from shoal.lab.experiment import Experiment
    from shoal.lab.report import Report
    from shoal.lab.store import Store
    from shoal.rounds.measure import Measure

RUN_FILE = "run.json"
"""the file in a run's folder from which others can join: `shoal peer FOLDER/run.json`"""


@dataclass(frozen=True)
class Upped:
    """What `up` left. lost: peers that died and did not come back, ascending."""

    run: Run
    lost: tuple[int, ...]


class Up:
    """`count` processes of this machine run a cell; `run` starts them and stays until they end.

    folder: made for this run; it gets `run.json`, and for each peer a log and a store, which is
    removed when all is done. The cell may have more peers than `count`: the others join from
    elsewhere, with `bootstrap` as an address.
    listen: where the first peer listens; port 0 = any free one. The others listen on its host, so
    it must be an address at which everybody reaches this machine. allow: names of the keys that may
    join from elsewhere; None = anybody if there is room for more peers, else nobody.
    wait_for: with how many peers the run starts (None = `count`, or what the fault list says).
    settings: how processes are kept up. start_s, gone_s: see `Joining`.

    Assumes that a process can import all that the cell names; a cell with live objects is refused.

    >>> from tempfile import TemporaryDirectory
    >>> from shoal.lab.scenario import Scenario
    >>> world = Scenario(peers=2, rounds=4, task="digits", topology="full")
    >>> cell = Cell("dpsgd", 0, world, system="dpsgd", engine="live")
    >>> with TemporaryDirectory() as folder:
    ...     up = Up(cell, 2, Path(folder) / "run")  # up.run() starts the processes.
    >>> [post.state for post in up.fleet.posts], up.bootstrap[0], up.invitation
    (['starting', 'starting'], '127.0.0.1', '')
    """

    def __init__(
        self, cell: Cell, count: int, folder: Path, *, listen: tuple[str, int] = ("127.0.0.1", 0),
        allow: Collection[str] | None = None, wait_for: int | None = None,
        settings: FleetSettings | None = None, start_s: float = 300.0, gone_s: float = 10.0,
    ) -> None:  # fmt: skip
        from shoal.engine.live.fleet import Fleet, FleetSettings, free_port

        peers = cell.scenario.peers
        if not 1 <= count <= peers:
            raise UsageError(
                f"up: {count} processes for {peers} peers; need 1 to {peers} (raise peers, or "
                "start fewer)"
            )
        if cell.live:
            raise UsageError(
                f"up: {', '.join(cell.live)} are live Python objects, which no other process has "
                "(name a system and parts)"
            )
        if listen[0] in ("0.0.0.0", "::", ""):
            raise UsageError(
                f"up: listen on {listen[0] or 'everything'}; need an address at which the others "
                "reach this machine (such as 192.168.1.5)"
            )
        check(cell.scenario)
        check_apart(cell.scenario)
        self.cell = cell
        self.folder = folder
        self.rounds = cell.scenario.rounds
        self.bootstrap = (listen[0], listen[1] or free_port(listen[0]))
        self._measure = _measure(cell)
        folder.mkdir(parents=True)
        file = folder / RUN_FILE
        file.write_text(json.dumps(cell.to_json(), indent=1), encoding="utf-8")
        names = self._names(count)
        allowed = None
        if allow is not None or count == peers:
            allowed = folder / "allowed.txt"
            allowed.write_text("\n".join([*names, *sorted(allow or ())]) + "\n", encoding="utf-8")
        if wait_for is None and count < peers:
            wait_for = count
        commands = []
        for peer in range(count):
            words = [sys.executable, "-m", "shoal", "peer", str(file), "--id", str(peer)]
            words += ["--store", str(self._store(peer)), "--until-eof"]
            # Whoever joins from elsewhere must not get the place of one that is still to start.
            words += ["--kept", str(count)]
            words += ["--start-s", str(start_s), "--gone-s", str(gone_s)]
            port = self.bootstrap[1] if peer == 0 else 0
            words += ["--listen", _shown((listen[0], port))]
            if peer:
                words += ["--bootstrap", _shown(self.bootstrap)]
            elif wait_for is not None:
                words += ["--wait", str(wait_for)]
            if allowed is not None:
                words += ["--allow", str(allowed)]
            commands.append(words)
        logs = [folder / f"peer-{peer}.log" for peer in range(count)]
        self.fleet = Fleet(commands, logs, settings or FleetSettings(), self._measure)

    def _names(self, count: int) -> list[str]:
        """The names of all keys here, which are made before any process starts."""
        from shoal.wire.identity import Identity

        files = [self._store(peer) / "peer.key" for peer in range(count)]
        return [Identity.load_or_new(file).name for file in files]

    def _store(self, peer: int) -> Path:
        return self.folder / f"peer-{peer}"

    @property
    def invitation(self) -> str:
        """The command by which another peer of this machine joins the run; "" without room."""
        if len(self.fleet.posts) == self.cell.scenario.peers:
            return ""
        return f"shoal peer {self.folder / RUN_FILE} --bootstrap {_shown(self.bootstrap)}"

    def accuracy(self) -> tuple[int, float] | None:
        """Round and value of the newest accuracy of the mean model, if one was measured."""
        taken = [] if self._measure is None else self._measure.taken
        rows = [row for row in taken if row.name == "mean_model_accuracy"]
        return (rows[-1].round, rows[-1].value) if rows else None

    def run(
        self, tell: Callable[[Fleet, list[Event]], None] | None = None,
        stop: threading.Event | None = None, hurry: threading.Event | None = None,
    ) -> Upped:  # fmt: skip
        """Until all processes have ended. stop: end them properly; hurry: kill them."""
        from shoal.engine.live.merging import merged

        watch = Stopwatch()
        fleet, cell = self.fleet, self.cell
        fleet.run(tell, stop, hurry)
        if fleet.whole:
            for post in fleet.posts:
                shutil.rmtree(self._store(post.peer))
        parts = fleet.runs(cell.seed, cell.scenario.peers)
        run = merged(parts, cell.seed, cell.scenario.peers)
        run.messages_in_flight = max(0, run.messages_in_flight)
        run.happenings += fleet.happenings
        run.happenings.sort(key=lambda happening: happening.time_s)
        run.finished = fleet.whole
        settings = next((dict(part.settings) for part in parts if part.settings), {})
        run.settings = {**settings, "processes": len(fleet.posts), **asdict(fleet.settings)}
        if self._measure is not None:
            run.rows += self._measure.rows()
            spec = self._measure.task.spec
            run.names, run.shapes = spec.names, spec.shapes
        run.wall_s = watch.wall_s
        run.cpu_s = watch.cpu_s + sum(part.cpu_s for part in parts)
        lost = tuple(post.peer for post in fleet.posts if post.state in ("died", "failed"))
        return Upped(run, lost)


def report_of(experiment: Experiment, cell: Cell, upped: Upped, store: Store, name: str) -> Report:
    """The report of a run, which is put into the store, too.

    name: of this very run. What processes leave depends on more than the cell, so it is never taken
    for a stored run of it.
    """
    from shoal.base.digest import bytes_digest
    from shoal.lab.jobs import Outcome
    from shoal.lab.report import Report
    from shoal.lab.store import encode_run, save_params

    run = upped.run
    key = bytes_digest(f"{cell.key()} {name}".encode())
    if run.final:
        save_params(run, store.params_path(key), upped.lost)
    store.put_encoded(key, cell, encode_run(run))
    own = replace(
        experiment, arms={cell.arm: experiment.arms[cell.arm]}, seeds=(cell.seed,), claims=(),
        grid={},
    )  # fmt: skip
    return Report.of(own, [Outcome(cell, run, key=key)], store)


def _measure(cell: Cell) -> Measure | None:
    pieces = build(replace(cell.scenario, seed=cell.seed))
    return None if pieces.task is None else seam.measure_of(cell.scenario, pieces, cell.seed)


def _shown(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
