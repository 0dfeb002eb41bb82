"""One peer of a scenario as a process of its own, which joins the others by their addresses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shoal.base.errors import UsageError
from shoal.lab import launch as seam
from shoal.lab.build import check_apart
from shoal.lab.cell import Cell, make
from shoal.lab.environment import version
from shoal.lab.scenario import Scenario
from shoal.world.record import Row, Run

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.engine.live.control import Told
    from shoal.engine.live.joining import Joining, Status
    from shoal.engine.live.launch import Observer
    from shoal.lab.experiment import Experiment


def chosen(experiment: Experiment, arm: str | None = None) -> Cell:
    """The one run of an experiment that peers can join: its first seed, of one arm."""
    cells = experiment.cells()
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    if arm is None and experiment.system in arms:
        arm = experiment.system
    if arm is None and len(arms) > 1:
        raise UsageError(f"there are {len(arms)} arms; name one with --arm: {', '.join(arms)}")
    if arm is not None and arm not in arms:
        raise UsageError(f"--arm {arm}: there is no such arm; need one of {', '.join(arms)}")
    return next(cell for cell in cells if arm is None or cell.arm == arm)


def load_cell(path: str | Path, device: str | None = None) -> Cell:
    """The cell in the `run.json` of a run's folder, with the device to compute on."""
    try:
        cell = Cell.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror} (check the path)") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{path}: this is no run.json that `shoal up` wrote: {error!r} (name a .toml file, a "
            "system, or the run.json of a run's folder)"
        ) from None
    if device is None:
        return cell
    return replace(cell, scenario=cell.scenario.with_settings({"engine.device": device}))


def agreed(cell: Cell) -> bytes:
    """16 bytes that are equal where the same scenario, settings, seed and version are run.

    The device is left out: a peer with a GPU may join one without.
    """
    scenario = replace(cell.scenario, engine=replace(cell.scenario.engine, device="cpu"))
    plain = [replace(cell, scenario=scenario).to_json(), version()]
    text = json.dumps(plain, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def run_peer(
    cell: Cell, joining: Joining, *, store: str = "", start_s: float = 60.0,
    tell: Callable[[Told], None] | None = None, stop: threading.Event | None = None,
    observer: Observer | None = None, carriers: tuple[Literal["tcp", "quic"], ...] = ("tcp",),
    upnp: str = "off",
) -> Run:  # fmt: skip
    """Join the run of a cell as one of its peers, and return what this peer left.

    store: the folder of its durable commits; a strategy then commits after every round, so that it
    goes on there. `tell` gets the status, and what is new since the last call. observer: gets this
    peer's models; without one they are measured here. carriers, upnp: see `LiveSettings`.
    """
    from shoal.engine.live.control import Told
    from shoal.engine.live.join import join_live
    from shoal.engine.live.settings import LiveSettings

    made = make(cell)
    if isinstance(made, Run):
        raise UsageError(f"{cell.arm}: a study has no peers (use `shoal run`)")
    what, scenario = made
    check_apart(scenario)
    program, network, task = _program(what, scenario, cell.seed, durable=bool(store))
    own = None if task is None or observer is not None else _OwnModel(task)
    rows_seen = happenings_seen = 0

    def pass_on(status: Status, result: Run | None) -> None:
        nonlocal rows_seen, happenings_seen
        rows = [] if result is None else result.rows[rows_seen:]
        happenings = [] if result is None else result.happenings[happenings_seen:]
        rows_seen += len(rows)
        happenings_seen += len(happenings)
        if tell is not None:
            tell(Told(status, rows + ([] if own is None else own.news()), happenings))

    horizon_s = float("inf") if scenario.seconds is None else scenario.seconds
    settings = LiveSettings(
        horizon_s=horizon_s, store_dir=store, start_s=start_s, carriers=carriers, upnp=upnp
    )
    return join_live(
        program, network, replace(joining, program=agreed(cell)), seed=cell.seed,
        settings=settings, observer=observer or own, tell=pass_on, stop=stop,
    )  # fmt: skip


def _program(what: Any, scenario: Scenario, seed: int, *, durable: bool) -> tuple[Any, Any, Any]:
    if not seam.is_strategy(what):
        pieces = seam.build(replace(scenario, seed=seed))
        program = seam.bound(what, scenario, pieces, seed)
        return program, seam.network_of(scenario, pieces), pieces.task
    from shoal.rounds.adapter import Rounds

    method, network, pieces, _ = seam.method_of(what, scenario, seed, seam.LIVE_ROUND_S)
    if durable:
        method = replace(method, checkpoint_every=1)
    return Rounds.of(method), network, pieces.task


class _OwnModel:
    """Measures one peer's models as they come; nobody has all models of a round here."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self._news: list[Row] = []
        self._rows: list[Row] = []

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None:
        for name, value in self._task.evaluate(params).items():
            row = Row(name, float(value), time_s, round, peer)
            self._news.append(row)
            self._rows.append(row)

    def news(self) -> list[Row]:
        news, self._news = self._news, []
        return news

    def rows(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows
