"""Stochastic gradient push: SGD with push-sum averages, for graphs with one-way links.

A peer need only know how many hear it. It divides its mass (a model that may be scaled) and its
weight equally among them and itself; masses and weights that come in add up, and their quotient is
the model that gradients are taken at. With the one-peer exponential graph each peer sends one
message a round, and all have everybody's model within log2(peers) rounds.

Assran et al. 2019 (arXiv 1811.10792).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most, difference, ratio
from shoal.lab.rows import Rows
from shoal.parts.strategy.push_sum import PushSum


def weight_off(rows: Rows) -> dict[int, float]:
    """By which part the weights of all peers together are off their number, at the worst moment."""
    found = {}
    for seed in rows.seeds:
        run = rows.run("hubs push", seed)
        if run is None:
            found[seed] = math.nan
            continue
        by_round: dict[int, list[float]] = {}
        for row in run.series("weight"):
            by_round.setdefault(row.round, []).append(row.value)
        off = [abs(math.fsum(values) / run.peers - 1.0) for values in by_round.values()]
        found[seed] = max(off, default=math.nan)
    return found


def bytes_to_90(rows: Rows) -> dict[int, float]:
    """Bytes until the peers have 90%, one receiver a round over all with all."""
    return {
        s: rows.reach("one peer", s, "accuracy", 0.9, axis="bytes")
        / rows.reach("all", s, "accuracy", 0.9, axis="bytes")
        for s in rows.seeds
    }


_ONE_PEER: Mapping[str, Any] = {"topology": {"name": "exponential", "one_peer": True}}
_MOMENTUM: Mapping[str, Any] = {"lr": 0.2, "momentum": 0.9, "keep_momentum": True}
_HUBS: Mapping[str, Any] = {
    "task": {"name": "quadratics", "condition": 1.0}, "rounds": 600,
    "topology": {"name": "barabasi_albert", "attach": 2, "mixing": "uniform"},
}  # fmt: skip
_SMALL_STEPS: Mapping[str, Any] = {"lr": 0.01}

SYSTEM = System(
    name="sgp",
    kind="strategy",
    title="SGD with push-sum averages on one-way graphs",
    make=PushSum,
    source=Source(
        "Assran et al. 2019",
        "Stochastic Gradient Push for Distributed Deep Learning",
        arxiv="1811.10792",
        venue="ICML",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "gossip"}},
    arms={
        "one peer": Arm(set={**_MOMENTUM, "nesterov": True}, scenario=_ONE_PEER),
        "all": Arm(system="dpsgd", set=_MOMENTUM, scenario={"topology": {"name": "full"}}),
        "alone": Arm(system="local-only", set={"lr": 0.1, "momentum": 0.9}),
        "hubs push": Arm(set=_SMALL_STEPS, scenario=_HUBS),
        "hubs mean": Arm(system="dpsgd", set=_SMALL_STEPS, scenario=_HUBS),
    },
    claims=(
        Claim(
            "weight", "without losses the weights of all peers sum to their number all the time",
            at_most(1e-9), measure=weight_off, at="section 2",
        ),
        Claim(
            "unbiased",
            "where some are heard by many it ends at most a tenth as far (squared) from the common "
            "minimum as means of what one hears",
            at_most(0.1), metric="distance", compare=ratio("hubs push", "hubs mean"),
            at="section 3",
        ),
        Claim(
            "as-good-as-all",
            "with one receiver a round it is at most 2 points below means of all with all",
            at_least(-0.02), metric="accuracy", compare=difference("one peer", "all"),
            at="section 5", scale="full",
        ),
        Claim(
            "cooperation", "and 10 points above learning alone",
            at_least(0.1), metric="accuracy", compare=difference("one peer", "alone"),
            scale="full",
        ),
        Claim(
            "bytes", "90% takes at most a tenth of the bytes of all with all",
            at_most(0.1), measure=bytes_to_90, scale="full", at="section 5",
        ),
    ),
    deviations=(
        "8x8 digits with unequal label mixes and an MLP on 32 peers, and quadratics for the bias "
        "of plain means, in place of ImageNet on up to 32 nodes",
        "rates on digits are the best of 0.02, 0.05, 0.1 and 0.2 for each arm with another seed "
        "(0.2; alone 0.1); Polyak's momentum for means of all with all, Nesterov's for push-sum",
        "the rate is 0.01 on quadratics: a constant rate leaves peers apart "
        "by a distance in proportion to it, which is no bias of the mean",
        "messages carry whole masses, of which receivers take the sender's share: the same bytes",
        "without overlap: no message is used later than in its round",
    ),
    small=Budget(seeds=2, arms=("hubs push", "hubs mean")),
    full=Budget(seeds=5, scenario={"rounds": 100, "task.standardise": True}),
)  # fmt: skip
