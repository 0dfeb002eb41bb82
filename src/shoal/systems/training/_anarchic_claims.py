"""How the claims of anarchic federated learning are measured."""

from __future__ import annotations

import math

from shoal.lab.rows import Rows

TARGET = 0.25
"""The training loss to which versions are counted."""


def _worst(rows: Rows, pairs: tuple[tuple[str, str], ...]) -> dict[int, float]:
    """The least advantage in final accuracy of the first arm of a pair over the second."""
    return {
        seed: min(
            rows.value(arm, seed, "accuracy") - rows.value(other, seed, "accuracy")
            for arm, other in pairs
        )
        for seed in rows.seeds
    }


def cd_over_fedavg(rows: Rows) -> dict[int, float]:
    """AFA-CD against FedAvg with 5 and 10 classes per worker, the worse of both."""
    return _worst(rows, (("cd_5", "fedavg_5"), ("cd_10", "fedavg_10")))


def cs_over_fedavg(rows: Rows) -> dict[int, float]:
    """AFA-CS against FedAvg with 1, 5 and 10 classes per worker, the worst of them."""
    return _worst(rows, (("cs_1", "fedavg_1"), ("cs_5", "fedavg_5"), ("cs_10", "fedavg_10")))


def cd_over_fedavg_mlp(rows: Rows) -> dict[int, float]:
    """As `cd_over_fedavg`, with an MLP."""
    return _worst(rows, (("cd_5_mlp", "fedavg_5_mlp"), ("cd_10_mlp", "fedavg_10_mlp")))


def cs_over_fedavg_mlp(rows: Rows) -> dict[int, float]:
    """As `cs_over_fedavg`, with an MLP."""
    pairs = tuple((f"cs_{p}_mlp", f"fedavg_{p}_mlp") for p in (1, 5, 10))
    return _worst(rows, pairs)


def versions(rows: Rows, arm: str, seed: int) -> float:
    """Versions until the training loss is down to the target; inf = never."""
    reached = rows.reach(arm, seed, "training_loss", TARGET, falling=True)
    return reached + 1 if math.isfinite(reached) else reached


def speed_up(rows: Rows) -> dict[int, float]:
    """Versions with 8 returns each over versions with one return each, rates as sqrt(returns)."""
    return {s: versions(rows, "m8", s) / versions(rows, "m1", s) for s in rows.seeds}
