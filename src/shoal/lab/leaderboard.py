"""Methods of learning side by side in the same worlds, at equal bytes and at equal virtual time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.build import check
from shoal.lab.card import Arm
from shoal.lab.cell import setting_hints
from shoal.lab.environment import fingerprint
from shoal.lab.experiment import Experiment, Tick
from shoal.lab.page_style import STYLE
from shoal.lab.report import Report
from shoal.lab.report_data import CellResult
from shoal.lab.scenario import Scenario, typed
from shoal.lab.statistics import Interval, summarise
from shoal.lab.store import Store
from shoal.lab.values import near

BASE = Scenario(
    name="leaderboard", peers=20, rounds=60, eval_every=1,
    task={"name": "digits", "split": "iid"},
    topology={"name": "random_regular", "degree": 6},
    links={"name": "links", "latency_s": 0.05, "uplink_bytes_per_s": 2.5e6,
           "downlink_bytes_per_s": 2.5e6},
    device={"name": "device", "flops_per_s": 2e7, "spread": 0.3},
)  # fmt: skip
"""20 peers with real 8x8 digits on lines of 20 Mbit/s; a round is a second or so."""

WORLDS: Mapping[str, Mapping[str, Any]] = {
    "equal shares": {},
    "Dirichlet 0.1": {"task.split": "dirichlet", "task.alpha": 0.1},
    "two classes": {"task.split": "classes", "task.classes_per_peer": 2},
    "30% crash": {
        "faults": [{"kind": "crash", "fraction": 0.3, "spare": [0], "at": {"round": 10}}],
    },
    "stragglers 10x": {
        "faults": [{"kind": "slow", "fraction": 0.2, "spare": [0], "at": 0.0, "factor": 10.0}],
    },
    "slow uplinks": {"links.uplink_bytes_per_s": 1e5},
    "ring": {"topology": {"name": "ring"}},
    "20% wrong labels": {"task.label_noise": 0.2},
}
"""What each world changes in `BASE`. Peer 0, the hub of methods that have one, is spared."""

METHODS = (
    "fedavg", "fedprox", "scaffold", "fedadam", "fedbuff", "dpsgd", "dfedsam", "gradient-tracking",
    "choco-sgd", "diloco", "adpsgd", "gossip", "modest", "local-only",
)  # fmt: skip
"""The first one says how many bytes and how much time all are given: half of what it takes."""

RATES = (1 / 3, 1.0, 3.0, 10.0)
"""Learning rates that are tried, as multiples of a method's own default."""

TUNING_SEED = 100
METRIC = "accuracy"


@dataclass(frozen=True)
class Place:
    """A method in a world: median accuracy over the seeds with its interval. early: it had ended
    before it had used up the bytes, or the time."""

    value: float
    interval: Interval | None
    early: bool = False


@dataclass
class Board:
    """The table. bytes_budget, time_budget_s: by world; rates: the learning rate of each method."""

    methods: tuple[str, ...]
    worlds: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: dict[str, float]
    at_bytes: dict[tuple[str, str], Place] = field(default_factory=dict)
    at_time: dict[tuple[str, str], Place] = field(default_factory=dict)
    bytes_budget: dict[str, float] = field(default_factory=dict)
    time_budget_s: dict[str, float] = field(default_factory=dict)
    errors: dict[tuple[str, str], str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Plain data: a list of places, and the budgets."""
        places = [
            {"method": method, "world": world, "at": at, **asdict(place)}
            for at, found in (("bytes", self.at_bytes), ("time", self.at_time))
            for (method, world), place in found.items()
        ]
        errors = [{"method": m, "world": w, "error": e} for (m, w), e in self.errors.items()]
        return json.dumps(
            {
                "methods": self.methods, "worlds": self.worlds, "seeds": self.seeds,
                "rates": self.rates, "places": places, "bytes_budget": self.bytes_budget,
                "time_budget_s": self.time_budget_s, "errors": errors,
                "environment": self.environment,
            },
            indent=1,
        )  # fmt: skip

    def tables(self) -> list[tuple[str, str, list[str], list[list[str]]]]:
        """(title, note, heads, rows) of both tables, methods by their mean over the worlds."""
        out = []
        for title, note, found in (
            ("At equal bytes", "Accuracy when all have sent as much as half of what "
             f"{self.methods[0]} sends.", self.at_bytes),
            ("At equal virtual time", "Accuracy after half of the time that "
             f"{self.methods[0]} takes.", self.at_time),
        ):  # fmt: skip
            order = sorted(self.methods, key=lambda m: -self._mean(found, m))
            rows = [
                [method, *(self._text(found.get((method, w)), method, w) for w in self.worlds),
                 _percent(self._mean(found, method))]
                for method in order
            ]  # fmt: skip
            out.append((title, note, ["method", *self.worlds, "mean"], rows))
        return out

    def _mean(self, found: Mapping[tuple[str, str], Place], method: str) -> float:
        values = [found[method, w].value for w in self.worlds if (method, w) in found]
        values = [v for v in values if math.isfinite(v)]
        return sum(values) / len(values) if len(values) == len(self.worlds) else -1.0

    def _text(self, place: Place | None, method: str, world: str) -> str:
        if place is None:
            return "does not run" if (method, world) in self.errors else "-"
        text = _percent(place.value) + ("*" if place.early else "")
        if place.interval is not None and place.interval.low != place.interval.high:
            text += f" [{_percent(place.interval.low)}, {_percent(place.interval.high)}]"
        return text

    def notes(self) -> list[str]:
        """What a reader must know."""
        tried = ", ".join(f"{rate:.2g}" for rate in RATES)
        chosen = ", ".join(f"{name} {rate:g}" for name, rate in self.rates.items())
        lines = [
            f"Median test accuracy of the peers in percent over {len(self.seeds)} seeds, with the "
            "interval of the median. An asterisk: the method ended before it had used up its "
            "bytes or its time. All methods see the same data, links and faults for the same seed.",
            f"Learning rates: {tried} times a method's default was tried with equal shares and "
            f"seed {TUNING_SEED}; chosen: {chosen or 'none'}.",
        ]
        lines += [f"{m} in {w!r}: {error}" for (m, w), error in self.errors.items()]
        return lines

    def markdown(self) -> str:
        """Both tables."""
        lines = ["# Leaderboard", ""]
        for title, note, heads, rows in self.tables():
            lines += [f"## {title}", "", note, "", "| " + " | ".join(heads) + " |"]
            lines += ["|" + " --- |" * len(heads)]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes())]) + "\n"

    def html(self) -> str:
        """One page that loads nothing."""
        parts = []
        for title, note, heads, rows in self.tables():
            head = "".join(f"<th>{escape(each)}</th>" for each in heads)
            body = "".join(
                "<tr>" + "".join(f"<td>{_cell(each)}</td>" for each in row) + "</tr>"
                for row in rows
            )
            parts.append(
                f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>'
                f'<div class="wide"><table class="numbers"><tr>{head}</tr>{body}</table></div>'
                "</section>"
            )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes())
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Leaderboard</title><style>{STYLE}</style></head>\n<body><main>"
            f"<header><h1>Leaderboard</h1></header>{''.join(parts)}"
            f"<section><h2>How to read it</h2>{notes}</section></main></body></html>\n"
        )

    def save(self, folder: str | Path) -> Path:
        """leaderboard.html, .md and .json; returns the first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (
            ("md", self.markdown()), ("json", self.to_json()), ("html", self.html()),
        ):  # fmt: skip
            path = folder / f"leaderboard.{suffix}"
            path.write_text(text, encoding="utf-8")
        return folder / "leaderboard.html"


def _percent(value: float) -> str:
    return "-" if not math.isfinite(value) or value < 0 else f"{100 * value:.1f}"


def _cell(text: str) -> str:
    value, bracket, rest = text.partition(" [")
    small = f'<span class="small">[{escape(rest)}</span>' if bracket else ""
    return escape(value) + small


def make_board(
    methods: Sequence[str] = METHODS, worlds: Sequence[str] = tuple(WORLDS), *, seeds: int = 3,
    changes: Mapping[str, Any] | None = None, tuned: bool = True, store: Store | None = None,
    jobs: int = 1, progress: Callable[[Tick], None] | None = None,
) -> Board:  # fmt: skip
    """Run what is not stored yet, and rank. changes: of `BASE`, such as fewer rounds.

    A method that does not run in a world (a hub that dies, no hub at all) is listed with the
    reason. UsageError for names that there are not.
    """
    for name, known, what in (
        *((m, discover.names(), "system") for m in methods),
        *((w, tuple(WORLDS), "world") for w in worlds),
    ):
        if name not in known:
            raise UsageError(f"leaderboard: no {what} {name!r}; {near(name, known)}")
    if len(set(methods)) != len(methods) or len(methods) < 1:
        raise UsageError("leaderboard: name at least one method, and each once")
    texts = {key: value for key, value in (changes or {}).items() if isinstance(value, str)}
    read = dict(typed(key, value) for key, value in texts.items())
    base = BASE.with_settings(
        {**{k: v for k, v in (changes or {}).items() if k not in texts}, **read}
    )
    run: dict[str, Any] = {"store": store, "jobs": jobs, "progress": progress}
    board = Board(tuple(methods), tuple(worlds), tuple(range(seeds)), {})
    if tuned:
        can = [method for method in methods if not _refused(board, method, "", base)]
        board.rates, board.errors = _tuned(can, base, run), {}
    for world in worlds:
        scenario = base.with_settings(WORLDS[world])
        fit = [m for m in methods if not _refused(board, m, world, scenario)]
        if methods[0] not in fit:
            raise UsageError(
                f"leaderboard: {methods[0]}, which sets the bytes and the time, does not run in "
                f"{world!r}: {board.errors[methods[0], world]} (name another method first)"
            )
        _place(board, world, _experiment(fit, scenario, board.seeds, board.rates, run))
    board.environment = fingerprint()
    return board


def _refused(board: Board, method: str, world: str, scenario: Scenario) -> bool:
    """Whether a method's parts cannot be in a world; the reason is noted."""
    try:
        for cell in Experiment({method: method}, scenario, board.seeds).cells():
            check(cell.scenario)
    except UsageError as error:
        board.errors[method, world] = str(error)
        return True
    return False


def _experiment(
    methods: Sequence[str], world: Scenario, seeds: tuple[int, ...], rates: Mapping[str, float],
    run: Mapping[str, Any],
) -> Report:  # fmt: skip
    arms = {m: Arm(system=m, set={"lr": rates[m]} if m in rates else {}) for m in methods}
    return Experiment(arms, world, seeds, title="Leaderboard").run(**run)


def _tuned(methods: Sequence[str], base: Scenario, run: Mapping[str, Any]) -> dict[str, float]:
    """The best learning rate of each method that has one, with equal shares."""
    arms, tried = {}, {}
    for method in methods:
        default = _default_rate(method)
        for factor in RATES if default else ():
            name = f"{method} {factor:.2g}"
            tried[name] = (method, default * factor)
            arms[name] = Arm(system=method, set={"lr": default * factor})
    if not arms:
        return {}
    report = Experiment(arms, base, (TUNING_SEED,), title="Learning rates").run(**run)
    best: dict[str, tuple[float, float]] = {}
    for name, (method, rate) in tried.items():
        cell = report.cell(name, TUNING_SEED)
        curve = cell.curves.get(METRIC, [])
        score = curve[-1][2] if curve and math.isfinite(curve[-1][2]) else -1.0
        if method not in best or score > best[method][0]:
            best[method] = (score, rate)
    return {method: float(f"{rate:.3g}") for method, (_, rate) in best.items()}


def _default_rate(method: str) -> float:
    """A method's own learning rate; 0 when it has none to set."""
    import inspect

    card = discover.load(method)
    if card.make is None or "lr" not in setting_hints(card):
        return 0.0
    default = inspect.signature(card.make).parameters["lr"].default
    return float(default) if isinstance(default, (int, float)) else 0.0


def _place(board: Board, world: str, report: Report) -> None:
    reference = [report.cell(board.methods[0], s) for s in board.seeds]
    sent = [cell.totals.get("bytes_sent", math.nan) for cell in reference]
    took = [cell.totals.get("virtual_s", math.nan) for cell in reference]
    board.bytes_budget[world] = summarise(sent)[0] / 2
    board.time_budget_s[world] = summarise(took)[0] / 2
    for method in report.arms:
        cells = [report.cell(method, seed) for seed in board.seeds]
        if error := next((cell.error for cell in cells if cell.error), ""):
            board.errors[method, world] = error
            continue
        for found, budget, axis in (
            (board.at_bytes, board.bytes_budget[world], "bytes"),
            (board.at_time, board.time_budget_s[world], "time"),
        ):
            values, early = zip(*(_at(cell, budget, axis) for cell in cells), strict=True)
            value, interval = summarise(values)
            found[method, world] = Place(value, interval, any(early))


def _at(cell: CellResult, budget: float, axis: str) -> tuple[float, bool]:
    """(accuracy at the last evaluation within a budget, whether the run ended within it)."""
    points = cell.curves.get(METRIC, [])
    whole = cell.totals["bytes_sent" if axis == "bytes" else "virtual_s"]
    if axis == "time":
        spent = [point[0] for point in points]
    else:
        spent = [_bytes_at(cell, point[0]) for point in points]
    within = [p[2] for p, used in zip(points, spent, strict=True) if used <= budget * (1 + 1e-9)]
    return (within[-1] if within else math.nan), whole < budget


def _bytes_at(cell: CellResult, time_s: float) -> float:
    """Bytes sent by then: as recorded, or in proportion to the time."""
    marks = cell.curves.get("bytes_sent", [])
    before = [point[2] for point in marks if point[0] <= time_s * (1 + 1e-12)]
    if marks:
        return before[-1] if before else 0.0
    whole_s = cell.totals["virtual_s"]
    return cell.totals["bytes_sent"] * (time_s / whole_s if whole_s else 1.0)
