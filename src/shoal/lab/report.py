"""What came out: numbers by arm and seed, verdicts, faults, environment; saved and loaded as JSON.

A report holds condensed data, so that it stays small and survives a round trip: the curve of every
metric over all peers, percentiles over the peers, the peers' last values. The full rows stay in the
run store.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.lab.card import Plot
from shoal.lab.chart import Drawn
from shoal.lab.environment import fingerprint
from shoal.lab.judge import Verdict, judge_all
from shoal.lab.report_data import CellResult, Graph, condense, from_plain, graphs_of, to_plain
from shoal.lab.rows import Rows
from shoal.lab.statistics import Interval, summarise

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.lab.experiment import Experiment
    from shoal.lab.jobs import Outcome
    from shoal.lab.store import Store

SCHEMA = 1
# Totals that every report lists; the others are in the JSON.
SHOWN_TOTALS = ("virtual_s", "bytes_sent", "messages_sent", "messages_dropped", "cpu_s")


def date_text() -> str:
    """When a report is made; nothing else looks at that."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


@dataclass(frozen=True)
class Summary:
    """A metric of an arm over the seeds: the median, its interval, and how many seeds have it."""

    arm: str
    metric: str
    value: float
    interval: Interval | None
    seeds: int


@dataclass
class Report:
    """The outcome of an experiment. `save` writes .json, .html, .md and .csv beside each other.

    cells: one per arm and seed, with its curves, totals and faults; `cell(arm, seed)` finds one.
    `summary()` has medians over the seeds, `rows()` the last value of everything, `params(arm)` a
    trained model. In a notebook a report shows itself.
    """

    title: str
    system: str | None
    budget: str
    engine: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: list[CellResult]
    verdicts: tuple[Verdict, ...] = ()
    graphs: tuple[Graph, ...] = ()
    plots: tuple[Plot, ...] = ()
    charts: tuple[Drawn, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    schema: int = SCHEMA

    @classmethod
    def of(
        cls, experiment: Experiment, outcomes: Sequence[Outcome], store: Store | None = None
    ) -> Report:
        """Judge the claims and condense the runs."""
        arms = tuple(dict.fromkeys(outcome.cell.arm for outcome in outcomes))
        seeds = experiment.seed_list()
        runs = {(o.cell.arm, o.cell.seed): o.run for o in outcomes if o.run is not None}
        worlds = {(o.cell.arm, o.cell.seed): o.cell.scenario for o in outcomes}
        rows = Rows(runs, (*arms, *experiment.left_out), seeds, worlds)
        return cls(
            title=experiment.title or experiment.scenario.name or "experiment",
            system=experiment.system,
            budget=experiment.budget,
            engine=experiment.engine,
            arms=arms,
            seeds=seeds,
            cells=[condense(outcome, store) for outcome in outcomes],
            verdicts=judge_all(experiment.claims, rows, experiment.budget)
            if not (experiment.grid)
            else (),
            plots=() if experiment.grid else experiment.plots,
            charts=() if experiment.grid else tuple(each.drawn(rows) for each in experiment.charts),
            graphs=graphs_of([outcome.cell for outcome in outcomes]),
            environment=fingerprint(),
            created=date_text(),
        )

    @property
    def exit_code(self) -> int:
        """0, or 1 when a claim fails or is inconclusive, or (without claims) a run is missing."""
        bad = any(v.verdict in ("fails", "inconclusive") for v in self.verdicts)
        missing = not self.verdicts and any(cell.error for cell in self.cells)
        return int(bad or missing)

    def cell(self, arm: str, seed: int | None = None) -> CellResult:
        """One cell; without a seed the arm's first."""
        for cell in self.cells:
            if cell.arm == arm and seed in (None, cell.seed):
                return cell
        raise UsageError(
            f"report: no run of arm {arm!r} with seed {seed}; arms: {', '.join(self.arms)}; "
            f"seeds: {', '.join(map(str, self.seeds))}"
        )

    def metrics(self) -> list[str]:
        """Recorded metrics, `accuracy` and `loss` first."""
        names = dict.fromkeys(name for cell in self.cells for name in cell.curves)
        names.pop("bytes_sent", None)
        return sorted(names, key=lambda name: {"accuracy": 0, "loss": 1}.get(name, 2))

    def rows(self) -> list[tuple[str, int, str, float]]:
        """(arm, seed, metric, last value) of every run, totals included."""
        out = []
        for cell in self.cells:
            for name, curve in cell.curves.items():
                if curve and name not in cell.totals:
                    out.append((cell.arm, cell.seed, name, curve[-1][2]))
            out += [(cell.arm, cell.seed, name, value) for name, value in cell.totals.items()]
        return out

    def summary(self) -> list[Summary]:
        """Medians over the seeds, with intervals, of the last values and of the shown totals."""
        wanted = [*self.metrics(), *SHOWN_TOTALS]
        values: dict[tuple[str, str], list[float]] = {}
        for arm, _, metric, value in self.rows():
            values.setdefault((arm, metric), []).append(value)
        out = []
        for arm in self.arms:
            for metric in wanted:
                numbers = values.get((arm, metric))
                if numbers:
                    out.append(Summary(arm, metric, *summarise(numbers), len(numbers)))
        return out

    def params(
        self, arm: str, seed: int | None = None, peer: int | str = "mean"
    ) -> dict[str, Tensor]:
        """A run's final model as named tensors: of one peer, or the mean over staying peers."""
        from shoal.lab.export import load_model

        return load_model(self.cell(arm, seed), peer)

    def brief(self) -> Report:
        """A small copy for keeping beside the code: of each curve the last point, no spreads.

        Summary, verdicts and replay (which then compares last points) stay.
        """
        cells = [
            replace(
                cell, spreads={}, finals={}, peer_bytes=[], params_file="",
                curves={name: curve[-1:] for name, curve in cell.curves.items()},
            )
            for cell in self.cells
        ]  # fmt: skip
        return replace(self, cells=cells, graphs=())

    def to_json(self) -> str:
        """Everything, as JSON with a schema number; `load` is the inverse."""
        plain = asdict(self)
        return json.dumps(to_plain(plain), indent=1, allow_nan=False)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """A report from its JSON file (the .html, .md or .csv beside it may be named, too)."""
        file = Path(path)
        if file.suffix in (".html", ".md", ".csv"):
            file = file.with_suffix(".json")
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {error.strerror} (check the path)") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{file}: this is no report of Shoal: {error} (name the .json that `run` wrote)"
            ) from None

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of `to_json`."""
        data = json.loads(text)
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise UsageError(
                f"report: schema {found!r}; this version reads {SCHEMA} (run it again)"
            )
        return cls(**from_plain(data))

    def to_markdown(self) -> str:
        """The summary and the verdicts as tables."""
        from shoal.lab.text import markdown

        return markdown(self)

    def to_csv(self) -> str:
        """`arm,seed,metric,value`, a row per run and metric."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(("arm", "seed", "metric", "value"))
        writer.writerows((arm, seed, name, repr(value)) for arm, seed, name, value in self.rows())
        return buffer.getvalue()

    def to_html(self, replay: str = "") -> str:
        """One self-contained page; it loads nothing from anywhere."""
        from shoal.lab.page import page

        return page(self, replay)

    def save(self, folder: str | Path, name: str = "") -> Path:
        """Write all four forms; returns the path of the HTML page."""
        base = Path(folder) / (name or self.slug())
        base.parent.mkdir(parents=True, exist_ok=True)
        paths = {suffix: base.with_name(base.name + suffix) for suffix in _FORMS}
        paths[".json"].write_text(self.to_json(), encoding="utf-8")
        paths[".md"].write_text(self.to_markdown(), encoding="utf-8")
        paths[".csv"].write_text(self.to_csv(), encoding="utf-8")
        replay = f"shoal replay {paths['.json']}"
        paths[".html"].write_text(self.to_html(replay), encoding="utf-8")
        return paths[".html"]

    def slug(self) -> str:
        """A file name: the system or the title in lower case, and the budget of a reproduction."""
        words = "".join(c if c.isalnum() else " " for c in (self.system or self.title).lower())
        name = "-".join(words.split()) or "report"
        return f"{name}-{self.budget}" if self.system and self.budget else name

    def _repr_html_(self) -> str:
        """Notebooks show the page in a frame of its own."""
        from html import escape

        page = escape(self.to_html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:900px;border:0"></iframe>'


_FORMS = (".json", ".html", ".md", ".csv")
