"""The cells of a robustness matrix: one field is a rule, an attack and a number of liars."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.build import check_part, make
from shoal.lab.cell import Cell, Launcher
from shoal.lab.experiment import Tick, run_cells
from shoal.lab.jobs import Outcome
from shoal.lab.robustness.liars import asks, check_rule, hearing, liars, refusal, told_of
from shoal.lab.robustness.matrix import Entry
from shoal.lab.rows import curve
from shoal.lab.scenario import ROLES, Part
from shoal.lab.store import Store
from shoal.lab.values import literal, near

METRIC = "accuracy"


def parts_named(texts: Iterable[str], field: str, option: str) -> tuple[Part, ...]:
    """Parts from `name` or `name:key=value:key=value`, each once; UsageError for wrong names.

    field: of the scenario, "aggregator" or "attack".

    >>> [part.describe() for part in parts_named(["krum", "nnm:then=median"], "aggregator", "")]
    ['krum', 'nnm(then=median)']
    """
    from shoal.parts import find, names

    known = names(ROLES[field])
    found: list[Part] = []
    for text in texts:
        name, *pairs = (piece.strip() for piece in text.split(":"))
        if not name:
            raise UsageError(f"{option}: a name is empty (is there a comma too many?)")
        if name not in known:
            raise UsageError(f"{option} {name}: no such {field}; {near(name, known)}")
        settings = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(
                    f"{option} {text}; need name:key=value (such as nnm:then=krum, "
                    "or alie:factor=search)"
                )
            settings[key.strip()] = _setting(find(ROLES[field], name), key.strip(), value)
        part = Part(name, settings)
        check_part(field, part)
        if field == "aggregator":
            check_rule(part)
        else:
            make(field, part, {})
        found.append(part)
    if not found or len(set(found)) != len(found):
        raise UsageError(f"{option}: need at least one {field}, and each once")
    return tuple(found)


def _setting(kind: type, key: str, text: str) -> Any:
    """A value, unless the setting takes a text: there `false` is a word."""
    return text if typing.get_type_hints(kind).get(key) is str else literal(text)


@dataclass(frozen=True, eq=False)
class Row:
    """A rule in a world, at the learning rate that it runs at.

    base: its cells without the rule and without liars, one per seed; compared: whether it is there
    only to compare others with.
    """

    world: str
    rule: Part
    base: tuple[Cell, ...]
    compared: bool = False

    @property
    def peers(self) -> int:
        return self.base[0].scenario.peers


@dataclass(frozen=True)
class Case:
    """One field: its cells, one per seed, or why the rule cannot stand it.

    told: how many liars the rule is told of, the most over the seeds; None if it does not ask.
    """

    cells: tuple[Cell, ...]
    told: int | None = None
    refused: str = ""


def case_of(row: Row, attack: Part | None, count: int, told: int | None) -> Case:
    """A rule where `count` peers lie by an attack.

    attack: None = nobody lies, and the rule is told as if `count` peers did. told: what the rule is
    told; None = the truth, the most liars that an honest peer hears.
    """
    cells: list[Cell] = []
    known, refused = 0, ""
    asking = asks(row.rule)
    for cell in row.base:
        who = liars(cell.scenario, count)
        try:
            heard = hearing(replace(cell.scenario, byzantine=who))
        except UsageError as error:
            if not count:
                raise
            # An exchange that waits for a majority cannot have any number of liars either.
            refused = refused or str(error)
            continue
        number = heard.liars if told is None else told
        known = max(known, number)
        refused = refused or refusal(row.rule, number, heard.rows, heard.width)
        part = told_of(row.rule, number)
        lying = attack is not None and count > 0
        world = replace(
            cell.scenario, aggregator=part, attack=attack if lying else None,
            byzantine=who if lying else (),
        )  # fmt: skip
        what = f"{attack.describe()}, {count} lie" if attack is not None and lying else "none lies"
        cells.append(replace(cell, arm=f"{cell.arm}: {part.describe()}, {what}", scenario=world))
    return Case(() if refused else tuple(cells), known if asking else None, refused)


class Runs:
    """What came out by cell: each cell is run once, however often it is asked for."""

    def __init__(
        self, store: Store | None, jobs: int, progress: Callable[[Tick], None] | None,
        launcher: Launcher | None, fresh: bool,
    ) -> None:  # fmt: skip
        self._how: dict[str, Any] = {
            "store": store, "jobs": jobs, "launcher": launcher, "fresh": fresh,
        }  # fmt: skip
        self._progress = progress
        self._done: dict[Cell, tuple[float, str]] = {}

    def need(self, cases: Iterable[Case]) -> None:
        """Run the cells of these cases that were not run yet."""
        wanted = dict.fromkeys(cell for case in cases for cell in case.cells)
        new = tuple(cell for cell in wanted if cell not in self._done)
        if new:
            progress = None if self._progress is None else self._tell
            outcomes = run_cells(new, progress=progress, **self._how)
            # Only numbers are kept: a run holds the models of all its peers.
            self._done |= {outcome.cell: (_at_end(outcome), outcome.error) for outcome in outcomes}

    def _tell(self, tick: Tick) -> None:
        earlier = len(self._done)
        assert self._progress is not None
        self._progress(replace(tick, done=tick.done + earlier, total=tick.total + earlier))

    def values(self, case: Case) -> tuple[dict[int, float], str]:
        """(the honest peers' accuracy at the end by seed, the error of a run that ended in one)."""
        found: dict[int, float] = {}
        error = ""
        for cell in case.cells:
            value, wrong = self._done[cell]
            error = error or wrong
            if not wrong:
                found[cell.seed] = value
        return found, error


def field_of(
    row: Row, attack: Part | None, count: int, share: float, case: Case, runs: Runs
) -> Entry:
    """What a field shows, of a case that was run."""
    values, error = runs.values(case)
    name = attack.describe() if attack else ""
    return Entry(
        row.world, row.rule.describe(), name, share, count, case.told, values, case.refused, error
    )


def _at_end(outcome: Outcome) -> float:
    """The honest peers' accuracy at the end of a run."""
    if outcome.run is None:
        return math.nan
    points = curve(outcome.run, METRIC)
    if not points:
        raise UsageError(
            f"{outcome.cell.arm}: its task measures no {METRIC}, which is what the matrix shows "
            "(name a scenario whose task does, such as digits)"
        )
    # A model whose accuracy is no number knows nothing.
    return points[-1].value if math.isfinite(points[-1].value) else 0.0
