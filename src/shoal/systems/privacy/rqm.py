"""Randomised quantisation: differential privacy from rounding alone, without added noise.

A client clips each entry of its scaled gradient, rounds it at random to one of a random part of 16
levels and sends the level's number. The hub gets the sum of these numbers alone (secure
aggregation) and takes a step along the decoded mean, which has no bias but that of clipping.
Compared with the Poisson binomial mechanism, which draws the number from a binomial law, at equal
bits and equal privacy.

All guarantees here are for one entry of one message, as in the paper. Entries and rounds add up: a
model of 650 parameters that is trained for 150 rounds spends 97,500 times as much, which is no
guarantee worth the name (`Accountant.epsilon` says how much). Sampling of clients is not made use
of. Without secure aggregation only the figures for one client hold.

Youn et al. 2023 (arXiv 2306.11913).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.lab.card import (
    Arm,
    Budget,
    Claim,
    Plot,
    Source,
    System,
    at_least,
    at_most,
    difference,
    ratio,
)
from shoal.lab.chart import Chart
from shoal.lab.rows import Rows
from shoal.parts.transform.rqm import Rqm
from shoal.systems.privacy._rqm_measures import (
    divergence_curves,
    local_ratio,
    off_figures,
    sums_ratio,
    variance_gap,
    worst_pair,
)

SCALE = 32.0
"""What gradients are multiplied with before they are clipped to 1.5: 23% of the entries are clipped
at first, 5% after 25 rounds, 2% at the end."""

COHORT: Mapping[str, Any] = {"exchange.sample": 40, "exchange.hub_works": False}


def _host(lr: float) -> dict[str, Any]:
    """One gradient of 16 samples a client, scaled; the hub's step takes the scale out again."""
    return {
        "lr": SCALE, "steps": 1, "batch_size": 16, "server_lr": lr / SCALE, "by_samples": False,
    }  # fmt: skip


def _rqm(lr: float = 8.0, **settings: Any) -> Arm:
    return Arm(set={"clients": 40, **settings}, host=_host(lr), scenario=COHORT)


def _other(name: str, lr: float = 8.0, **settings: Any) -> Arm:
    """Another transform in the same place."""
    transform = {"name": name, **settings}
    return Arm(system="fedavg-updates", set=_host(lr), scenario={**COHORT, "transform": transform})


def _pbm(theta: float, lr: float = 8.0) -> Arm:
    return _other("pbm", lr, theta=theta, clients=40)


PAIRS = (
    ("rqm 0.21", "pbm 0.21"),
    ("rqm", "pbm"),
    ("rqm 1.07", "pbm 1.07"),
    ("rqm 1.67", "pbm 1.67"),
)
"""Arms of equal divergence of order 2 for sums of 40; those without a number have 0.49."""


def frontier_gap(rows: Rows) -> dict[int, float]:
    """RQM minus PBM in accuracy at equal divergence, mean of the four pairs."""
    out = {}
    for s in rows.seeds:
        gaps = [
            rows.value(ours, s, "mean_model_accuracy")
            - rows.value(theirs, s, "mean_model_accuracy")
            for ours, theirs in PAIRS
        ]
        out[s] = sum(gaps) / len(gaps)
    return out


def uplink_ratio(rows: Rows) -> dict[int, float]:
    """Uplink bytes of 32-bit values over those of codes under masks, all headers included."""
    out = {}
    for s in rows.seeds:
        dense, coded = rows.run("none", s), rows.run("rqm", s)
        if dense is None or coded is None:
            out[s] = float("nan")
        else:
            out[s] = dense.bytes_by_kind["Update"] / coded.bytes_by_kind["Update"]
    return out


SYSTEM = System(
    name="rqm",
    kind="part",
    title="Privacy from rounding to a random part of the levels",
    make=Rqm,
    source=Source(
        "Youn et al. 2023",
        "Randomized Quantization is All You Need for Differential Privacy in Federated Learning",
        arxiv="2306.11913",
    ),
    scenario="privacy.digits_clients",
    role="transform",
    host="fedavg-updates",
    arms={
        "rqm": _rqm(),
        "pbm": _pbm(0.2443),
        "levels": _rqm(extension=0.0, keep=1.0, private=False),
        "gauss": _other("clip_entries", noise=0.68),
        "clip": _other("clip_entries"),
        "none": _other("identity", lr=4.0),
        "rqm 0.21": _rqm(extension=3.0),
        "pbm 0.21": _pbm(0.1732),
        "rqm 1.07": _rqm(extension=0.75),
        "pbm 1.07": _pbm(0.3162),
        "rqm 1.67": _rqm(keep=0.7),
        "pbm 1.67": _pbm(0.3532),
    },
    claims=(
        Claim(
            "figures",
            "variances and divergences are within 1% of those of a second implementation",
            at_most(0.01),
            measure=off_figures,
        ),
        Claim(
            "matched",
            "the variances of both mechanisms differ by at most 10% (entries of 0 and of clip)",
            at_most(0.10),
            measure=variance_gap,
        ),
        Claim(
            "local",
            "one client's code: RQM's divergence is at most 0.6 times PBM's at every order",
            at_most(0.6),
            measure=local_ratio,
        ),
        Claim(
            "sums",
            "sums of 1, 10 and 40 codes: RQM's divergence is at most PBM's at every order to 64",
            at_most(1.0),
            measure=sums_ratio,
        ),
        Claim(
            "worst-pair",
            "no two of 41 entries are easier to tell apart than the extremes",
            at_most(1.0 + 1e-9),
            measure=worst_pair,
        ),
        Claim(
            "accuracy",
            "at equal divergence of order 2 at least as accurate as PBM",
            at_least(0.0),
            "mean_model_accuracy",
            difference("rqm", "pbm"),
            scale="full",
        ),
        Claim(
            "near-exact",
            "at least 0.9 times as accurate as gradients that are neither rounded nor clipped",
            at_least(0.90),
            "mean_model_accuracy",
            ratio("rqm", "none"),
            scale="full",
        ),
        Claim(
            "frontier",
            "at equal divergence at least as accurate as PBM, mean of four settings",
            at_least(0.0),
            measure=frontier_gap,
            scale="full",
        ),
        Claim(
            "uplink",
            "codes under masks take at most a third of the uplink bytes of 32-bit values",
            at_least(3.0),
            measure=uplink_ratio,
        ),
    ),
    plots=(
        Plot(
            "Accuracy over what an entry spends",
            "mean_model_accuracy",
            "Renyi divergence of order 2 of one entry and message, sums of 40",
            {
                "RQM": (
                    (0.2075, "rqm 0.21"),
                    (0.4859, "rqm"),
                    (1.0747, "rqm 1.07"),
                    (1.6718, "rqm 1.67"),
                ),
                "PBM": (
                    (0.2075, "pbm 0.21"),
                    (0.4859, "pbm"),
                    (1.0747, "pbm 1.07"),
                    (1.6718, "pbm 1.67"),
                ),
            },
        ),
    ),
    charts=(
        Chart(
            "Divergence of one entry",
            "curves",
            divergence_curves,
            x="order alpha",
            y="Renyi divergence",
        ),
    ),
    deviations=(
        "digits and a linear model of 650 parameters in place of EMNIST and a network; 100 clients "
        "of whom 40, drawn by key, take part in each round, and a hub without data of its own.",
        "gradients are scaled by 32 before clipping; learning rates are the best of 0.25, 0.5, 1, "
        "2, 4 and 8 by the last accuracy on seed 100, which is none of the reproduction's: 8 for "
        "all arms but `none`, which has 4.",
        "PBM's theta is the one with RQM's divergence of order 2 for sums of 40 (0.2443; the "
        "variance-matched 0.25 is in the figures of the laws); the Gaussian arm has as much.",
        "figures are for one entry of one message. All 650 entries in all 150 rounds, sums of 40 "
        "and delta = 1e-5 come to epsilon 24,000: these runs compare mechanisms, they protect "
        "nobody.",
        "the sum modulo 2^10 is modelled by its bytes (10 bits an entry) and by decoding: the hub "
        "averages decoded vectors, which equals decoding the sum; masks and the recovery of "
        "clients that drop out are no part of a run (`shoal.parts.privacy.modular_sum` has the "
        "algebra of masks).",
    ),
    small=Budget(seeds=1, scenario={"rounds": 20}),
    full=Budget(seeds=3),
)
