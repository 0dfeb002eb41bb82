"""How the claims of FedBuff are measured."""

from __future__ import annotations

from shoal.lab.rows import Rows, at_time

METRIC = "mean_model_accuracy"
"""Of the server's model; clients of the asynchronous arms report at the end only."""
TARGET = 0.85


def time_over_fedavg(rows: Rows) -> dict[int, float]:
    """Virtual time to the target, as a multiple of FedAvg's."""

    def reached(arm: str, seed: int) -> float:
        return rows.reach(arm, seed, METRIC, TARGET, axis="time_s", window=2)

    return {seed: reached("fedbuff", seed) / reached("fedavg", seed) for seed in rows.seeds}


def gain_over_fedavg(rows: Rows) -> dict[int, float]:
    """Accuracy of the last three reports before the earlier of both runs ends, less FedAvg's."""
    return {seed: _late(rows, "fedbuff", seed) - _late(rows, "fedavg", seed) for seed in rows.seeds}


def _late(rows: Rows, arm: str, seed: int) -> float:
    """Mean accuracy over the last fifth of the time that both arms were running."""
    curves = {each: rows.series(each, seed, METRIC) for each in ("fedbuff", "fedavg")}
    if not all(curves.values()):
        return float("nan")
    end_s = min(curve[-1].time_s for curve in curves.values())
    return sum(at_time(curves[arm], end_s * part) for part in (0.8, 0.85, 0.9, 0.95, 1.0)) / 5
