"""One arm with one seed: the unit that is run, stored, resumed and replayed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from shoal.base.digest import bytes_digest
from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.build import surroundings
from shoal.lab.card import Arm, System
from shoal.lab.environment import code_digest, version
from shoal.lab.scenario import Part, Scenario, is_scenario_key, typed
from shoal.lab.torch_device import resolved
from shoal.lab.values import Unfit, fit, freeze, from_text, near, thaw
from shoal.world.record import Row, Run

if TYPE_CHECKING:
    from shoal.engine.lockstep import Checkpoint

Progress = Callable[[float, str], None]
"""Called with the finished part of a run, 0 to 1, and a note such as "round 12 of 60"."""


class Launcher(Protocol):
    """What runs a Strategy or Program in a scenario; `launch.launch` unless a test injects one."""

    def __call__(
        self, what: Any, scenario: Scenario, *, seed: int, engine: str, progress: Progress | None
    ) -> Run: ...


@dataclass(frozen=True)
class Cell:
    """Data that determine a run. `what` is a live Strategy or Program in place of a system.

    settings: of what the system makes; host: of the host strategy when the system is a part.
    The scenario has the seed and all changes inside.
    """

    arm: str
    seed: int
    scenario: Scenario
    system: str | None = None
    settings: Any = ()
    host: Any = ()
    engine: str = "auto"
    what: Any = None

    def __post_init__(self) -> None:
        settings = self.scenario.engine
        device = resolved(settings.device)
        if device != settings.device:
            world = replace(self.scenario, engine=replace(settings, device=device))
            object.__setattr__(self, "scenario", world)

    @property
    def live(self) -> tuple[str, ...]:
        """What keeps this cell from being data: names of live objects."""
        return self.scenario.live + (("arm " + self.arm,) if self.what is not None else ())

    def key(self) -> str | None:
        """Digest of everything that determines the run, code included; None with live objects."""
        if self.live:
            return None
        text = json.dumps([self.to_json(), version(), code_digest()], sort_keys=True)
        return bytes_digest(text.encode())

    def to_json(self) -> dict[str, Any]:
        """Plain data, the form in which reports keep a cell."""
        return {
            "arm": self.arm,
            "seed": self.seed,
            "system": self.system,
            "settings": _plain(self.settings),
            "host": _plain(self.host),
            "engine": self.engine,
            "scenario": self.scenario.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """Inverse of `to_json`."""
        scenario = Scenario.from_json(data["scenario"])
        if scenario.engine.device == "auto":
            # Reports that do not say so were made before there was a choice.
            scenario = scenario.with_settings({"engine.device": "cpu"})
        return cls(
            data["arm"], data["seed"], scenario, data["system"],
            freeze(data["settings"]), freeze(data["host"]), data["engine"],
        )  # fmt: skip


def gone(cell: Cell) -> tuple[int, ...]:
    """Peers that crash or leave for good in this cell's scenario."""
    away = {
        peer
        for fault in cell.scenario.explicit_faults()
        if fault.kind in ("crash", "leave") and fault.until is None
        for peer in fault.who or ()
    }
    return tuple(sorted(away))


def _plain(settings: Any) -> dict[str, Any]:
    return {key: thaw(value) for key, value in settings}


def cell_of(
    name: str,
    arm: Arm,
    seed: int,
    base: Scenario,
    *,
    system: str | None = None,
    changes: tuple[Mapping[str, Any], ...] = (),
    overrides: Mapping[str, Any] | None = None,
    engine: str = "auto",
) -> Cell:
    """The cell of an arm and a seed.

    Scenario settings in rising order of precedence: `base`, what the method uses, `changes` (a
    budget), the arm's own, `overrides`. An override that is no scenario key is a setting of what
    the system makes; `host.key` is one of a part's host.
    """
    target = arm.system or system
    if target is None:
        raise UsageError(f"arm {name}: it names no system (Arm(system='fedavg'), or a Strategy)")
    card = discover.load(target)
    scenario = base
    for uses in (*_uses(card), *changes, arm.scenario):
        scenario = scenario.with_settings(uses)
    settings, host, late = dict(arm.set), dict(arm.host), {}
    for key, value in (overrides or {}).items():
        if is_scenario_key(key):
            full, value = typed(key, value) if isinstance(value, str) else (key, value)
            late[full] = value
        elif key.startswith("host."):
            host[key.removeprefix("host.")] = value
        else:
            settings[key] = value
    scenario = replace(scenario.with_settings(late), seed=seed)
    if arm.prepare is not None:
        scenario = arm.prepare(scenario)
    return Cell(
        name, seed, scenario, target, freeze(check_settings(card, settings)),
        freeze(check_settings(discover.load(card.host), host) if card.kind == "part" else {}),
        arm.engine or engine,
    )  # fmt: skip


def _uses(card: System) -> tuple[Mapping[str, Any], ...]:
    return (discover.load(card.host).uses, card.uses) if card.kind == "part" else (card.uses,)


def setting_hints(card: System) -> dict[str, Any]:
    """Settings of what a card makes, with their types; Any where unknown."""
    make = card.make
    if make is None:
        return {}
    try:
        hints = typing.get_type_hints(make)
    except NameError:
        hints = {}
    if dataclasses.is_dataclass(make):
        names = [f.name for f in dataclasses.fields(make) if f.init]
    else:
        names = [
            p.name
            for p in inspect.signature(make).parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        # A study's first argument is the scenario.
        names = names[1:] if card.kind == "study" else names
    return {name: hints.get(name, Any) for name in names}


def check_settings(card: System, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the types of what the card makes; texts are read, mistakes are UsageErrors."""
    hints = setting_hints(card)
    out = {}
    for key, value in settings.items():
        if key not in hints:
            raise UsageError(f"{card.name}: there is no setting {key!r}; {near(key, hints)}")
        try:
            read = from_text if isinstance(value, str) else fit
            out[key] = read(value, hints[key])
        except Unfit as error:
            raise UsageError(
                f"{card.name}: {key} = {value!r}; {error} (change the value)"
            ) from None
    return out


def execute(cell: Cell, launcher: Launcher, progress: Progress | None = None) -> Run:
    """Run a cell: make the objects that it names and hand them to the launcher."""
    if cell.engine == "processes":
        from shoal.lab.processes import run_processes

        return run_processes(cell, progress)
    made = make(cell)
    if isinstance(made, Run):
        return made
    what, scenario = made
    return launcher(what, scenario, seed=cell.seed, engine=cell.engine, progress=progress)


def execute_seeds(
    cells: Sequence[Cell], progress: Progress | None = None, checkpoint: Checkpoint | None = None
) -> list[Run]:
    """Cells that differ in their seeds alone (see `stacks`), as one stack of worlds."""
    from shoal.lab.launch import launch_seeds

    made = [make(cell) for cell in cells]
    scenarios = [each[1] for each in made if not isinstance(each, Run)]
    first = made[0]
    assert not isinstance(first, Run)
    return launch_seeds(
        first[0], scenarios, [cell.seed for cell in cells], engine=cells[0].engine,
        progress=progress, checkpoint=checkpoint,
    )  # fmt: skip


def stacks(cell: Cell) -> tuple[Any, ...] | None:
    """What cells must share to run as one stack; None for one that lockstep cannot run at all."""
    if cell.live or cell.system is None or cell.engine not in ("auto", "lockstep"):
        return None
    card = discover.load(cell.system)
    host = discover.load(card.host) if card.kind == "part" else card
    if host.kind != "strategy":
        return None
    # Faults, attackers and who has data may follow from the seed; everything else must be equal.
    world = replace(cell.scenario, seed=0, faults=(), byzantine=0)
    if isinstance(world.task, Part):
        task = dict(world.task.settings)
        kept = {key: task[key] for key in task if key not in ("holders", "losers")}
        world = replace(world, task=Part(world.task.name, kept))
    # Seeds reach a horizon in seconds in different rounds, and event runs one after the other: in
    # a stack the first would be stored with the last.
    from shoal.engine.lockstep.timeline import beyond

    faults = [fault.explicit() for fault in cell.scenario.explicit_faults()]
    alone = cell.scenario.seconds is not None or beyond(faults, 0)
    own = cell.seed if alone else None
    return (cell.arm, cell.system, cell.settings, cell.host, cell.engine, world, own)


def make(cell: Cell) -> Run | tuple[Any, Scenario]:
    """The live object that a cell runs and its world, or what a study returned."""
    scenario = cell.scenario
    if cell.what is not None:
        return cell.what, scenario
    assert cell.system is not None
    card = discover.load(cell.system)
    settings = check_settings(card, dict(cell.settings))
    if card.kind == "part":
        hints = setting_hints(card)
        around = {k: v for k, v in surroundings(scenario).items() if k in hints}
        settings = {**around, **settings}
    if card.make is None:
        raise UsageError(f"{card.name}: it makes nothing itself; run one of its arms")
    if card.kind == "study":
        return _as_run(card.make(scenario, **settings), scenario, cell)
    what = card.make(**settings)
    if card.kind == "part":
        scenario = replace(scenario, **{card.role: what})
        host = discover.load(card.host)
        if host.make is None or host.kind not in ("strategy", "program"):
            raise UsageError(f"{card.name}: host {card.host!r} is no strategy or program")
        what = host.make(**check_settings(host, dict(cell.host)))
    return what, scenario


def _as_run(result: Any, scenario: Scenario, cell: Cell) -> Run:
    """A study returns a Run, or a mapping of metrics."""
    if isinstance(result, Run):
        return result
    if not isinstance(result, Mapping):
        raise UsageError(
            f"{cell.system}: the study returned {type(result).__name__}; "
            "need a Run or a mapping from metric to number"
        )
    rows = [Row(name, float(value), 0.0) for name, value in result.items()]
    return Run(engine="study", seed=cell.seed, peers=scenario.peers, rows=rows)
