"""Arms x seeds x grid, paired: every arm sees the same data, links and faults for the same seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab import launch as seam
from shoal.lab.build import check
from shoal.lab.card import Arm, Claim, Plot, System
from shoal.lab.cell import Cell, Launcher, Progress, cell_of, setting_hints
from shoal.lab.chart import Chart
from shoal.lab.jobs import Outcome, Waiting, forget, in_processes, kept_at, run_group, stacked
from shoal.lab.report import Report
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Scenario, is_scenario_key, typed
from shoal.lab.store import Store
from shoal.lab.values import Unfit, Where, fit, near, refuse


@dataclass(frozen=True)
class Tick:
    """Progress of an experiment. `part` is how many cells' worth of those in hand is done.

    reused: that was done before this call.
    """

    done: int
    total: int
    cell: str
    part: float = 0.0
    note: str = ""
    reused: bool = False


@dataclass
class Experiment:
    """A comparison; `run()` gives a `Report`.

    arms: by name; each an `Arm`, a system's name, or a live Strategy or Program.
    seeds: a count (from the scenario's seed upwards) or the seeds themselves.
    overrides: settings of the scenario or of what the arms make, for every arm; `arm.key` for one.
    grid: key -> values; every combination is tried in every arm. budget: what claims are held to.
    left_out: arms that claims, plots and charts may name although they do not run.

    >>> world = Scenario(peers=4, rounds=2, task="digits", topology="ring")
    >>> report = Experiment({"ring": "dpsgd", "nobody": "local-only"}, world, seeds=2).run()
    >>> report.arms, report.seeds, report.cell("nobody", seed=1).totals["bytes_sent"]
    (('ring', 'nobody'), (0, 1), 0.0)
    """

    arms: Mapping[str, Any]
    scenario: Scenario
    seeds: int | tuple[int, ...] = 1
    title: str = ""
    system: str | None = None
    budget: str = "full"
    engine: str = "auto"
    claims: tuple[Claim, ...] = ()
    plots: tuple[Plot, ...] = ()
    charts: tuple[Chart, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.arms, Mapping):
            raise UsageError(
                f"Experiment: arms = {self.arms!r}; need a name for each (arms={{'one': 'dpsgd'}})"
            )
        if not self.arms:
            raise UsageError("Experiment: no arms; need at least one (arms={'fedavg': 'fedavg'})")
        seeds = self.seed_list()
        if not seeds or len(set(seeds)) != len(seeds):
            raise UsageError(f"Experiment: seeds = {self.seeds}; need one or more, all different")

    @classmethod
    def of_system(
        cls, name: str, budget: str = "full", *, seed: int | None = None, **settings: Any
    ) -> Experiment:
        """The reproduction that a system's card describes."""
        card: System = discover.load(name)
        share = card.budget(budget)
        scenario = scenario_of(name)
        first = scenario.seed if seed is None else seed
        arms = dict(card.all_arms())
        chosen = arms if share.arms is None else {name: arms[name] for name in share.arms}
        return cls(
            arms=chosen,
            left_out=tuple(name for name in arms if name not in chosen),
            scenario=scenario,
            seeds=tuple(range(first, first + share.seeds)),
            title=card.title,
            system=name,
            budget=budget,
            claims=card.claims,
            plots=card.plots,
            charts=card.charts,
            changes=share.scenario,
            **settings,
        )

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """An experiment from a TOML file: scenario settings, `[arms.NAME]`, `seeds`, `base`."""
        from shoal.lab.toml_file import load_toml

        file = load_toml(path)
        return experiment_of(file.data, file.where, default_name=Path(path).stem)

    def seed_list(self) -> tuple[int, ...]:
        if isinstance(self.seeds, int):
            return tuple(range(self.scenario.seed, self.scenario.seed + self.seeds))
        return self.seeds

    def cells(self) -> tuple[Cell, ...]:
        """Every cell, seeds in the outer loop, so that a killed run leaves whole comparisons."""
        arms = {name: self._arm(value) for name, value in self.arms.items()}
        self._check_keys(arms)
        points = [
            dict(zip(self.grid, p, strict=True)) for p in itertools.product(*self.grid.values())
        ]
        out = []
        for seed in self.seed_list():
            for point in points:
                label = ", ".join(f"{key}={value}" for key, value in point.items())
                for name, arm in arms.items():
                    full = f"{name} [{label}]" if label else name
                    out.append(self._cell(full, name, arm, seed, {**self.overrides, **point}))
        return tuple(out)

    def _arm(self, value: Any) -> Any:
        return Arm(system=value) if isinstance(value, str) else value

    def _cell(
        self, full: str, name: str, arm: Any, seed: int, overrides: Mapping[str, Any]
    ) -> Cell:
        chosen: dict[str, Any] = {}
        for key, value in overrides.items():
            head, _, rest = key.partition(".")
            if head in self.arms and rest:
                if head == name:
                    chosen[rest] = value
            elif is_scenario_key(key) or key.startswith("host.") or self._has(arm, key):
                chosen.setdefault(key, value)
        if isinstance(arm, Arm):
            return cell_of(
                full, arm, seed, self.scenario, system=self.system, changes=(self.changes,),
                overrides=chosen, engine=self.engine,
            )  # fmt: skip
        late = {}
        for key, value in chosen.items():
            if not is_scenario_key(key):
                continue
            key, value = typed(key, value) if isinstance(value, str) else (key, value)
            late[key] = value
        scenario = replace(self.scenario.with_settings({**self.changes, **late}), seed=seed)
        return Cell(full, seed, scenario, engine=self.engine, what=arm)

    def _has(self, arm: Any, key: str) -> bool:
        """Whether `key` is a setting of what an arm makes."""
        return isinstance(arm, Arm) and key in self._hints(arm)

    def _hints(self, arm: Arm) -> Mapping[str, Any]:
        name = arm.system or self.system
        return setting_hints(discover.load(name)) if name else {}

    def _check_keys(self, arms: Mapping[str, Any]) -> None:
        """Refuse overrides that no arm would take."""
        known = {key for arm in arms.values() if isinstance(arm, Arm) for key in self._hints(arm)}
        for key in (*self.overrides, *self.grid):
            head, _, rest = key.partition(".")
            if is_scenario_key(key) or key in known or (head in arms and rest) or head == "host":
                continue
            fields = [*known, *(f for f in vars(self.scenario) if f != "engine")]
            raise UsageError(f"--set {key}: there is no such setting; {near(key, fields)}")

    def run(
        self,
        store: Store | None = None,
        *,
        jobs: int = 1,
        progress: Callable[[Tick], None] | None = None,
        launcher: Launcher | None = None,
        fresh: bool = False,
    ) -> Report:
        """Run what is not stored yet, store each run as it finishes, and report.

        With a store, runs on `lockstep` leave a checkpoint every 10 s, from which the next call
        goes on if this one is killed. jobs: spawned processes (a script that asks for more than
        one needs the usual `if __name__ == "__main__"`). fresh: run everything again, from the
        start. A run that ends in a ShoalError is reported as missing; wrong settings and
        programming errors are raised.
        """
        outcomes = run_cells(
            self.cells(), store, jobs=jobs, progress=progress, launcher=launcher, fresh=fresh
        )
        return Report.of(self, outcomes, store)


def run_cells(
    cells: Sequence[Cell],
    store: Store | None = None,
    *,
    jobs: int = 1,
    progress: Callable[[Tick], None] | None = None,
    launcher: Launcher | None = None,
    fresh: bool = False,
) -> list[Outcome]:
    """The part of `Experiment.run` that runs cells; no arm may have one seed twice."""
    if jobs < 1:
        raise UsageError(f"jobs = {jobs}; need at least 1")
    launcher = launcher or seam.launch
    for cell in {c.arm: c for c in cells}.values():
        check(cell.scenario)
    outcomes: dict[tuple[str, int], Outcome] = {}
    waiting: list[Waiting] = []
    for cell in cells:
        key = cell.key() if store is not None else None
        found = None
        if store is not None and key is not None and not fresh:
            found = store.get(key)
        if found is None:
            waiting.append((cell, key))
        else:
            outcomes[cell.arm, cell.seed] = Outcome(cell, found, key=key)

    def tell(cell: Cell, part: float = 0.0, note: str = "", reused: bool = False) -> None:
        if progress is not None:
            name = f"{cell.arm}, seed {cell.seed}"
            progress(Tick(len(outcomes), len(cells), name, part, note, reused))

    if fresh:
        for group in stacked(waiting, launcher):
            forget(kept_at(group, launcher, store))
    for outcome in list(outcomes.values()):
        tell(outcome.cell, note="stored", reused=True)
    source = (
        in_processes(waiting, launcher, store, jobs)
        if jobs > 1 and len(waiting) > 1
        else _here(waiting, launcher, store, tell)
    )
    for outcome in source:
        outcomes[outcome.cell.arm, outcome.cell.seed] = outcome
        resumed = f", resumed at round {outcome.resumed}" if outcome.resumed else ""
        tell(outcome.cell, note=outcome.error or f"done{resumed}")
    return [outcomes[cell.arm, cell.seed] for cell in cells]


def _noting(tell: Callable[..., None], first: Cell, size: int) -> Progress:
    """The progress of a group of cells."""
    tell(first)

    def progress(part: float, note: str) -> None:
        text = note if size == 1 else f"and {size - 1} more seeds, {note}"
        # The first word about a group that goes on from a checkpoint is what that spared.
        tell(first, part * size, text, note.startswith("resumed"))

    return progress


def _here(
    waiting: list[Waiting],
    launcher: Launcher,
    store: Store | None,
    tell: Callable[..., None],
) -> Any:
    """Run groups of cells in this process, one after the other."""
    for group in stacked(waiting, launcher):
        first, size = group[0][0], len(group)
        kept = kept_at(group, launcher, store)
        checkpoint = None if kept is None else seam.checkpoint(*kept)
        results = run_group(group, launcher, _noting(tell, first, size), checkpoint)
        for (cell, key), result in zip(group, results, strict=True):
            if store is not None and key is not None and not isinstance(result, str):
                store.put(key, cell, result)
        forget(kept)
        resumed = 0 if checkpoint is None else checkpoint.resumed
        for (cell, key), result in zip(group, results, strict=True):
            if isinstance(result, str):
                yield Outcome(cell, None, result, key)
            else:
                yield Outcome(cell, result, key=key, resumed=resumed)


_FILE_HINTS: Mapping[str, Any] = {
    "title": str, "seeds": int | tuple[int, ...], "kind": str, "system": str | None, "base": str,
}  # fmt: skip
_ARM_HINTS: Mapping[str, Any] = {"system": str, "set": Any, "host": Any, "scenario": Any}


def experiment_of(data: Mapping[str, Any], where: Where, default_name: str = "") -> Experiment:
    """An experiment from the data of a file; errors name the place."""
    data = dict(data)
    top = {key: data.pop(key) for key in list(data) if key in _FILE_HINTS and key != "kind"}
    for key, value in top.items():
        try:
            top[key] = fit(value, _FILE_HINTS[key])
        except Unfit as error:
            refuse(where, (key,), value, str(error), "change the value")
    tables = data.pop("arms", {})
    if isinstance(data.get("engine"), str):
        top["engine"] = data.pop("engine")
    base = discover.scenario(top.pop("base")) if "base" in top else Scenario(default_name)
    scenario = base.with_settings(data, where)
    check(scenario, where)
    if not isinstance(tables, Mapping):
        refuse(where, ("arms",), tables, "need tables", "write [arms.NAME] with system = ...")
    arms: dict[str, Any] = {}
    for name, table in tables.items():
        arms[name] = _read_arm(name, table, where)
    system = top.pop("system", None)
    if not arms and system is None:
        refuse(where, ("arms",), {}, "nothing to run", "write [arms.NAME] with system = ...")
    return Experiment(
        arms or {system: Arm(system=system)},
        scenario,
        top.pop("seeds", 1),
        title=top.pop("title", "") or scenario.name,
        **top,
    )


def _read_arm(name: str, table: Any, where: Where) -> Arm:
    path = ("arms", name)
    if isinstance(table, str):
        table = {"system": table}
    if not isinstance(table, Mapping):
        refuse(where, path, table, "need a system's name or a table", 'write system = "fedavg"')
    for key in table:
        if key not in _ARM_HINTS:
            rule = "an arm has no such setting"
            refuse(where, (*path, key), table[key], rule, near(key, _ARM_HINTS))
    system = table.get("system", name)
    if not isinstance(system, str) or system not in discover.names():
        refuse(where, (*path, "system"), system, "no such system", near(system, discover.names()))
    for key in ("set", "host", "scenario"):
        if not isinstance(table.get(key, {}), Mapping):
            refuse(where, (*path, key), table[key], "need a table", f"write {key} = {{ ... }}")
    return Arm(
        system=system, set=table.get("set", {}), host=table.get("host", {}),
        scenario=table.get("scenario", {}),
    )  # fmt: skip
