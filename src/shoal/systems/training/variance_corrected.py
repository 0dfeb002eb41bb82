"""Gossip learning whose averages keep the variance of the weights.

Every round each peer takes local steps, hears some others' models, and replaces its own by
`self weight` times its own plus the rest of their mean, each tensor rescaled to the variance that
the models had (`target`). Peers begin with random weights of their own, as strangers do: the plain
mean of such models has so little variance that a deep network passes no signal and learns nothing.
The rule alone is an aggregator for any strategy (`--set aggregator=variance_corrected`), and works
without rounds as well.

Vanishing Variance Problem in Fully Decentralized Neural-Network Systems 2024 (arXiv 2404.04616).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.lab.card import (
    Arm,
    Budget,
    Claim,
    Source,
    System,
    at_least,
    at_most,
    between,
    difference,
    value,
)
from shoal.lab.rows import Rows
from shoal.parts.aggregate.mean import Mean
from shoal.parts.aggregate.variance_corrected import Mix, VarianceCorrected, variance
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.flat import FlatSpec
from shoal.tensor.stack import combine
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]; begin: where this peer began."""

    params: Vector
    begin: Vector


@dataclass(frozen=True)
class GossipLearning:
    """`steps` of SGD, then the mean of the models in hand with corrected variances.

    target: as of `VarianceCorrected`, or "none" for the plain mean. What the own model counts
    is up to the exchange (`exchange.own_weight`). Reports `variance_ratio`, the mean over weight
    matrices of a peer's variance now over that at its start.
    """

    lr: float = 0.1
    steps: int = 2
    batch_size: int = 16
    target: str = "conservative"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"batch_size": 4}, {"steps": 1, "batch_size": 4, "target": "none"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise UsageError(
                f"GossipLearning: steps={self.steps}, batch_size={self.batch_size}; need 0 steps "
                "or more and at least one sample"
            )
        if self.target != "none":
            VarianceCorrected(self.target)  # type: ignore[arg-type]

    def init(self, params: Vector) -> State:
        return State(params, params)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr)
        params, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=self.steps, batch_size=self.batch_size,
        )  # fmt: skip
        return replace(state, params=params), Parcel(params)

    def combine(
        self, state: State, rows: Stack, mask: Mask, share: Tensor, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        if self.target == "none":
            sound = torch.where(mask.unsqueeze(-1), rows, 0.0)
            return Heard(combine(share, sound), mask.sum(-1))
        rule = VarianceCorrected(self.target).bind(step.task.spec)  # type: ignore[arg-type]
        merged = rule(rows, mask=mask, weight=share, center=rows[..., 0, :])
        return Heard(merged, mask.sum(-1))

    def mixer(self, spec: FlatSpec) -> Mix | None:
        """What `combine` does, without a stack for each receiver."""
        if self.target == "none":
            return Mean().mix
        return VarianceCorrected(self.target).bind(spec).mix  # type: ignore[arg-type]

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector, state.begin)

    def params(self, state: State) -> Vector:
        return state.params

    def report(self, state: State, spec: FlatSpec) -> dict[str, Tensor]:
        ratio = spread(state.params, spec) / spread(state.begin, spec)
        return {"variance_ratio": ratio.mean(-1)}


def spread(params: Vector, spec: FlatSpec) -> Tensor:
    """The variance of each weight matrix, [..., matrices]; biases begin without any."""
    views = spec.views(params)
    matrices = [views[name].flatten(-len(shape)) for name, shape in _matrices(spec)]
    return torch.stack([variance(matrix) for matrix in matrices], -1)


def _matrices(spec: FlatSpec) -> list[tuple[str, tuple[int, ...]]]:
    pairs = zip(spec.names, spec.shapes, strict=True)
    return [(name, shape) for name, shape in pairs if len(shape) > 1]


def rounds_to_80(rows: Rows) -> dict[int, float]:
    """Rounds to 80% accuracy, corrected gossip over FedAvg."""
    return {
        s: (rows.reach("corrected", s, "accuracy", 0.8) + 1)
        / (rows.reach("fedavg", s, "accuracy", 0.8) + 1)
        for s in rows.seeds
    }


def _after(rows: Rows, seed: int, arm: str, merges: int) -> float:
    found = rows.series(arm, seed, "variance_ratio")
    return found[merges - 1].value if len(found) >= merges else float("nan")


def once(rows: Rows) -> dict[int, float]:
    """Variance after the first plain merge; 0.25 + 0.25/6 = 0.292 for independent models."""
    return {s: _after(rows, s, "plain", 1) for s in rows.seeds}


def thrice(rows: Rows) -> dict[int, float]:
    """Variance after two and three plain merges, each over what the specification allows."""
    return {
        s: max(_after(rows, s, "plain", 2) / 0.15, _after(rows, s, "plain", 3) / 0.1)
        for s in rows.seeds
    }


def kept(rows: Rows) -> dict[int, float]:
    """The farthest that corrected variance gets from that at the start, in the first ten rounds."""
    out = {}
    for s in rows.seeds:
        early = [row.value for row in rows.series("corrected", s, "variance_ratio")[:10]]
        out[s] = max(early, key=lambda ratio: abs(ratio - 1.0), default=float("nan"))
    return out


OWN: Mapping[str, Any] = {"initial": "independent"}
SKEWED: Mapping[str, Any] = {"task.split": "dirichlet", "task.alpha": 0.5, **OWN}
REGULAR: Mapping[str, Any] = {"topology": {"name": "random_regular", "degree": 6}, **OWN}


def _gossip(target: str, world: Mapping[str, Any] = OWN) -> Arm:
    return Arm(set={"target": target}, scenario=world)


SYSTEM = System(
    name="variance-corrected",
    kind="strategy",
    title="Gossip learning whose averages keep the variance of the weights",
    make=GossipLearning,
    source=Source(
        "Tian et al. 2024",
        "Vanishing Variance Problem in Fully Decentralized Neural-Network Systems",
        arxiv="2404.04616",
    ),
    scenario="training.digits_strangers",
    uses={"exchange": {"name": "gossip", "own_weight": 0.5}},
    arms={
        "fedavg": Arm(system="fedavg", set={"steps": 2, "batch_size": 16}),
        "corrected": _gossip("conservative"),
        "corrected to self": _gossip("self"),
        "corrected to others": _gossip("others"),
        "plain": _gossip("none"),
        "plain, common start": Arm(set={"target": "none"}),
        "local only": Arm(system="local-only", set={"steps": 2, "batch_size": 16}, scenario=OWN),
        "skewed fedavg": Arm(
            system="fedavg",
            set={"steps": 2, "batch_size": 16},
            scenario={"task.split": "dirichlet", "task.alpha": 0.5},
        ),
        "skewed corrected": _gossip("conservative", SKEWED),
        "skewed plain": _gossip("none", SKEWED),
        "regular corrected": _gossip("conservative", REGULAR),
        "regular plain": _gossip("none", REGULAR),
    },
    claims=(
        Claim(
            "near-fedavg",
            "corrected gossip of strangers ends at most 5 points below FedAvg with a common start",
            at_least(-0.05),
            "accuracy",
            difference("corrected", "fedavg"),
            scale="full",
        ),
        Claim(
            "as-fast",
            "it takes at most twice FedAvg's rounds to 80%",
            at_most(2.0),
            measure=rounds_to_80,
        ),
        Claim(
            "plain-fails",
            "plain averages of strangers learn nothing: 30% at most",
            at_most(0.30),
            "accuracy",
            value("plain"),
        ),
        Claim(
            "over-local",
            "corrected gossip is at least 10 points better than learning alone",
            at_least(0.10),
            "accuracy",
            difference("corrected", "local only"),
        ),
        Claim(
            "skewed",
            "with unequal label mixes it is at least 30 points above plain averages",
            at_least(0.30),
            "accuracy",
            difference("skewed corrected", "skewed plain"),
            scale="full",
        ),
        Claim(
            "fixed-graph",
            "on a fixed 6-regular graph it is at least 30 points above plain averages",
            at_least(0.30),
            "accuracy",
            difference("regular corrected", "regular plain"),
            scale="full",
        ),
        Claim(
            "first-merge",
            "a plain merge of seven strangers leaves 0.29 of the variance, as theory says",
            between(0.27, 0.32),
            measure=once,
        ),
        Claim(
            "vanishing",
            "two plain merges leave at most 0.15 of the variance, three at most 0.1 (1 = there)",
            at_most(1.0),
            measure=thrice,
        ),
        Claim(
            "variance-kept",
            "corrected variance stays within 0.7 and 2 of that at the start for ten rounds",
            between(0.7, 2.0),
            measure=kept,
        ),
    ),
    deviations=(
        "rounds in which every peer hears 6 drawn at random, in place of buffers and clocks of its "
        "own; without rounds the rule runs as an aggregator",
        "rounds to 80% count from 1, and a round is one of FedAvg's too: two steps and an average",
    ),
    small=Budget(seeds=1),
    full=Budget(seeds=3),
)
