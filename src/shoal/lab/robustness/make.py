"""Plans a robustness matrix, runs what is not stored yet, and has breakdowns looked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.card import Arm
from shoal.lab.cell import Cell, Launcher
from shoal.lab.environment import fingerprint
from shoal.lab.experiment import Experiment, Tick
from shoal.lab.report import date_text
from shoal.lab.robustness.breakdown import breakdowns
from shoal.lab.robustness.cases import Case, Row, Runs, case_of, field_of
from shoal.lab.robustness.liars import most_liars
from shoal.lab.robustness.matrix import Matrix
from shoal.lab.scenario import Part
from shoal.lab.store import Store

HOSTS = ("fedavg", "dpsgd")
"""What rules and attacks are put into unless somebody says otherwise: a server, and a graph."""
RULES = (
    "mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum",
    "centered_clipping", "nnm",
)  # fmt: skip
ATTACKS = (
    "sign_flip", "alie:factor=search", "inner_product:factor=search", "mimic", "gaussian",
    "label_flip",
)  # fmt: skip
SHARES = (0.1, 0.2, 0.3)
BELOW = 0.5
"""A rule has broken down where its worst accuracy is below this part of its clean accuracy."""
RATES = ("lr", "learning_rate")
"""Keys of a grid whose values are not worlds: each rule gets the one that is best without liars."""
TUNING_SEED = 100
MEAN = Part("mean")

Plan = list[tuple[Row, Part | None, int, Case]]
"""(rule in its world, attack, how many lie, cells) of every field."""


def make_matrix(
    experiment: Experiment, rules: Sequence[Part], attacks: Sequence[Part],
    shares: Sequence[float] = SHARES, *, told: int | None = None, below: float | None = None,
    store: Store | None = None, jobs: int = 1, progress: Callable[[Tick], None] | None = None,
    launcher: Launcher | None = None, fresh: bool = False,
) -> Matrix:  # fmt: skip
    """Run every rule under every attack with every share of liars, and report.

    experiment: the hosts (its arms: strategies by name), the scenario, seeds and overrides. Every
    combination of its grid is a world of its own; learning rates in it (`lr`) are none: each rule
    takes the one that is best without liars, on seed 100. The same liars, placed by key, are in
    every field of a seed; a hub never lies. told: what rules are told that ask for a number of
    liars; None = the truth. below: look for breakdowns, too, at this part of the clean accuracy.
    A rule that cannot stand a number of liars is refused in its fields, with the reason. Runs are
    stored, and taken from the store, as by `Experiment.run`.

    >>> from shoal.lab.scenario import Scenario
    >>> world = Scenario(peers=7, rounds=2, task={"name": "digits", "hidden": [4]})
    >>> server = Experiment({"fedavg": "fedavg"}, world)
    >>> found = make_matrix(server, [Part("krum")], [Part("zero")], [0.2, 0.5])
    >>> [found.entry("fedavg", "krum", "zero", share).refused for share in (0.2, 0.5)]
    ['', 'krum cannot stand 4 liars among 7 vectors; 2 at most']
    """
    _check(experiment, shares, told, below)
    runs = Runs(store, jobs, progress, launcher, fresh)
    matrix = Matrix(
        title=experiment.title or "Robustness", rules=tuple(rule.describe() for rule in rules),
        attacks=tuple(attack.describe() for attack in attacks), shares=tuple(sorted(shares)),
        seeds=experiment.seed_list(), told=told, below=below,
    )  # fmt: skip
    rows = _rows(experiment, rules, matrix, runs)
    matrix.worlds = tuple(dict.fromkeys(row.world for row in rows))
    matrix.peers = {row.world: row.peers for row in rows}
    counts = {row.world: _counts(row.base, matrix.shares) for row in rows}
    plan = _plan(rows, attacks, counts, told)
    runs.need(case for *_, case in plan)
    for row, attack, count, case in plan:
        share = dict(zip(counts[row.world], matrix.shares, strict=True)).get(count, 0.0)
        matrix.entries.append(field_of(row, attack, count, share, case, runs))
    if below is not None:
        chosen = [row for row in rows if not row.compared]
        breakdowns(chosen, attacks, matrix, told, below, runs)
    matrix.environment = fingerprint()
    matrix.created = date_text()
    return matrix


def _check(
    experiment: Experiment, shares: Sequence[float], told: int | None, below: float | None
) -> None:
    for name, arm in experiment.arms.items():
        system = arm.system if isinstance(arm, Arm) else arm
        kind = discover.load(system).kind if isinstance(system, str) else "live object"
        if kind != "strategy":
            raise UsageError(
                f"compare --aggregators: {name} is a {kind}; rules and attacks are put into "
                f"strategies (name one, such as {' or '.join(HOSTS)})"
            )
    for key in (*experiment.overrides, *experiment.grid):
        if key.partition(".")[0] in ("aggregator", "attack", "byzantine"):
            raise UsageError(
                f"compare --aggregators: {key} is what the matrix goes through (settings of a part "
                "stand behind its name: --aggregators nnm:then=krum)"
            )
    texts = ",".join(f"{share:g}" for share in shares)
    if not shares or len(set(shares)) != len(shares):
        raise UsageError(f"--byzantine {texts}; need different shares, such as 0.1,0.2")
    for share in shares:
        if not 0.0 <= share < 1.0:
            raise UsageError(f"--byzantine {share:g}; need shares from 0 to below 1 (0.2 is 20%)")
    if told is not None and told < 0:
        raise UsageError(f"--told {told}; need 0 or more (leave it out to tell the truth)")
    if below is not None and not 0.0 < below < 1.0:
        raise UsageError(f"--below {below:g}; need a part of the clean accuracy, above 0, below 1")


def _bases(
    experiment: Experiment, rate: Any, seeds: tuple[int, ...]
) -> dict[str, tuple[Cell, ...]]:
    """The cells of each world, one per seed, without a rule and without liars."""
    late = {} if rate is None else {RATES[0]: rate}
    grid = {key: values for key, values in experiment.grid.items() if key not in RATES}
    # Only the end counts; whoever wants the way there says so.
    overrides = {"eval_every": 0, **experiment.overrides, **late}
    whole = replace(experiment, seeds=seeds, overrides=overrides, grid=grid)
    found: dict[str, tuple[Cell, ...]] = {}
    for cell in whole.cells():
        name = cell.arm if rate is None else f"{cell.arm}, lr {rate}"
        found[cell.arm] = (*found.get(cell.arm, ()), replace(cell, arm=name))
    return found


def _rows(experiment: Experiment, rules: Sequence[Part], matrix: Matrix, runs: Runs) -> list[Row]:
    """Every rule in every world, at its learning rate; and the mean, to compare with."""
    given = [values for key, values in experiment.grid.items() if key in RATES]
    if len(given) > 1:
        raise UsageError("--grid: learning rates are given twice (give lr alone)")
    rates = tuple(given[0]) if given else (None,)
    everything = [(rule, False) for rule in rules]
    if MEAN not in rules:
        everything.append((MEAN, True))
    by_rate = {rate: _bases(experiment, rate, matrix.seeds) for rate in rates}
    worlds = tuple(by_rate[rates[0]])
    best = dict.fromkeys(((w, rule) for w in worlds for rule, _ in everything), rates[0])
    if given:
        best = _tuned(experiment, [rule for rule, _ in everything], rates, matrix, runs)
        matrix.rates = {f"{w}: {rule.describe()}": float(rate) for (w, rule), rate in best.items()}
    return [
        Row(world, rule, by_rate[best[world, rule]][world], compared)
        for world in worlds
        for rule, compared in everything
    ]


def _tuned(
    experiment: Experiment, rules: Sequence[Part], rates: tuple[Any, ...], matrix: Matrix,
    runs: Runs,
) -> dict[tuple[str, Part], Any]:  # fmt: skip
    """The rate with which each rule, told of the most liars that it stands, is best without any."""
    cases: dict[tuple[str, Part, Any], Case] = {}
    for rate in rates:
        for world, base in _bases(experiment, rate, (TUNING_SEED,)).items():
            counts = sorted({0, *_counts(base, matrix.shares)})
            for rule in rules:
                clean = [case_of(Row(world, rule, base), None, n, matrix.told) for n in counts]
                cases[world, rule, rate] = [c for c in clean if not c.refused or c is clean[0]][-1]
    runs.need(cases.values())
    best: dict[tuple[str, Part], tuple[float, Any]] = {}
    for (world, rule, rate), case in cases.items():
        score = runs.values(case)[0].get(TUNING_SEED, -1.0)
        if (world, rule) not in best or score > best[world, rule][0]:
            best[world, rule] = (score, rate)
    return {key: rate for key, (_, rate) in best.items()}


def _counts(base: Sequence[Cell], shares: Sequence[float]) -> tuple[int, ...]:
    """How many peers lie at each share."""
    peers = base[0].scenario.peers
    most = min(most_liars(cell.scenario) for cell in base)
    counts = tuple(math.floor(share * peers + 0.5) for share in shares)
    for share, count in zip(shares, counts, strict=True):
        if (share > 0 and count < 1) or count > most:
            raise UsageError(
                f"--byzantine {share:g}: {count} of {peers} peers; need 1 to {most}, as a hub does "
                "not lie and somebody must be honest (change the share, or --peers)"
            )
    if len(set(counts)) != len(counts):
        texts = ",".join(f"{share:g}" for share in shares)
        raise UsageError(
            f"--byzantine {texts}: of {peers} peers these are {', '.join(map(str, counts))} liars; "
            "need different numbers (leave a share out, or raise --peers)"
        )
    return counts


def _plan(
    rows: Sequence[Row], attacks: Sequence[Part], counts: Mapping[str, tuple[int, ...]],
    told: int | None,
) -> Plan:  # fmt: skip
    """Every field: nobody lies and the rule knows it; nobody lies and it is prepared; attacks.

    A rule that others are compared with is needed without liars only.
    """
    out: Plan = []
    for row in rows:
        out.append((row, None, 0, case_of(row, None, 0, told)))
        for count in counts[row.world] if not row.compared else ():
            if count:
                out += [
                    (row, attack, count, case_of(row, attack, count, told))
                    for attack in (None, *attacks)
                ]
    return out
