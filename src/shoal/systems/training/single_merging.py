"""A single global merging: gossip that is sparse all along, and one mean of all models at the end.

Peers with unequal data take local SGD steps and now and then average with one other peer, drawn at
random (about one in five per round). Each peer's model looks poor, yet the mean of all is nearly as
good as if a server had averaged in every round: little communication keeps the models in one basin,
where averaging works. So the traffic is worth most when it comes last. How much is exchanged when
is the exchange's schedule (`--set exchange.schedule=window`, see the part `scheduled`); the mean of
all models is measured in every round without touching the peers (`mean_model_accuracy`).

From Python `merge` averages the state of real modules, and `mergeability` tells what that gains.

Zhu et al. 2025, sections 3 and 4 (arXiv 2507.06542).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.base.errors import UsageError
from shoal.lab.card import (
    Arm,
    Budget,
    Claim,
    Plot,
    Source,
    System,
    at_least,
    at_most,
    between,
    difference,
    ratio,
    value,
)
from shoal.lab.chart import Chart
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.systems.training import _single_claims as measured


def single_merging(
    lr: float = 0.05, steps: int = 10, batch_size: int = 16, momentum: float = 0.0,
    weight_decay: float = 0.0, lr_decay: float = 1.0, keep_momentum: bool = True,
) -> LocalSteps:  # fmt: skip
    """SGD for `steps` batches, then what the schedule says.

    keep_momentum: each peer's own, whatever was averaged; False starts it at zero in every round.
    """
    return LocalSteps(
        lr, steps, None, batch_size, momentum, weight_decay, lr_decay, keep_momentum=keep_momentum
    )


def merge(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The mean of modules' states (`state_dict()`); what is no real number is the first's.

    weights: of each, scaled to sum to 1 (None = equal). Running statistics of normalisation are
    averaged as well, but are not those of the mean of the parameters: `recalibrate` before use.
    Raises UsageError for no states, wrong weights, and states of different names or shapes.

    >>> merge([{"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}])
    {'a': tensor([2.])}
    """
    shares = [1.0] * len(states) if weights is None else [float(w) for w in weights]
    if not states or len(shares) != len(states) or min(shares) < 0 or sum(shares) <= 0:
        raise UsageError(
            f"merge: {len(states)} states, weights {weights}; need at least one state, and for "
            "each a weight of 0 or more, of which one is above 0"
        )
    first = states[0]
    for place, state in enumerate(states):
        if state.keys() != first.keys():
            odd = sorted(state.keys() ^ first.keys())
            raise UsageError(f"merge: state {place} and state 0 differ in {odd[:3]} (same model?)")
        for name in first:
            if state[name].shape != first[name].shape:
                raise UsageError(
                    f"merge: {name} is {tuple(state[name].shape)} in state {place} and "
                    f"{tuple(first[name].shape)} in state 0 (need one shape)"
                )
    total = sum(shares)
    return {
        name: sum((s[name] * (w / total) for s, w in zip(states, shares, strict=True)), 0 * tensor)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in first.items()
    }


def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Running statistics of batch normalisation anew, as means over these batches, in place.

    The parameters stay; a merged model with old statistics looks broken.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum) for norm in norms]
    training = module.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    try:
        with torch.no_grad():
            for batch in batches:
                module(batch)
    finally:
        module.train(training)
        for norm, momentum in kept:
            norm.momentum = momentum


def mergeability(
    states: Sequence[Mapping[str, Tensor]], evaluate: Callable[[Mapping[str, Tensor]], float]
) -> float:
    """What `evaluate` gives for the merged state, minus its mean over the states.

    >>> states = [{"a": torch.tensor(-1.0)}, {"a": torch.tensor(1.0)}]
    >>> mergeability(states, lambda state: -float(state["a"]) ** 2)
    1.0
    """
    alone = [evaluate(state) for state in states]
    return evaluate(merge(states)) - sum(alone) / len(alone)


def _arm(
    schedule: str, world: Mapping[str, Any] | None = None, steps: int = 10, **more: Any
) -> Arm:
    """A schedule of the exchange; the rest is the same for all arms."""
    exchange = {"name": "scheduled", "schedule": schedule, **more}
    return Arm(set={"steps": steps}, scenario={**(world or {}), "exchange": exchange})


_STRANGERS: Mapping[str, Any] = {"initial": "independent"}
_LONG: Mapping[str, Any] = {"rounds": 200}

SYSTEM = System(
    name="single-merging",
    kind="strategy",
    title="Sparse gossip and a single global mean at the end",
    make=single_merging,
    source=Source(
        "Zhu et al. 2025",
        "On the Surprising Effectiveness of a Single Global Merging in Decentralized Learning",
        arxiv="2507.06542",
    ),
    scenario="training.digits_sparse",
    uses={"topology": None, "exchange": {"name": "scheduled", "schedule": "merge"}},
    arms={
        "single": _arm("merge"),
        "sparse": _arm("fixed"),
        "late": _arm("window", at=0.95),
        "early": _arm("window", at=0.0),
        "middle": _arm("window", at=0.5),
        "even": _arm("fixed", rate=0.95),
        "server": _arm("fixed", rate=15.0),
        "one shot": _arm("merge", rate=0.0),
        "nobody": _arm("fixed", rate=0.0),
        "ring": Arm(
            system="dpsgd", set={"steps": 10, "lr": 0.05, "batch_size": 16},
            scenario={"topology": "ring"},
        ),
        "k 5": _arm("fixed", {"rounds": 120}, 5),
        "k 20": _arm("fixed", {"rounds": 30}, 20),
        "k 50": _arm("fixed", {"rounds": 12}, 50),
        "strangers": _arm("merge", _STRANGERS),
        "strangers one shot": _arm("merge", _STRANGERS, rate=0.0),
        "single long": _arm("merge", _LONG),
        "server long": _arm("fixed", _LONG, rate=15.0),
    },
    claims=(
        Claim(
            "merging", "The merged model is at least 10 points better than the peers' were",
            at_least(0.1), "accuracy", difference("single", "sparse"), at="figure 1",
        ),
        Claim(
            "server", "It is within 12 points of averaging all models in every round",
            at_least(-0.12), "accuracy", difference("single", "server"), at="figure 1",
            scale="full",
        ),
        Claim(
            "messages", "With at most a twentieth of its messages, all to all for each mean",
            at_most(0.05), "messages_sent", ratio("single", "server"), statistic="max",
        ),
        Claim(
            "messages-reduced",
            "And 0.15 of them when a mean takes 2 (n - 1), as by an all-reduce",
            at_most(0.15), measure=measured.reduced_messages, statistic="max",
        ),
        Claim(
            "late-window",
            "A few dense rounds at the end are at least 6 points better than at the beginning",
            at_least(0.06), "accuracy", difference("late", "early"), at="figure 2", scale="full",
        ),
        Claim(
            "equal-windows", "With as many messages, up to which pairs were drawn (5%)",
            between(0.95, 1.05), "messages_sent", ratio("late", "early"),
        ),
        Claim(
            "some-communication",
            "The merged model is at least 10 points better than without any gossip before",
            at_least(0.1), "accuracy", difference("single", "one shot"), at="figure 4",
            scale="full",
        ),
        Claim(
            "always-mergeable",
            "After a fifth of the training the mean of all models is always better than they are",
            at_least(0.0), measure=measured.least_mergeability, statistic="min", at="figure 3",
        ),
        Claim(
            "strangers-alone",
            "Peers that begin at different points and never meet cannot be merged",
            at_most(0.5), "accuracy", value("strangers one shot"), at="section 5",
        ),
        Claim(
            "strangers", "With sparse gossip they can, but not as well as from a common start",
            at_least(0.0), "accuracy", difference("single", "strangers"), scale="full",
        ),
        Claim(
            "longer", "With 2,000 steps in place of 600 the distance to the server does not grow",
            at_most(0.0), measure=measured.gap_growth, scale="full",
        ),
    ),
    plots=(
        Plot(
            "Merged model by local steps per round (600 in all)", "mean_model_accuracy",
            "local steps",
            {"merged": ((5, "k 5"), (10, "sparse"), (20, "k 20"), (50, "k 50"))},
        ),
        Plot(
            "Peers' models by local steps per round (600 in all)", "accuracy", "local steps",
            {"mean over the peers": ((5, "k 5"), (10, "sparse"), (20, "k 20"), (50, "k 50"))},
        ),
    ),
    charts=(
        Chart(
            "Merged and peers' models under sparse gossip", "curves", measured.two_curves,
            x="round", y="accuracy",
        ),
    ),
    deviations=(
        "8x8 digits and an MLP 64-64-10 on 16 peers for 60 rounds of 10 steps instead of CIFAR-100 "
        "with ResNets and vision transformers for 30,000 steps: the merged model comes near to "
        "the server's and does not match it",
        "spread evenly (rate 0.95), as many messages as a window costs give better models than the "
        "late window: 0.915 against 0.886, as 16 peers then mix well all along",
        "the window at the end replaces the merge: its last rounds are means of all",
        "batch normalisation is refused by tasks here; `recalibrate` is for modules from elsewhere",
        "no schedule follows the critical consensus edge: who talks to whom is settled before the "
        "run, so that all engines mean the same by it",
    ),
    small=Budget(seeds=1),
    full=Budget(seeds=3),
)  # fmt: skip
