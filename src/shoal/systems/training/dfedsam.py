"""DFedSAM: sharpness-aware local training, then one or several gossip steps.

Every round each peer takes local steps whose gradients are computed at the worst point within a
radius rho (two gradients of one batch per step), sends the result to its neighbours and replaces it
by the mean with the topology's weights W. With Q gossip steps (DFedSAM-MGS, `--set
exchange.steps=4`) the exchange is repeated, so that W^Q mixes; each repetition is a wave of its own
that costs a link's latency and a message per neighbour. From Python `dfedsam(...)` checks the graph
and gives an arm for `shoal.run`.

Shi et al. 2023, algorithm 1 (arXiv 2302.04083).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most, difference, ratio
from shoal.lab.rows import Rows, curve
from shoal.parts.strategy.sharpness_aware import SharpnessAware
from shoal.parts.topology.base import GraphTopology, check_mixing

STEPS: Mapping[str, Any] = {"steps": 20, "batch_size": 16, "lr": 0.1, "lr_decay": 0.995}
NOISE: Mapping[str, Any] = {"task.label_noise": 0.2}
MGS: Mapping[str, Any] = {"exchange": {"name": "gossip", "steps": 4}}
EXPONENTIAL: Mapping[str, Any] = {"topology": {"name": "exponential"}}


def dfedsam(
    topology: GraphTopology, rho: float = 0.1, local_steps: int = 20, gossip_steps: int = 1,
    batch_size: int = 16, lr: float = 0.1, lr_decay: float = 0.995,
) -> Arm:  # fmt: skip
    """DFedSAM (with gossip_steps > 1 DFedSAM-MGS) on a topology, as an arm for `shoal.run`.

    Raises UsageError unless the topology's mixing matrix is symmetric, doubly stochastic and
    connected, as the analysis assumes, and for rho < 0 or gossip_steps < 1.

    >>> from shoal.parts.topology.ring import Ring
    >>> dfedsam(Ring(8), rho=0.05, gossip_steps=4).scenario["exchange"]["steps"]
    4
    """
    if gossip_steps < 1:
        raise UsageError(f"dfedsam: gossip_steps={gossip_steps}; need at least 1 (1 = plain)")
    SharpnessAware(rho, steps=local_steps)
    check_mixing(topology.weights())
    world = {
        "peers": topology.peers, "topology": topology,
        "exchange": {"name": "gossip", "steps": gossip_steps},
    }  # fmt: skip
    local = {"steps": local_steps, "batch_size": batch_size, "lr": lr, "lr_decay": lr_decay}
    return Arm(system="dfedsam", set={"rho": rho, **local}, scenario=world)


def _sam(world: Mapping[str, Any] | None = None, **settings: Any) -> Arm:
    return Arm(set={**STEPS, **settings}, scenario=world or {})


def _plain(
    system: str = "dpsgd", momentum: float = 0.0, steps: int = 20,
    world: Mapping[str, Any] | None = None,
) -> Arm:  # fmt: skip
    """The same local steps without the perturbation."""
    # Momentum 0.9 makes steps ten times as long: the learning rate makes up for it.
    local = {**STEPS, "momentum": momentum, "steps": steps, "lr": STEPS["lr"] * (1 - momentum)}
    return Arm(system=system, set=local, scenario=world or {})


def worst_gap(rows: Rows) -> dict[int, float]:
    """Sharpness of the mean model, SAM over the matching method without it; the worse of both."""
    return {
        s: max(
            rows.value(sam, s, "sharpness") / rows.value(plain, s, "sharpness")
            for sam, plain in (("dfedsam", "dfedavg"), ("dfedsam mgs", "dfedavg mgs"))
        )
        for s in rows.seeds
    }


def consistency_kept(rows: Rows) -> dict[int, float]:
    """Consistency of DFedSAM-MGS after the last round's gossip over that before it."""
    out = {}
    for s in rows.seeds:
        after = rows.value("dfedsam mgs", s, "consensus")
        out[s] = after / (after + rows.value("dfedsam mgs", s, "spread_removed"))
    return out


def per_byte(rows: Rows) -> dict[int, float]:
    """DFedSAM-MGS minus DFedSAM in accuracy when as many bytes are sent: MGS at a quarter of its
    rounds, DFedSAM at all of its own."""
    out = {}
    for s in rows.seeds:
        single = rows.run("dfedsam", s)
        budget = float("nan") if single is None else float(sum(single.bytes_sent))
        out[s] = _at_bytes(rows, "dfedsam mgs", s, budget) - rows.value("dfedsam", s, "accuracy")
    return out


def _at_bytes(rows: Rows, arm: str, seed: int, budget: float) -> float:
    """Mean accuracy at the last evaluation that stays within a budget of bytes."""
    run = rows.run(arm, seed)
    if run is None:
        return float("nan")
    spent = {row.round: row.value for row in curve(run, "bytes_sent")}
    within = [
        row.value
        for row in rows.series(arm, seed, "accuracy")
        if spent.get(row.round, float("inf")) <= budget * (1 + 1e-9)
    ]
    return within[-1] if within else float("nan")


def per_gradient(rows: Rows) -> dict[int, float]:
    """DFedSAM-MGS with half the local steps (as many gradients) minus DFedAvg with MGS."""
    return {
        s: rows.value("dfedsam mgs half", s, "accuracy") - rows.value("dfedavg mgs", s, "accuracy")
        for s in rows.seeds
    }


SYSTEM = System(
    name="dfedsam",
    kind="strategy",
    title="Sharpness-aware local training with one or several gossip steps",
    make=SharpnessAware,
    source=Source(
        "Shi et al. 2023",
        "Improving the Model Consistency of Decentralized Federated Learning",
        arxiv="2302.04083",
        venue="ICML",
    ),
    scenario="training.digits_ring",
    uses={"exchange": {"name": "gossip"}},
    arms={
        "dpsgd": _plain(steps=1),
        "dfedavg": _plain(),
        "dfedavgm": _plain(momentum=0.9),
        "dfedsam": _sam(),
        "dfedavg mgs": _plain(world=MGS),
        "dfedavgm mgs": _plain(momentum=0.9, world=MGS),
        "dfedsam mgs": _sam(world=MGS),
        "dfedsam mgs half": _sam(steps=10, world=MGS),
        "fedavg": _plain(system="fedavg"),
        "fedsam": _sam(by_samples=True, world={"exchange": {"name": "star"}}),
        "noise dfedavg": _plain(steps=10, world=NOISE),
        "noise dfedsam": _sam(steps=10, world=NOISE),
        "noise dfedavg mgs": _plain(steps=10, world=NOISE | MGS),
        "noise dfedsam mgs": _sam(steps=10, world=NOISE | MGS),
        "exponential dfedavg": _plain(world=EXPONENTIAL),
        "exponential dfedsam": _sam(world=EXPONENTIAL),
        "exponential dfedavg mgs": _plain(world=EXPONENTIAL | MGS),
        "exponential dfedsam mgs": _sam(world=EXPONENTIAL | MGS),
    },
    claims=(
        Claim(
            "single-gossip",
            "peers of DFedSAM are at most 0.2 points less accurate than those of DFedAvg (ring)",
            at_least(-0.002),
            "accuracy",
            difference("dfedsam", "dfedavg"),
            at="table 1",
            scale="full",
        ),
        Claim(
            "multiple-gossip",
            "peers of DFedSAM-MGS are at least 2 points more accurate than those of DFedAvg",
            at_least(0.02),
            "accuracy",
            difference("dfedsam mgs", "dfedavg"),
            at="table 1",
            scale="full",
        ),
        Claim(
            "near-centralised",
            "DFedSAM-MGS is within 2 points of FedAvg",
            at_least(-0.02),
            "accuracy",
            difference("dfedsam mgs", "fedavg"),
            at="table 1",
            scale="full",
        ),
        Claim(
            "sam-with-gossip",
            "DFedSAM-MGS is at most 0.2 points less accurate than DFedAvg with as much gossip",
            at_least(-0.002),
            "accuracy",
            difference("dfedsam mgs", "dfedavg mgs"),
            at="table 1",
            scale="full",
        ),
        Claim(
            "consistency",
            "after gossip the peers of DFedSAM-MGS differ at most 0.4 times as much as DFedSAM's",
            at_most(0.4),
            "consensus",
            ratio("dfedsam mgs", "dfedsam"),
            at="section 5.3",
        ),
        Claim(
            "flatness",
            "SAM's mean model is at most 0.97 times as sharp, with one gossip step and with four",
            at_most(0.97),
            measure=worst_gap,
            at="figure 1",
        ),
        Claim(
            "gossip-contracts",
            "four gossip steps never raise the consistency of what was trained",
            at_most(1.0),
            measure=consistency_kept,
            at="lemma on lambda^Q",
        ),
        Claim(
            "noise-mean-model",
            "with 20% wrong labels the mean model of DFedSAM-MGS is at least 0.3 points better "
            "than DFedAvg's with as much gossip",
            at_least(0.003),
            "mean_model_accuracy",
            difference("noise dfedsam mgs", "noise dfedavg mgs"),
            scale="full",
            expected="fails",
            reason="one test image of 359 (0.0028) on each of 3 seeds where two are asked for; "
            "+0.0055 without standardised pixels, 0 with K = 20: four gossip steps already average "
            "most of the label noise away",
        ),
        Claim(
            "noise-mean-model-single",
            "the same with one gossip step",
            at_least(0.003),
            "mean_model_accuracy",
            difference("noise dfedsam", "noise dfedavg"),
            scale="full",
        ),
        Claim(
            "noise-flatness",
            "with 20% wrong labels, too, SAM's mean model is at most 0.97 times as sharp",
            at_most(0.97),
            "sharpness",
            ratio("noise dfedsam mgs", "noise dfedavg mgs"),
            scale="full",
        ),
        Claim(
            "per-byte",
            "with as many bytes sent, DFedSAM-MGS after a quarter of the rounds is still better",
            at_least(0.0),
            measure=per_byte,
            scale="full",
            expected="fails",
            reason="1.3 points below: at 60 rounds all arms still learn, so three quarters of the "
            "rounds are worth more than the gossip that they pay for; multiple gossip buys rounds "
            "with bytes",
        ),
        Claim(
            "per-gradient",
            "with as many gradients (half the steps) DFedSAM-MGS is at most 0.2 points below "
            "DFedAvg with as much gossip",
            at_least(-0.002),
            measure=per_gradient,
            scale="full",
        ),
    ),
    deviations=(
        "with wrong labels K is 10: after 20 steps a peer has learned its own wrong labels, and "
        "SAM and plain SGD have mean models that differ by no test image",
        "8x8 digits and an MLP 64-64-10 on 32 peers for 60 rounds in place of CIFAR with "
        "convolutions on 100 peers for 1000: gains are smaller",
        "rho = 0.1 was chosen from 0.01, 0.05 and 0.1 by the accuracy of the peers on seed 100, "
        "which is none of the seeds of the reproduction",
        "K is 20 batches of 16 drawn with replacement in place of 5 epochs, so that all peers take "
        "equal steps; all arms draw the same batches",
        "momentum 0.9 runs at a tenth of the learning rate, since it makes steps ten times as long",
        "a lost neighbour's weight goes to the own vector: W stays symmetric and doubly stochastic "
        "on the live peers and nobody needs to know who else is down, which Metropolis weights of "
        "the live subgraph would take",
        "the absolute consistency of DFedSAM is above DFedAvg's, as its effective steps are "
        "longer; it is reported and no claim",
    ),
    small=Budget(seeds=1, scenario={"rounds": 20}),
    full=Budget(seeds=3),
)
