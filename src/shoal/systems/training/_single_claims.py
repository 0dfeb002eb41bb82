"""How the claims of a single merging are measured, and its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shoal.lab.rows import Rows
from shoal.lab.statistics import median

SETTLED = 0.2
"""From this share of the rounds on the models must be mergeable."""


def reduced_messages(rows: Rows) -> dict[int, float]:
    """Messages of the single merge over the server's, each mean counted as an all-reduce."""
    out = {}
    for seed in rows.seeds:
        single, server = rows.run("single", seed), rows.run("server", seed)
        if single is None or server is None:
            out[seed] = math.nan
            continue
        peers = single.peers
        all_to_all, reduced = peers * (peers - 1), 2 * (peers - 1)
        means = server.messages_sent / all_to_all
        out[seed] = (single.messages_sent - all_to_all + reduced) / (means * reduced)
    return out


def _mergeability(rows: Rows, arm: str, seed: int) -> dict[int, float]:
    """Accuracy of the mean model minus the peers' mean, by round."""
    merged = {row.round: row.value for row in rows.series(arm, seed, "mean_model_accuracy")}
    local = {row.round: row.value for row in rows.series(arm, seed, "accuracy")}
    return {round: merged[round] - local[round] for round in merged if round in local}


def least_mergeability(rows: Rows) -> dict[int, float]:
    """The least of it under sparse gossip, after a fifth of the rounds."""
    out = {}
    for seed in rows.seeds:
        found = _mergeability(rows, "sparse", seed)
        last = max(found, default=0)
        out[seed] = min(
            (value for round, value in found.items() if round >= SETTLED * (last + 1)),
            default=math.nan,
        )
    return out


def gap_growth(rows: Rows) -> dict[int, float]:
    """How much further the merged model is from the server's after 2,000 steps than after 600."""

    def gap(seed: int, ending: str) -> float:
        server, single = f"server{ending}", f"single{ending}"
        return rows.value(server, seed, "accuracy") - rows.value(single, seed, "accuracy")

    return {seed: gap(seed, " long") - gap(seed, "") for seed in rows.seeds}


def two_curves(rows: Rows) -> Mapping[str, Sequence[tuple[int, float]]]:
    """Median over the seeds, by round: merged models and peers' models, and the server's."""
    lines = {
        "merged, if it were now": ("sparse", "mean_model_accuracy"),
        "mean over the peers": ("sparse", "accuracy"),
        "server": ("server", "accuracy"),
    }
    out: dict[str, list[tuple[int, float]]] = {}
    for name, (arm, metric) in lines.items():
        values: dict[int, list[float]] = {}
        for seed in rows.seeds:
            for row in rows.series(arm, seed, metric):
                values.setdefault(row.round, []).append(row.value)
        out[name] = [(round, median(found)) for round, found in sorted(values.items())]
    return out
