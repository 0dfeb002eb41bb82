"""What SybilWall's claims measure: how often the attack succeeds, and how even accuracy stays."""

from __future__ import annotations

from shoal.lab.rows import Rows

SCENARIOS = ("dense", "dense 2", "distributed", "sparse")
BASELINES = ("average", "median", "krum", "multikrum", "neighbours")


def _success(rows: Rows, seed: int, arm: str) -> float:
    return rows.value(arm, seed, "attack_success")


def worst(rows: Rows, seed: int, rule: str) -> float:
    """The attack's success in the scenario that harms a rule most."""
    return max(_success(rows, seed, f"{rule} {world}") for world in SCENARIOS)


def worst_case(rows: Rows) -> dict[int, float]:
    """Worst success against SybilWall minus that against the best decentralised baseline."""
    return {
        s: worst(rows, s, "wall") - min(worst(rows, s, rule) for rule in BASELINES)
        for s in rows.seeds
    }


def accuracy_range(rows: Rows) -> dict[int, float]:
    """SybilWall's best accuracy minus its worst, over all scenarios and without attack."""
    out = {}
    for seed in rows.seeds:
        found = [
            rows.value(f"wall {world}", seed, "untouched_accuracy")
            for world in ("calm", *SCENARIOS)
        ]
        out[seed] = max(found) - min(found)
    return out


def few_and_many(rows: Rows) -> dict[int, float]:
    """At 40 attack edges: the lower success of 1 and 2 Sybils minus the higher of 10 and 20."""
    return {
        s: min(_success(rows, s, "wall 1 sybil"), _success(rows, s, "wall 2 sybils"))
        - max(_success(rows, s, "wall 10 sybils"), _success(rows, s, "wall distributed"))
        for s in rows.seeds
    }
