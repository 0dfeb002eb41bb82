"""A SybilWall node as a strategy: what it keeps of others, what it passes on, whom it believes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.aggregate.fools_gold import scores_of
from shoal.parts.aggregate.krum import scores as krum_scores
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.systems.robust._sybilwall_gossip import Table, drawn, heard_of, rows_at
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.tensor.stack import certain, combine, nearest, shares, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight

HISTORIES = ("relative", "update", "sum", "latest")
LAYERS = ("all", "output")
MIXES = ("mean", "median", "krum")
WIDE = ("history", "seal", "edge", "before")
"""What messages hold more than a number of."""


@dataclass(frozen=True)
class State:
    """params [..., dim]; before [..., dim]: the model that this round's training began with; trust
    [...]: the mean score of the neighbours that were heard last. For each peer of the run: history
    [..., peers, width], round it is of, distance from where it was seen first hand (1 = a
    neighbour's own, 0 = nothing is known), via: who told, score (0 where nothing is known), all
    [..., peers]; seal: what proves it, uint8 [..., peers, bytes], or None."""

    params: Vector
    before: Vector
    history: Stack
    round: Tensor
    distance: Tensor
    via: Tensor
    score: Tensor
    trust: Tensor
    seal: Tensor | None = None


@dataclass(frozen=True)
class HistoryFilter:
    """FoolsGold at every peer: neighbours whose histories point the same way share one vote.

    After `epochs` passes over its data each peer sends its model m_j, and adds to the history of
    each neighbour that it hears. history: what is added. "relative" m_j - w_i with the receiver's
    own model w_i before training; "update" m_j - w_j, with w_j as the sender claims it (which costs
    another vector per message, and a Sybil may lie); "sum" m_j; "latest" keeps the last m_j alone.
    layer: of all parameters, or of the output layer's. A neighbour counts its score, the own model
    1: w_i <- (m_i + sum S_j m_j) / (1 + sum S_j). mix: that weighted mean; "median", the weighted
    median of each coordinate; "krum", the mean after the `byzantine` neighbours with the largest
    Krum scores have gone.

    kappa: how steep scores are; keep_rounds: what others told is of use for so many rounds, None =
    for ever. With a hub the hub keeps the histories and has no model of its own to add. Breaks with
    a single Sybil in reach, which is like nobody, and with honest peers whose data are alike.
    peers, width: set by `fitted`.
    """

    kappa: float = 1.0
    history: str = "relative"
    layer: str = "all"
    mix: str = "mean"
    byzantine: int = 1
    keep_rounds: int | None = None
    lr: float = 0.5
    epochs: int = 2
    batch_size: int = 10
    peers: int = 0
    width: int = 0

    names_sources = True

    def __post_init__(self) -> None:
        if not 0 < self.kappa < math.inf:
            raise UsageError(f"sybilwall: kappa={self.kappa}; need a positive number (1 is usual)")
        for name, value, known in (
            ("history", self.history, HISTORIES),
            ("layer", self.layer, LAYERS),
            ("mix", self.mix, MIXES),
        ):
            if value not in known:
                raise UsageError(f"sybilwall: {name}={value!r}; need one of {', '.join(known)}")
        if self.byzantine < 0 or (self.keep_rounds is not None and self.keep_rounds < 0):
            raise UsageError(
                f"sybilwall: byzantine={self.byzantine}, keep_rounds={self.keep_rounds}; need "
                "counts of 0 or more"
            )

    def fitted(self, spec: FlatSpec, peers: int) -> HistoryFilter:
        """The same for models of this layout among so many peers."""
        return _fitted(self, spec.dim - first_column(spec, self.layer), peers)

    def init(self, params: Vector) -> State:
        if not self.peers:
            raise UsageError("sybilwall: for how many peers? (call fitted(spec, peers) first)")
        lead = params.shape[:-1]
        nothing = torch.zeros(*lead, self.peers, dtype=torch.int64, device=params.device)
        history = params.new_zeros(*lead, self.peers, self.width)
        score = nothing.to(torch.float64)
        return State(
            params, params, history, nothing - 1, nothing, nothing - 1, score,
            torch.zeros_like(params[..., 0], dtype=torch.float64),
        )  # fmt: skip

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr)
        trained, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            epochs=self.epochs, batch_size=self.batch_size,
        )  # fmt: skip
        extra = {"before": state.params} if self.history == "update" else {}
        return replace(state, params=trained, before=state.params), Parcel(trained, None, extra)

    def combine(
        self, state: State, rows: Stack, mask: Mask, share: Weight, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        rows, here = usable(rows, mask)
        ids = extra["source"]
        here, proven, seal = self._proven(here, ids, extra)
        own, who, heard = ids[..., :1], ids[..., 1:], here[..., 1:]
        table = Table(state.history, state.round, state.distance, state.via, state.seal)
        table = self._seen(table, state, rows, heard, who, own, extra, step, seal)
        if "about" in extra:
            told = {n: v[..., 1:, :] if n in WIDE else v[..., 1:] for n, v in extra.items()}
            table = heard_of(table, told, heard & proven, who, own, step.round)
        score = self.scores(table.history, self._known(table.round, table.distance, step.round))
        theirs = torch.where(heard, score.gather(-1, who.clamp(min=0)), 0.0)
        weight = torch.cat((here[..., :1].to(theirs.dtype), theirs), -1)
        vector = self._mixed(rows, here, weight)
        # A hub that believes nobody keeps its model.
        some = (weight > 0).any(-1, keepdim=True)
        vector = torch.where(some, vector, state.params)
        trust = theirs.sum(-1) / heard.sum(-1).clamp(min=1)
        kept = {n: v for n, v in vars(table).items() if v is not None}
        return Heard(vector, here.sum(-1), {**kept, "score": score, "trust": trust})

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(params=heard.vector, before=state.before, **heard.extra)

    def params(self, state: State) -> Vector:
        return state.params

    def report(self, state: State, spec: FlatSpec) -> dict[str, Tensor]:
        return {"trust": state.trust, "known": (state.distance > 0).sum(-1).to(torch.float64)}

    def scores(self, history: Stack, known: Mask) -> Tensor:
        """What each known peer counts, float64 [..., peers] in [0, 1]; 0 for the others."""
        unit = units(history)
        return scores_of(unit @ unit.mT, known, self.kappa)

    def _proven(
        self, here: Mask, ids: Tensor, extra: Mapping[str, Tensor]
    ) -> tuple[Mask, Mask, Tensor | None]:
        """Whose rows count [..., k + 1], whose word on others does [..., k], and the proofs
        [..., k, bytes] to keep of what neighbours sent themselves. Here all is believed."""
        return here, here[..., 1:], None

    def _known(self, round: Tensor, distance: Tensor, now: int) -> Mask:
        """Whose history is of use: of neighbours ever after, of others while it is not stale."""
        if self.keep_rounds is None:
            return distance > 0
        return (distance == 1) | ((distance > 1) & (now - round <= self.keep_rounds))

    def _seen(
        self, table: Table, state: State, rows: Stack, heard: Mask, who: Tensor, own: Tensor,
        extra: Mapping[str, Tensor], step: Step, seal: Tensor | None,
    ) -> Table:  # fmt: skip
        """What neighbours sent themselves goes into their histories."""
        start = step.task.spec.dim - self.width
        made = rows[..., 1:, start:]
        if self.history == "relative":
            made = made - state.before[..., None, start:]
        elif self.history == "update":
            made = made - extra["before"][..., 1:, start:]
        at = torch.where(heard, who, own)
        if self.history != "latest":
            # What had been hearsay so far does not mix with what is seen from now on.
            firsthand = (table.distance.gather(-1, at) == 1).unsqueeze(-1)
            most = torch.finfo(made.dtype).max
            made = made + torch.where(firsthand, rows_at(table.history, at), 0.0)
            made = made.clamp(-most, most)  # One that overflowed would leave nobody a score.
        now = torch.full_like(who, step.round)
        return table.written(at, heard, made, now, torch.ones_like(who), who, seal)

    def _mixed(self, rows: Stack, here: Mask, weight: Tensor) -> Vector:
        if self.mix == "median":
            return weighted_median(rows, weight)
        if self.mix == "krum":
            far = krum_scores(rows, here, here.sum(-1), self.byzantine)
            keep = (here.sum(-1) - self.byzantine).clamp(min=1)
            kept = nearest(far, keep)
            kept[..., 0] = here[..., 0]
            weight = torch.where(kept, weight, 0.0)
        return combine(shares(here, weight), rows)


@dataclass(frozen=True)
class SybilWall(HistoryFilter):
    """`HistoryFilter` with gossip: histories spread, so that Sybils with one victim each show.

    With its model a peer sends each neighbour one history of a third peer, drawn with probability
    proportional to exp(-lam * (distance - 1)) from all it knows but the neighbour's own and what
    the neighbour told it. Received ones are kept where they are news; what a peer has seen itself
    no hearsay replaces. Scores compare all histories known; only neighbours' models are mixed.
    """

    lam: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lam < math.inf:
            raise UsageError(f"sybilwall: lam={self.lam}; need a positive number (0.8 is usual)")

    def address(self, state: State, to: Tensor, step: Step) -> dict[str, Tensor]:
        """One history for each receiver: about whom (-1 = nothing), of which round, how far off."""
        known = self._known(state.round, state.distance, step.round)
        place = drawn(
            known, state.distance, state.via, to, self.lam, keyed.fold(step.key, "gossip")
        )
        at = place.clamp(min=0)
        told = place >= 0
        history = rows_at(state.history, at)
        return {
            "about": place,
            "history": torch.where(told.unsqueeze(-1), history, 0.0),
            "round": torch.where(told, state.round.gather(-1, at), -1),
            "distance": torch.where(told, state.distance.gather(-1, at) + 1, 0),
        }


def units(history: Stack) -> Stack:
    """Histories [..., peers, width] scaled to length 1, however long they are; zeros stay zeros.

    >>> units(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(history, dim=-1, keepdim=True)
    if not (history.is_cpu and certain(torch.isfinite(length))):
        # Squares overflow from 1e19 on: as if alike vast ones had nothing in common.
        top = history.abs().amax(-1, keepdim=True)
        history = history / torch.where(top > 0, top, 1.0)
        length = torch.linalg.vector_norm(history, dim=-1, keepdim=True)
    return history / torch.where(length > 0, length, 1.0)


@lru_cache(maxsize=64)
def _fitted(rule: HistoryFilter, width: int, peers: int) -> HistoryFilter:
    return replace(rule, width=width, peers=peers)


def first_column(spec: FlatSpec, layer: str) -> int:
    """Where the part of the parameters begins that histories are made of."""
    if layer == "all":
        return 0
    last = spec.names[-1].rpartition(".")[0]
    inside = [name.rpartition(".")[0] == last for name in spec.names]
    return spec.offsets[inside.index(True)]


def weighted_median(rows: Stack, weight: Tensor) -> Vector:
    """The value of each coordinate at which half of the weight lies below: [..., k, dim] -> dim.

    >>> weighted_median(torch.tensor([[0.0], [5.0], [9.0]]), torch.tensor([1.0, 0.4, 0.3]))
    tensor([0.])
    """
    ordered, place = rows.sort(-2)
    below = weight.unsqueeze(-1).expand(rows.shape).gather(-2, place).cumsum(-2)
    middle = (below >= below[..., -1:, :] / 2).to(torch.int64).argmax(-2, keepdim=True)
    return ordered.gather(-2, middle).squeeze(-2)
