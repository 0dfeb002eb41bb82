"""The card of a catalogue entry: what it is, where it comes from, what it claims.

A system's file ends with one literal `SYSTEM = System(...)`. Command line, documentation, tests and
reproduction are derived from it. Cards hold data and module-level functions only, so that `list`
and `show` can read them from the source text without running it (see `discover`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.lab.values import near

if TYPE_CHECKING:
    from shoal.lab.chart import Chart
    from shoal.lab.rows import Rows
    from shoal.lab.scenario import Scenario

KINDS = ("strategy", "program", "part", "study")
SCALES = ("any", "reduced", "full", "paper")
TAKES = ("last", "first", "max", "min", "mean", "sum")
STATISTICS = ("median", "mean", "min", "max")
VERDICTS = ("holds", "fails", "inconclusive", "out of scale")
Measure = Callable[["Rows"], Mapping[int, float]]
"""The experiment's runs -> one number per seed; a module-level function."""


@dataclass(frozen=True)
class Source:
    """The publication. `authors` reads like a citation: "Douillard et al. 2023"."""

    authors: str
    title: str
    arxiv: str = ""
    doi: str = ""
    venue: str = ""

    @property
    def year(self) -> str:
        """The last four-digit number of `authors`, '' when there is none."""
        years = re.findall(r"\b(?:19|20)\d\d\b", self.authors)
        return years[-1] if years else ""

    def bibtex(self, key: str) -> str:
        """A BibTeX entry.

        >>> print(Source("Yin et al. 2018", "Robust learning", arxiv="1803.01498").bibtex("tm"))
        @article{tm,
          author = {Yin and others},
          title = {Robust learning},
          year = {2018},
          eprint = {1803.01498},
          archivePrefix = {arXiv},
        }
        """
        names = re.sub(r"[,\s]*\(?\b(?:19|20)\d\d\b\)?\s*$", "", self.authors)
        names = re.sub(r"\s+et al\.?$", " and others", names).replace(" & ", " and ")
        lines = [("author", names), ("title", self.title), ("year", self.year)]
        lines += [("journal", self.venue), ("doi", self.doi), ("eprint", self.arxiv)]
        lines += [("archivePrefix", "arXiv")] if self.arxiv else []
        inside = "".join(f"  {name} = {{{value}}},\n" for name, value in lines if value)
        return f"@article{{{key},\n{inside}}}"


@dataclass(frozen=True)
class Arm:
    """One line of a comparison, by name, so that no system imports another.

    system: a catalogue name, None = the card's own; set: settings of what that system makes;
    scenario: changes to the scenario (dotted keys allowed); host: settings of the host strategy
    when the system is a part; prepare: a module-level function from the scenario of one seed to
    another, for worlds that must be computed (a fault list that depends on the graph). engine: what
    this arm must run on, whatever the experiment says: "processes" for real processes that real
    signals kill (see `lab.processes`).
    """

    system: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    scenario: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Scenario], Scenario] | None = None
    engine: str = ""


@dataclass(frozen=True)
class Bound:
    """A closed interval in which the statistic must lie."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UsageError(
                f"bound: low={self.low} and high={self.high}; need low <= high (swap them)"
            )

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "any"
        if self.low == -math.inf:
            return f"<= {self.high:.4g}"
        if self.high == math.inf:
            return f">= {self.low:.4g}"
        return f"{self.low:.4g} to {self.high:.4g}"


def at_most(value: float) -> Bound:
    """The statistic is `value` or less."""
    return Bound(high=value)


def at_least(value: float) -> Bound:
    """The statistic is `value` or more."""
    return Bound(low=value)


def between(low: float, high: float) -> Bound:
    """The statistic lies from `low` to `high`, ends included."""
    return Bound(low, high)


@dataclass(frozen=True)
class Compare:
    """How a seed's number comes from the arms' numbers of that seed."""

    kind: str
    arm: str
    other: str = ""

    def of(self, first: float, second: float = math.nan) -> float:
        if self.kind == "value":
            return first
        if self.kind == "difference":
            return first - second
        return first / second if second != 0 else math.nan

    def __str__(self) -> str:
        if self.kind == "value":
            return self.arm
        return f"{self.arm} {'-' if self.kind == 'difference' else '/'} {self.other}"


def value(arm: str) -> Compare:
    """The metric of one arm."""
    return Compare("value", arm)


def difference(arm: str, other: str) -> Compare:
    """`arm` minus `other`, seed by seed."""
    return Compare("difference", arm, other)


def ratio(arm: str, other: str) -> Compare:
    """`arm` over `other`, seed by seed; a zero denominator is not finite, hence inconclusive."""
    return Compare("ratio", arm, other)


@dataclass(frozen=True)
class Claim:
    """A published statement with the bound that this repository holds it to.

    Either `metric` and `compare` (with `take`: which value of the series), or `measure`.
    at: where the paper says it. statistic: over the paired seeds. scale: "any", "reduced" (checked
    at a smaller size than the paper's), "full" (needs the full budget), "paper" (cannot be checked
    here). expected: the verdict at the full budget when it is not "holds"; `reason` says why.
    """

    name: str
    statement: str
    holds: Bound
    metric: str = ""
    compare: Compare | None = None
    take: str = "last"
    measure: Measure | None = None
    at: str = ""
    statistic: str = "median"
    scale: str = "any"
    expected: str = "holds"
    reason: str = ""

    def __post_init__(self) -> None:
        for name, choices in (
            ("take", TAKES), ("statistic", STATISTICS), ("scale", SCALES), ("expected", VERDICTS),
        ):  # fmt: skip
            if (word := getattr(self, name)) not in choices:
                raise UsageError(f"claim {self.name}: {name} = {word!r}; {near(word, choices)}")
        direct = self.compare is not None and bool(self.metric)
        if direct == (self.measure is not None) and self.scale != "paper":
            raise UsageError(
                f"claim {self.name}: need either metric and compare, or measure (give one of them)"
            )
        if self.expected != "holds" and not self.reason:
            raise UsageError(
                f"claim {self.name}: expected = {self.expected!r} without a reason (add reason)"
            )


@dataclass(frozen=True)
class Plot:
    """A picture for the report: a metric's last value against a number in which arms differ.

    over: what the number is. lines: name -> (number, arm) of its points; an arm may be a point of
    several lines (what is undisturbed is where all of them begin).

    >>> sorted(Plot("Loss", "accuracy", "share", {"hubs": ((0.0, "calm"), (0.1, "few"))}).arms())
    ['calm', 'few']
    """

    title: str
    metric: str
    over: str
    lines: Mapping[str, tuple[tuple[float, str], ...]]

    def __post_init__(self) -> None:
        if not self.lines or any(len(points) < 2 for points in self.lines.values()):
            raise UsageError(f"plot {self.title!r}: a line needs two points or more (add arms)")

    def arms(self) -> set[str]:
        """Every arm that is drawn."""
        return {arm for points in self.lines.values() for _, arm in points}


@dataclass(frozen=True)
class Budget:
    """How much a reproduction may take: number of seeds, and changes to the scenario.

    arms: those that run, for a budget in which the claims about the others are out of scale; None
    = all.
    """

    seeds: int = 3
    scenario: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"budget: seeds = {self.seeds}; need at least 1 (raise seeds)")


@dataclass(frozen=True)
class System:
    """A catalogue entry; its family is the folder that holds its file.

    make: the Strategy, Program or part class; for a study a function from a scenario (and its
    settings) to a `Run` or to a mapping of metrics. None when every arm names another system.
    scenario: a family's scenario by name ("training.images_small") or a Scenario. uses: scenario
    settings that belong to the method, such as {"exchange": "star"}. role, host: of a part, the
    scenario field that it fills and the strategy that carries it, by name. charts: pictures that
    functions make of the runs (`shoal.lab.chart`).
    """

    name: str
    kind: str
    title: str
    make: Callable[..., Any] | None = None
    source: Source | None = None
    scenario: str | Scenario = ""
    uses: Mapping[str, Any] = field(default_factory=dict)
    role: str = ""
    host: str = ""
    arms: Mapping[str, Arm] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    plots: tuple[Plot, ...] = ()
    charts: tuple[Chart, ...] = ()
    deviations: tuple[str, ...] = ()
    small: Budget = field(default_factory=lambda: Budget(seeds=2))
    full: Budget = field(default_factory=lambda: Budget(seeds=5))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise UsageError(
                f"system {self.name!r}: need lower-case words joined by '-' (rename it)"
            )
        if self.kind not in KINDS:
            raise UsageError(f"system {self.name}: kind = {self.kind!r}; {near(self.kind, KINDS)}")
        if self.kind == "part" and not (self.role and self.host):
            raise UsageError(
                f"system {self.name}: a part needs role and host "
                '(such as role="aggregator", host="dpsgd")'
            )
        names = [claim.name for claim in self.claims]
        if len(set(names)) != len(names):
            raise UsageError(f"system {self.name}: two claims have one name (rename one)")
        for plot in self.plots:
            for arm in sorted(plot.arms() - set(self.all_arms())):
                raise UsageError(
                    f"system {self.name}: plot {plot.title!r} draws arm {arm!r}; "
                    f"{near(arm, self.all_arms())}"
                )
        for arm in (*(self.small.arms or ()), *(self.full.arms or ())):
            if arm not in self.all_arms():
                raise UsageError(
                    f"system {self.name}: a budget runs arm {arm!r}; {near(arm, self.all_arms())}"
                )
        for claim in self.claims:
            if claim.compare is None:
                continue
            for arm in filter(None, (claim.compare.arm, claim.compare.other)):
                if arm not in self.all_arms():
                    raise UsageError(
                        f"system {self.name}: claim {claim.name} compares arm {arm!r}; "
                        f"{near(arm, self.all_arms())}"
                    )
                if claim.scale != "full" and arm not in (self.small.arms or self.all_arms()):
                    raise UsageError(
                        f"system {self.name}: claim {claim.name} compares arm {arm!r}, which the "
                        "small budget leaves out (run it there, or set scale='full')"
                    )

    def all_arms(self) -> Mapping[str, Arm]:
        """The arms; without any, one arm with the system's own name and defaults."""
        return self.arms or {self.name: Arm()}

    def budget(self, name: str) -> Budget:
        if name not in ("small", "full"):
            raise UsageError(f"budget {name!r}; need small or full")
        return self.small if name == "small" else self.full
