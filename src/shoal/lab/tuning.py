"""How settings that a card compares were chosen: every candidate alike, on seeds no claim uses.

    python -m shoal.lab.tuning NAME        run the `TUNING` of a system's module, print its table

What is stored in the workspace is not run again, so a search that was stopped goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.card import Arm
from shoal.lab.experiment import Experiment, Tick, run_cells
from shoal.lab.rows import Rows
from shoal.lab.run import scenario_of
from shoal.lab.statistics import median
from shoal.lab.store import Store

Criterion = Callable[[Mapping[str, float]], float]
"""Kind of run -> the metric's last value, median over the seeds; gives what is to be high."""


def mean_of_kinds(values: Mapping[str, float]) -> float:
    """The mean over all kinds of run.

    >>> mean_of_kinds({"calm": 0.9, "attacked": 0.5})
    0.7
    """
    return math.fsum(values.values()) / len(values)


@dataclass(frozen=True)
class Tuning:
    """A search over settings by one criterion for all rules.

    candidates: rule -> candidate -> kind of run -> arm; scenario: changes to the card's, for all.
    """

    candidates: Mapping[str, Mapping[str, Mapping[str, Arm]]]
    seeds: tuple[int, ...]
    metric: str = "accuracy"
    criterion: Criterion = mean_of_kinds
    scenario: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self, system: str, store: Store | None = None, *, jobs: int = 1,
        progress: Callable[[Tick], None] | None = None,
    ) -> dict[str, list[Tried]]:  # fmt: skip
        """Every rule's candidates, the best one first; of equals the one that is named first."""
        arms = {
            f"{rule} / {name} / {kind}": arm
            for rule, candidates in self.candidates.items()
            for name, kinds in candidates.items()
            for kind, arm in kinds.items()
        }
        experiment = Experiment(
            arms, scenario_of(system), self.seeds, system=system, changes=self.scenario
        )
        outcomes = run_cells(experiment.cells(), store, jobs=jobs, progress=progress)
        runs = {(o.cell.arm, o.cell.seed): o.run for o in outcomes if o.run is not None}
        rows = Rows(runs, arms, self.seeds)

        def tried(rule: str, name: str) -> Tried:
            values = {
                kind: median(list(rows.per_seed(f"{rule} / {name} / {kind}", self.metric).values()))
                for kind in self.candidates[rule][name]
            }
            return Tried(name, values, self.criterion(values))

        return {
            rule: sorted((tried(rule, name) for name in candidates), key=Tried.rank)
            for rule, candidates in self.candidates.items()
        }


@dataclass(frozen=True)
class Tried:
    """A candidate: the metric's median over the seeds by kind of run, and the criterion's score."""

    name: str
    values: Mapping[str, float]
    score: float

    def rank(self) -> float:
        """Smaller is better; a candidate without a score (a run is missing) comes last.

        Metrics are means in float32, so sums of equal ones differ in their last digits.
        """
        return math.inf if math.isnan(self.score) else -round(self.score, 6)


def table(found: Mapping[str, list[Tried]]) -> str:
    """A Markdown table, each rule's best candidate first."""
    kinds = list(dict.fromkeys(k for tries in found.values() for t in tries for k in t.values))
    lines = [
        f"| rule | candidate | score | {' | '.join(kinds)} |",
        "| --- " * (3 + len(kinds)) + "|",
    ]
    for rule, tries in found.items():
        for tried in tries:
            cells = (f"{tried.values[k]:.4f}" if k in tried.values else "" for k in kinds)
            lines.append(f"| {rule} | {tried.name} | {tried.score:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run a system's search."""
    parser = argparse.ArgumentParser(prog="python -m shoal.lab.tuning", description=__doc__)
    parser.add_argument("name", help="a system")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    chosen = parser.parse_args(arguments)
    tuning = getattr(discover.module_of(discover.find(chosen.name)), "TUNING", None)
    if tuning is None:
        raise UsageError(f"{chosen.name}: its module has no TUNING (its card says what was chosen)")

    def tell(tick: Tick) -> None:
        if tick.note:
            sys.stderr.write(f"\r{tick.done} of {tick.total} runs")

    with Store() as store:
        found = tuning.run(chosen.name, store, jobs=chosen.jobs, progress=tell)
    sys.stderr.write("\n")
    sys.stdout.write(table(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
