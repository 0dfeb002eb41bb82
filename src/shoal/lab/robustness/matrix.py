"""What came out of a robustness matrix: fields, worst cases, averages, costs and breakdowns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.lab.robustness.text import comma_separated, markdown, percent, share_text
from shoal.lab.statistics import median


@dataclass(frozen=True)
class Entry:
    """One field. attack: "" = nobody lies, and the rule is told as if `liars` did.

    told: how many liars the rule was told of, None if it does not ask; values: the honest peers'
    accuracy at the end, by seed; refused: why the rule cannot stand that many; error: what a run
    ended in.
    """

    world: str
    rule: str
    attack: str
    share: float
    liars: int
    told: int | None
    values: Mapping[int, float]
    refused: str = ""
    error: str = ""

    @property
    def value(self) -> float:
        """The median over the seeds; nan where nothing ran."""
        return median(list(self.values.values()))

    @property
    def text(self) -> str:
        """Percent, or what is there in place of a number."""
        if self.refused:
            return "refused"
        return percent(self.value) if self.values else "error"


@dataclass(frozen=True)
class Breakdown:
    """The smallest number of liars that breaks a rule; None if none up to `most` does.

    attack: under which it falls; refused: why it does not stand that many at all.
    """

    world: str
    rule: str
    most: int
    liars: int | None = None
    share: float | None = None
    attack: str = ""
    refused: str = ""

    @property
    def text(self) -> str:
        """A share and how it came about."""
        if self.liars is None or self.share is None:
            return f"none up to {self.most}"
        how = "refused" if self.refused else self.attack
        return f"{share_text(self.share)} ({self.liars}), {how}"


@dataclass(frozen=True)
class Summary:
    """A rule in a world: accuracies. clean: nobody lies and the rule knows it.

    clean_cost: the accuracy without liars, when the rule is told of the most that it stands here,
    minus that of the mean (below 0: it costs so much); worst: the lowest of all fields, and where;
    average: over all fields that ran, `ran` of `fields`.
    """

    world: str
    rule: str
    clean: float
    clean_cost: float
    worst: float
    worst_attack: str
    worst_share: float
    average: float
    ran: int
    fields: int


@dataclass
class Matrix:
    """The outcome of `make_matrix`. `save` writes .html, .json, .md and .csv.

    peers: how many there are in each world; rates: the learning rates that were chosen, by world
    and rule; below: the part of the clean accuracy that breakdowns are about, None = not looked
    for; probes: what the search for them tried besides.
    """

    title: str
    rules: tuple[str, ...]
    attacks: tuple[str, ...]
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    worlds: tuple[str, ...] = ()
    told: int | None = None
    below: float | None = None
    peers: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    probes: list[Entry] = field(default_factory=list)
    breakdowns: list[Breakdown] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def exit_code(self) -> int:
        """1 when a run ended in an error. That a rule is refused is a result."""
        return int(any(entry.error for entry in (*self.entries, *self.probes)))

    def entry(self, world: str, rule: str, attack: str, share: float) -> Entry:
        """One field."""
        place = (world, rule, attack, share)
        return next(e for e in self.entries if (e.world, e.rule, e.attack, e.share) == place)

    def clean(self, world: str, rule: str) -> float:
        """The accuracy where nobody lies and the rule knows it."""
        return self.entry(world, rule, "", 0.0).value

    def clean_cost(self, world: str, rule: str) -> float:
        """Accuracy without liars, of the rule as it stands prepared, minus that of the mean."""
        own = [e for e in self.entries if (e.world, e.rule, e.attack) == (world, rule, "")]
        prepared = max((e for e in own if e.values), key=lambda e: e.share, default=None)
        return math.nan if prepared is None else prepared.value - self.clean(world, "mean")

    def attacked(self, world: str, rule: str, share: float | None = None) -> list[Entry]:
        """The fields in which somebody lies, of one share or of all."""
        return [
            e for e in self.entries
            if e.attack and (e.world, e.rule) == (world, rule) and share in (None, e.share)
        ]  # fmt: skip

    def worst(self, world: str, rule: str, share: float | None = None) -> Entry | None:
        """The field with the lowest accuracy; None where nothing ran."""
        ran = [e for e in self.attacked(world, rule, share) if e.values]
        return min(ran, key=lambda e: e.value, default=None)

    def average(self, world: str, rule: str, share: float | None = None) -> float:
        """Mean accuracy over the fields that ran."""
        ran = [e.value for e in self.attacked(world, rule, share) if e.values]
        return math.fsum(ran) / len(ran) if ran else math.nan

    def at_worst(self, world: str, rule: str, share: float) -> tuple[float, str]:
        """The worst case of a share: the accuracy, and the text of its field."""
        if not share:
            clean = self.entry(world, rule, "", 0.0)
            return clean.value, clean.text
        worst = self.worst(world, rule, share) or self.attacked(world, rule, share)[0]
        return worst.value, worst.text

    def summary(self) -> list[Summary]:
        """A row for each rule in each world, the best worst case first."""
        out = []
        for world in self.worlds:
            rows = []
            for rule in self.rules:
                worst, fields = self.worst(world, rule), self.attacked(world, rule)
                rows.append(
                    Summary(
                        world, rule, self.clean(world, rule), self.clean_cost(world, rule),
                        math.nan if worst is None else worst.value,
                        "" if worst is None else worst.attack,
                        math.nan if worst is None else worst.share,
                        self.average(world, rule), sum(bool(e.values) for e in fields), len(fields),
                    )
                )  # fmt: skip
            out += sorted(rows, key=_order)
        return out

    def breakdown(self, world: str, rule: str) -> Breakdown | None:
        """Where a rule breaks down, if that was looked for."""
        place = (world, rule)
        return next((b for b in self.breakdowns if (b.world, b.rule) == place), None)

    def records(self) -> list[dict[str, Any]]:
        """Everything as plain objects, one for each field, summary and breakdown."""
        fields = [
            {"field": e.attack or "none lies", **asdict(e), "value": e.value,
             "values": {str(seed): value for seed, value in e.values.items()}}
            for e in (*self.entries, *self.probes)
        ]  # fmt: skip
        summaries = [{"summary": row.rule, **asdict(row)} for row in self.summary()]
        ends = [{"breakdown": each.rule, **asdict(each)} for each in self.breakdowns]
        return [*fields, *summaries, *ends]

    def to_json(self) -> str:
        """What the matrix is made of, and `records`; null in place of numbers that are none."""
        whole = {
            "title": self.title, "worlds": self.worlds, "rules": self.rules,
            "attacks": self.attacks, "shares": self.shares, "seeds": self.seeds,
            "told": self.told, "below": self.below, "peers": self.peers, "rates": self.rates,
            "records": self.records(), "environment": self.environment, "created": self.created,
        }  # fmt: skip
        return json.dumps(_finite(whole), indent=1, allow_nan=False)

    def to_csv(self) -> str:
        """A row for each field and seed, and one for each field that has no number."""
        return comma_separated(self)

    def to_markdown(self) -> str:
        """All tables, what was refused, notes."""
        return markdown(self)

    def to_html(self) -> str:
        """One page that loads nothing."""
        from shoal.lab.robustness.page import page

        return page(self)

    def save(self, folder: str | Path) -> Path:
        """Write all four forms; returns the path of the page."""
        words = "".join(c if c.isalnum() else " " for c in self.title.lower()).split()
        base = Path(folder) / ("-".join(words) or "robustness")
        base.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in (
            (".json", self.to_json()), (".md", self.to_markdown()), (".csv", self.to_csv()),
            (".html", self.to_html()),
        ):  # fmt: skip
            base.with_name(base.name + suffix).write_text(text, encoding="utf-8")
        return base.with_name(base.name + ".html")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def _order(row: Summary) -> float:
    """The best worst case first; then those that do not stand everything."""
    return -row.worst if row.ran == row.fields and math.isfinite(row.worst) else 2.0
