"""What Bristle's card compares: worlds, rules, and the numbers that its claims take from runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from shoal.lab.card import Arm
from shoal.lab.rows import Rows
from shoal.lab.statistics import median

BYZANTINE = 8
TARGET = 0.85
ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "label": {"name": "class_flip", "source": 7, "target": 1},
    "labels": {"name": "label_flip"},
    "noise": {"name": "gaussian", "scale": 1.0, "add": True},
    "krum": {"name": "krum_attack"},
    "trimmed": {"name": "trimmed_mean_attack"},
    "negated": {"name": "inner_product", "epsilon": 3.0},
}
IID = ("label", "labels", "noise", "krum", "trimmed")
"""Attacks where all peers have all classes."""
IID_WHOLE = ("trimmed",)
"""What whole networks are run under: of those and noise it harms each of them most."""
FEW = ("calm", "labels", "noise", "negated")
"""Troubles where each has four of ten."""
BASELINES = ("mean", "median", "krum", "bridge", "mozi")
RESILIENT = ("median", "krum", "bridge", "mozi")
RULES: Mapping[str, Mapping[str, Any]] = {
    "mean": {"name": "mean"},
    "median": {"name": "median"},
    "krum": {"name": "krum", "byzantine": BYZANTINE},
    "bridge": {"name": "trimmed_mean", "trim": BYZANTINE},
}
RATES = {"head": 0.5, "whole": 0.3}
"""Learning rates: of a new head on frozen features, and of the whole network."""
HONEST_SHARE = 0.55
"""MOZI's rho: the part of the 19 neighbours that it believes honest, 11."""


def world(shares: str, trouble: str) -> dict[str, Any]:
    """Changes to the scenario: who has which classes, and who attacks how."""
    changes: dict[str, Any] = {} if shares == "iid" else {"task.classes_per_peer": 4}
    if trouble != "calm":
        changes |= {"attack": dict(ATTACKS[trouble]), "byzantine": BYZANTINE}
    return changes


def bristle(shares: str, trouble: str, changes: Mapping[str, Any] | None = None, **set: Any) -> Arm:
    return Arm(set=set, scenario={**world(shares, trouble), **(changes or {})})


def baseline(rule: str, net: str, shares: str, trouble: str) -> Arm:
    """A rule with frozen features ("head") or as published ("whole")."""
    changes = world(shares, trouble) | {"task.frozen": net == "head"}
    settings = {"lr": RATES[net], "batch_size": 20}
    if rule == "mozi":
        return Arm(system="mozi", set={**settings, "rho": HONEST_SHARE}, scenario=changes)
    changes["aggregator"] = dict(RULES[rule])
    return Arm(system="dpsgd", set={**settings, "steps": 1}, scenario=changes)


def _last(rows: Rows, seed: int, arm: str) -> float:
    return rows.value(arm, seed, "accuracy")


def iterations(rows: Rows) -> dict[int, float]:
    """Iterations to the target, over those of D-SGD on the whole network."""
    return {
        s: (rows.reach("bristle fast", s, "accuracy", TARGET) + 1)
        / (rows.reach("dsgd fast", s, "accuracy", TARGET) + 1)
        for s in rows.seeds
    }


def loss_to_attacks(rows: Rows) -> dict[int, float]:
    """Accuracy under the worst attack minus that without attackers."""
    return {
        s: min(_last(rows, s, f"bristle iid {attack}") for attack in IID)
        - _last(rows, s, "bristle iid calm")
        for s in rows.seeds
    }


def _worst(rows: Rows, seed: int, rule: str, attacks: Sequence[str] = IID) -> float:
    """Honest peers' mean accuracy under the attack that harms a rule most; all have all classes."""
    return min(_last(rows, seed, f"{rule} iid {attack}") for attack in attacks)


def _over_best(rows: Rows, net: str, attacks: Sequence[str]) -> dict[int, float]:
    rules = [f"{rule} {net}" for rule in BASELINES]
    best = max(rules, key=lambda rule: median([_worst(rows, s, rule, attacks) for s in rows.seeds]))
    return {s: _worst(rows, s, "bristle") - _worst(rows, s, best, attacks) for s in rows.seeds}


def over_published(rows: Rows) -> dict[int, float]:
    """Worst attack: minus the best baseline on the whole network under the trimmed-mean attack."""
    return _over_best(rows, "whole", IID_WHOLE)


def over_frozen(rows: Rows) -> dict[int, float]:
    """Worst attack: minus the best baseline's worst, with frozen features for all."""
    return _over_best(rows, "head", IID)


def average(rows: Rows, seed: int, rule: str) -> float:
    """Mean accuracy over all ten classes, over the four troubles of peers with four classes."""
    return fmean(_last(rows, seed, f"{rule} few {trouble}") for trouble in FEW)


def _few_over(rows: Rows, net: str) -> dict[int, float]:
    return {
        s: average(rows, s, "bristle")
        / fmean(average(rows, s, f"{rule} {net}") for rule in RESILIENT)
        for s in rows.seeds
    }


def few_over_published(rows: Rows) -> dict[int, float]:
    """Few classes: over the mean of the four resilient baselines on the whole network."""
    return _few_over(rows, "whole")


def few_over_frozen(rows: Rows) -> dict[int, float]:
    """Few classes: over the mean of the four resilient baselines with frozen features."""
    return _few_over(rows, "head")


def few_over_best(rows: Rows) -> dict[int, float]:
    """Few classes: minus the best baseline with frozen features, plain means included."""
    rules = [f"{rule} head" for rule in BASELINES]
    best = max(rules, key=lambda rule: median([average(rows, s, rule) for s in rows.seeds]))
    return {s: average(rows, s, "bristle") - average(rows, s, best) for s in rows.seeds}


def bytes_per_message(rows: Rows) -> dict[int, float]:
    """Bytes of a message, over those of D-SGD on the whole network."""

    def size(arm: str, seed: int) -> float:
        return rows.value(arm, seed, "bytes_sent") / rows.value(arm, seed, "messages_sent")

    return {s: size("bristle fast", s) / size("dsgd fast", s) for s in rows.seeds}
