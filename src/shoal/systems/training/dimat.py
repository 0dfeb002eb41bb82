"""DIMAT: peers train by themselves and merge with their neighbours unit by unit.

Networks that began apart learn the same features in another order, so that their plain average is
none of them. Every round each peer trains for some epochs, hears its neighbours' models, puts the
hidden units of each into the order in which they are most like its own (by what they say to some
samples, or by their weights alone), and takes the weighted mean. In round 0 it trains for
`pretrain` epochs, so that the features are there before they are matched.

Saadati et al. 2024 (CVPR, arXiv 2404.08079).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most, difference
from shoal.lab.rows import Rows
from shoal.parts.alignment.matching import activation_orders, weight_orders
from shoal.parts.alignment.units import Units
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed, tree
from shoal.tensor.flat import FlatSpec
from shoal.tensor.stack import combine
from shoal.tensor.types import Key, Mask, Stack, Vector

_BARRIER_POINTS = 9


@dataclass(frozen=True)
class State:
    """params [..., dim]. The rest are measurements [...], 0 unless `watch`: test accuracy before
    the last merge; how much worse than the mean of both ends the worst model between a peer and its
    first neighbour is, with units in order and as they came; the mean correlation of what was
    matched."""

    params: Vector
    trained: Tensor
    barrier: Tensor
    plain_barrier: Tensor
    matched: Tensor


@dataclass(frozen=True)
class MatchedMerging:
    """`epochs` of local training (or `steps`), then a mean of models whose units are in order.

    match: "activation" by what units say to `probes` samples, "weight" by the weights, "none" for
    the plain mean. probe: samples are one's "own", or "noise", which all draw alike. optimizer:
    "sgd" with `momentum`, or "adamw"; it starts anew after each merge, since its memory is about
    units in another order. watch: report accuracy before the merge, loss barriers and match scores,
    which costs evaluations on the test set. Needs a task whose module is an `nn.Sequential`.
    Breaks where the samples excite only some of the units, as those of two classes do.

    >>> MatchedMerging(epochs=2).match
    'activation'
    """

    lr: float = 0.05
    epochs: int = 1
    steps: int | None = None
    pretrain: int = 0
    batch_size: int = 16
    optimizer: str = "sgd"
    momentum: float = 0.0
    match: str = "activation"
    probes: int = 256
    probe: str = "own"
    watch: bool = False

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"batch_size": 8, "probes": 32}, {"steps": 2, "batch_size": 4, "match": "weight"},
        {"steps": 2, "batch_size": 4, "match": "none", "momentum": 0.9},
        {"steps": 2, "batch_size": 4, "probe": "noise", "optimizer": "adamw", "watch": True},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, known in (
            ("match", ("activation", "weight", "none")), ("probe", ("own", "noise")),
            ("optimizer", ("sgd", "adamw")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UsageError(
                    f"MatchedMerging: {name}={getattr(self, name)!r}; need {' or '.join(known)}"
                )
        if min(self.epochs, self.batch_size, self.probes, self.pretrain + 1) < 1:
            raise UsageError(
                f"MatchedMerging: epochs={self.epochs}, batch_size={self.batch_size}, "
                f"probes={self.probes}, pretrain={self.pretrain}; need at least 1 (pretrain: 0)"
            )

    def init(self, params: Vector) -> State:
        none = params.new_zeros(params.shape[:-1], dtype=torch.float64)
        return State(params, none, none, none, none)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer: Any = AdamW(self.lr)
        if self.optimizer == "sgd":
            optimizer = SGD(self.lr, momentum=self.momentum)
        first = self.pretrain and step.round == 0
        epochs = self.pretrain if first else None if self.steps else self.epochs
        params, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=None if epochs else self.steps, epochs=epochs, batch_size=self.batch_size,
        )  # fmt: skip
        trained = state.trained
        if self.watch:
            trained = step.task.evaluate(params)["accuracy"].to(torch.float64)
        return replace(state, params=params, trained=trained), Parcel(params)

    def combine(
        self, state: State, rows: Stack, mask: Mask, share: Tensor, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        rows = torch.where(mask.unsqueeze(-1), rows, rows[..., :1, :])
        if self.match == "none" and not self.watch:
            return Heard(combine(share, rows), mask.sum(-1))
        lead = rows.shape[:-2]
        flat = rows.reshape(-1, *rows.shape[-2:])
        shard = tree.map_tree(lambda leaf: leaf.reshape(len(flat), *leaf.shape[len(lead) :]),
                              step.shard)  # fmt: skip
        keys = step.key.reshape(-1)
        units = units_of(step.task)
        aligned, notes = flat.clone(), []
        # An assignment problem for each pair and layer: there is no batched call for those.
        for place, own in enumerate(flat):
            inputs = self._inputs(step.task, tree.select(shard, place), keys[place], step.round)
            ordered, matched = self._ordered(units, own[0], own[1:], inputs)
            aligned[place, 1:] = ordered
            notes.append([matched, *self._barriers(step.task, own, ordered)])
        found = torch.tensor(notes, dtype=torch.float64, device=rows.device)
        names = ("matched", "barrier", "plain_barrier")
        numbers = {n: found[:, i].reshape(lead) for i, n in enumerate(names)}
        return Heard(combine(share, aligned.reshape(rows.shape)), mask.sum(-1), numbers)

    def _inputs(self, task: Any, shard: Shard, key: Key, round: int) -> Tensor:
        """Samples [probes, *features] to compare units on."""
        if self.probe == "own":
            return task.batch(shard, keyed.fold(key, "probe"), self.probes).x
        common = keyed.key_of(round, "probe", device=key.device)
        like = task.x[:1]
        grid = keyed.grid(common, self.probes * like.numel())
        return keyed.normal(grid, dtype=like.dtype).reshape(self.probes, *like.shape[1:])

    def _ordered(
        self, units: Units, own: Vector, others: Stack, inputs: Tensor
    ) -> tuple[Stack, float]:
        if self.match == "none" or not len(others):
            return others, 0.0
        if self.match == "weight":
            orders, matched = [weight_orders(units, own, other) for other in others], None
        else:
            orders, matched = activation_orders(units, own, others, inputs)
        pairs = zip(others, orders, strict=True)
        moved = torch.stack([units.permuted(other, order) for other, order in pairs])
        return moved, 0.0 if matched is None else float(matched.mean())

    def _barriers(self, task: Task, own: Stack, ordered: Stack) -> tuple[float, float]:
        if not self.watch or not len(ordered):
            return 0.0, 0.0
        return barrier(task, own[0], ordered[0]), barrier(task, own[0], own[1])

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return replace(state, params=heard.vector, **heard.extra)

    def params(self, state: State) -> Vector:
        return state.params

    def report(self, state: State, spec: FlatSpec) -> dict[str, Tensor]:
        if not self.watch:
            return {}
        names = ("trained", "barrier", "plain_barrier", "matched")
        return {name: getattr(state, name) for name in names}


def barrier(task: Task, one: Vector, other: Vector) -> float:
    """How far the test loss between two models rises above the line between theirs, at most."""
    t = torch.linspace(0.0, 1.0, _BARRIER_POINTS, device=one.device, dtype=one.dtype)
    loss = task.evaluate(torch.lerp(one, other, t.unsqueeze(-1)))["loss"].to(torch.float64)
    line = torch.lerp(loss[0], loss[-1], t.to(torch.float64))
    return float((loss - line).max().clamp(min=0.0))


_units: dict[Any, Units] = {}


def units_of(task: Any) -> Units:
    """The hidden units of a task's network; UsageError for a task without a module to trace."""
    if not hasattr(task, "module"):
        raise UsageError(f"dimat: {type(task).__name__} has no module whose units could be matched")
    if task not in _units:
        _units.clear()
        _units[task] = Units.of(task.module, task.spec, task.x.shape[1:])
    return _units[task]


def over_single(rows: Rows) -> dict[int, float]:
    """Mean accuracy right after the first merge minus that of the peers right before it."""
    return {
        s: rows.value("complete dimat", s, "accuracy", "first")
        - rows.value("complete dimat", s, "trained", "first")
        for s in rows.seeds
    }


def _early(rows: Rows, arm: str, seed: int) -> float:
    """Mean accuracy after training in the three cycles behind the first merge."""
    return fmean([row.value for row in rows.series(arm, seed, "trained")[1:4]] or [float("nan")])


def early(rows: Rows) -> dict[int, float]:
    """The smaller lead of DIMAT over plain means after training, equal and unequal shares."""
    pairs = (("complete dimat", "complete wa"), ("skewed dimat", "skewed wa"))
    return {s: min(_early(rows, a, s) - _early(rows, b, s) for a, b in pairs) for s in rows.seeds}


def barriers(rows: Rows) -> dict[int, float]:
    """Loss barrier with units in order over that without, at the first merge."""
    return {
        s: rows.value("complete dimat", s, "barrier", "first")
        / rows.value("complete dimat", s, "plain_barrier", "first")
        for s in rows.seeds
    }


def bytes_to_90(rows: Rows) -> dict[int, float]:
    """Bytes until the peers have 90%, DIMAT over plain means."""
    return _bytes_to(rows, 0.9)


def bytes_to_85(rows: Rows) -> dict[int, float]:
    """Bytes until the peers have 85%, DIMAT over plain means."""
    return _bytes_to(rows, 0.85)


def _bytes_to(rows: Rows, accuracy: float) -> dict[int, float]:
    return {
        s: rows.reach("complete dimat", s, "accuracy", accuracy, axis="bytes")
        / rows.reach("complete wa", s, "accuracy", accuracy, axis="bytes")
        for s in rows.seeds
    }


def bytes_per_batch(rows: Rows) -> dict[int, float]:
    """Bytes until the peers have 90%, mixing after each batch over DIMAT."""
    return {
        s: rows.reach("complete cdsgd", s, "accuracy", 0.9, axis="bytes")
        / rows.reach("complete dimat", s, "accuracy", 0.9, axis="bytes")
        for s in rows.seeds
    }


def bytes_of_others(rows: Rows) -> dict[int, float]:
    """Bytes until the peers have 90%, the cheaper of push-sum and cross gradients over DIMAT."""
    return {
        s: min(
            rows.reach(arm, s, "accuracy", 0.9, axis="bytes")
            for arm in ("complete sgp", "complete cga")
        )
        / rows.reach("complete dimat", s, "accuracy", 0.9, axis="bytes")
        for s in rows.seeds
    }


def two_classes(rows: Rows) -> dict[int, float]:
    """Two classes for each peer: the best of three ways to match, over plain means, at the end."""
    ways = ("classes own", "classes noise", "classes weight")
    return {
        s: max(rows.value(arm, s, "accuracy") for arm in ways)
        - rows.value("classes wa", s, "accuracy")
        for s in rows.seeds
    }


PRETRAINED: Mapping[str, Any] = {"pretrain": 20, "watch": True}
RING: Mapping[str, Any] = {"topology": {"name": "ring"}}
SKEWED: Mapping[str, Any] = {"task.split": "dirichlet", "task.alpha": 0.5}
CLASSES: Mapping[str, Any] = {"task.split": "classes", "task.classes_per_peer": 2}


PER_BATCH: Mapping[str, Any] = {"lr": 0.05, "batch_size": 16}
FROM_ONE: Mapping[str, Any] = {"rounds": 180, "initial": "common"}


def _arm(match: str, world: Mapping[str, Any] | None = None, **settings: Any) -> Arm:
    return Arm(set={**PRETRAINED, "match": match, **settings}, scenario=world or {})


SYSTEM = System(
    name="dimat",
    kind="strategy",
    title="Train apart, then merge models whose hidden units are put in order",
    make=MatchedMerging,
    source=Source(
        "Saadati et al. 2024",
        "DIMAT: Decentralized Iterative Merging-And-Training for Deep Learning Models",
        arxiv="2404.08079",
        venue="CVPR",
    ),
    scenario="training.digits_five",
    uses={"exchange": {"name": "gossip"}},
    arms={
        "complete dimat": _arm("activation"),
        "complete wa": _arm("none"),
        "complete cdsgd": Arm(
            set={"pretrain": 20, "match": "none", "steps": 1}, scenario={"rounds": 180}
        ),
        "complete sgp": Arm(system="sgp", set=PER_BATCH, scenario=FROM_ONE),
        "complete cga": Arm(
            system="cga",
            set={**PER_BATCH, "momentum": 0.0},
            scenario={**FROM_ONE, "exchange": None},
        ),
        "ring dimat": _arm("activation", RING),
        "ring wa": _arm("none", RING),
        "skewed dimat": _arm("activation", SKEWED),
        "skewed wa": _arm("none", SKEWED),
        "classes own": _arm("activation", CLASSES),
        "classes noise": _arm("activation", CLASSES, probe="noise"),
        "classes weight": _arm("weight", CLASSES),
        "classes wa": _arm("none", CLASSES),
    },
    claims=(
        Claim(
            "first-merge-complete",
            "right after the first merge of all with all it is 30 points above plain means",
            at_least(0.3),
            "accuracy",
            difference("complete dimat", "complete wa"),
            take="first",
        ),
        Claim(
            "first-merge-ring",
            "on a ring it is 10 points above plain means",
            at_least(0.1),
            "accuracy",
            difference("ring dimat", "ring wa"),
            take="first",
        ),
        Claim(
            "no-worse-than-apart",
            "the merged models are at most 10 points below what the peers had before",
            at_least(-0.10),
            measure=over_single,
        ),
        Claim(
            "early",
            "after training in the first three cycles it leads plain means by 3 points, with equal "
            "and with unequal shares",
            at_least(0.03),
            measure=early,
            scale="full",
        ),
        Claim(
            "final",
            "after ten cycles it is at most 2 points below plain means",
            at_least(-0.02),
            "accuracy",
            difference("complete dimat", "complete wa"),
            scale="full",
        ),
        Claim(
            "barrier",
            "the loss barrier to a neighbour is at most half of that without matching",
            at_most(0.5),
            measure=barriers,
        ),
        Claim(
            "bytes",
            "90% takes at most 0.7 times the bytes of plain means",
            at_most(0.7),
            measure=bytes_to_90,
            scale="full",
            expected="fails",
            reason="0.88 over three seeds of 0.13, 0.88 and 1.13: on this split 90% is what both "
            "reach after six to nine of ten cycles, so that the cycle in which they cross it is "
            "chance; see bytes-85",
        ),
        Claim(
            "bytes-85",
            "so does 85%, which is below what both level off at",
            at_most(0.7),
            measure=bytes_to_85,
        ),
        Claim(
            "bytes-per-batch",
            "mixing after each batch takes at least three times DIMAT's bytes to 90%",
            at_least(3.0),
            measure=bytes_per_batch,
            scale="full",
        ),
        Claim(
            "bytes-others",
            "so do stochastic gradient push and cross-gradient aggregation, from a common start",
            at_least(3.0),
            measure=bytes_of_others,
            scale="full",
        ),
        Claim(
            "two-classes",
            "with two classes for each peer the best way to match is at most 2 points below plain "
            "means",
            at_least(-0.02),
            measure=two_classes,
            scale="full",
            expected="fails",
            reason="the paper's claim for unequal data is not reproduced: -0.25 (-0.11 to -0.35) "
            "after ten cycles. Units for classes that a peer has never seen are matched by noise, "
            "whichever way is taken, while plain means recover within three cycles",
        ),
    ),
    deviations=(
        "an MLP 64-256-256-10 on 5 peers with shares of the 8x8 digits, pre-trained for 20 epochs "
        "in round 0, in place of convolutional networks on CIFAR: matching needs width",
        "momentum starts anew after each merge",
        "SGP and CGA exchange after each batch from the first one on, from a common start without "
        "pre-training (they are not for models that began apart), at DIMAT's rate and batch, on "
        "equal shares alone",
    ),
    small=Budget(
        seeds=1,
        scenario={"rounds": 4},
        arms=("complete dimat", "complete wa", "ring dimat", "ring wa"),
    ),
    full=Budget(seeds=3),
)
