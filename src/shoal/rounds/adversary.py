"""Byzantine peers of one run and what they know together.

With `Knowledge.OWN` an attacker works from its own vector, on any engine. With `Knowledge.ALL` it
acts once the round's last honest vector exists; that is possible within one process only, where
this object is shared by the programs of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from shoal.base.units import to_ns
from shoal.kernel.runtime import Runtime
from shoal.kernel.waits import Wait
from shoal.rounds.aggregator import Aggregator
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.method import Method
from shoal.tensor import keyed
from shoal.tensor.types import Index, Mask, Stack, Vector

_NUMBERS = 1 << 24
"""Numbers of receivers' stacks gathered at a time, which bounds memory; a constant."""

FALLBACK = 0.1
"""With honest peers missing, an omniscient attack acts this part of a round before its deadline."""


@dataclass(frozen=True)
class Sides:
    """Who is who in one hop of one round: ids in ascending order."""

    honest: tuple[int, ...]
    byzantine: tuple[int, ...]


def craft(
    methods: Sequence[Method], round: int, hop: int, sides: Sequence[Sides], honest: Stack,
    own: Stack,
) -> Stack:  # fmt: skip
    """What the Byzantine peers send: [worlds, byzantine, dim] or [worlds, honest, byzantine, dim].

    One method and its sides for each world, all of one size; honest [worlds, honest, dim]; own
    [worlds, byzantine, dim]. The same for every engine.
    """
    attack = methods[0].attack
    assert attack is not None
    device = own.device
    names = [keyed.key_of(m.seed, "attack", round, hop) for m in methods]
    key = torch.stack(names).to(device, non_blocking=True)
    if attack.knowledge is Knowledge.OWN:
        # Each attacker sees itself alone: one world per attacker.
        own = own.unsqueeze(-2)
        ids = torch.tensor([side.byzantine for side in sides], device="cpu")
        ids = ids.to(device, non_blocking=True)
        return attack(View(own, own, round), keyed.fold(key.unsqueeze(-1), ids)).squeeze(-2)
    heard = torch.stack([in_hand(m, round, hop, s) for m, s in zip(methods, sides, strict=True)])
    order = heard_first(heard) if _asks_each(methods[0], heard) else None
    heard = heard.to(device, non_blocking=True)
    order = None if order is None else order.to(device, non_blocking=True)

    def rule(candidate: Stack) -> Stack:
        return outcome(methods[0], honest, candidate, heard, order)

    return attack(View(honest, own, round, rule, heard), key)


def _works_around(rule: Aggregator) -> bool:
    """Whether a rule serves all receivers at once, each around its own vector."""
    return getattr(rule, "centered", False) and hasattr(rule, "among")


def _asks_each(method: Method, heard: Mask) -> bool:
    """Whether the rule has to be asked for each receiver: nobody hears more than half of all.

    Who hears most of them hears about what the others do, and asking for all at once is cheaper.
    """
    if method.exchange.hub is not None or _works_around(method.aggregator):
        return False
    return 2 * int(heard.sum(-1).max()) <= heard.shape[-1]


def heard_first(heard: Mask) -> Index:
    """Columns that each peer hears, its own first, [..., honest, the most that one hears].

    Those that hear fewer find columns at the end that they do not hear.
    """
    own = torch.eye(*heard.shape[-2:], dtype=torch.int8, device=heard.device)
    order = (heard.to(torch.int8) + own).argsort(dim=-1, descending=True, stable=True)
    return order[..., : int(heard.sum(-1).max())]


def in_hand(method: Method, round: int, hop: int, sides: Sides) -> Mask:
    """Whose vectors each honest peer will use, the own one first of all: bool [honest, n].

    Columns are the honest peers, then the Byzantine ones. Losses are not foreseen. A hub that sends
    nothing itself has no row here: each honest peer stands in for it.
    """
    wave = method.waves(round)[hop]
    columns = {peer: place for place, peer in enumerate((*sides.honest, *sides.byzantine))}
    if method.exchange.hub is not None and method.exchange.hub not in columns:
        return torch.ones(len(sides.honest), len(columns), dtype=torch.bool, device="cpu")
    heard = torch.eye(len(sides.honest), len(columns), dtype=torch.bool, device="cpu")
    pairs = [
        (row, columns[source])
        for row, peer in enumerate(sides.honest)
        for source in wave.expected[peer]
        if source in columns
    ]
    if pairs:
        rows, places = zip(*pairs, strict=True)
        heard[list(rows), list(places)] = True
    return heard


def outcome(
    method: Method, honest: Stack, byzantine: Stack, heard: Mask, order: Index | None = None
) -> Stack:
    """What each honest peer would hold [..., honest, dim] if no message got lost.

    heard: bool [..., honest, honest + byzantine]; order: `heard_first` of it, or None, which asks a
    rule that offers `everyone` as if everybody heard everybody: one evaluation in place of one per
    receiver. A rule that works around the receiver's own vector and offers `among` is asked so.
    """
    count = honest.shape[-2]
    byzantine = byzantine.to(honest.dtype).expand(*honest.shape[:-2], *byzantine.shape[-2:])
    rows = torch.cat((honest, byzantine), -2)
    total = rows.shape[-2]
    rule: Any = method.aggregator
    if _works_around(rule):
        whole = torch.eye(total, dtype=torch.bool, device=rows.device)
        whole = whole.expand(*heard.shape[:-2], total, total).clone()
        whole[..., :count, :] = heard
        return rule.among(rows, whole)[..., :count, :]
    if order is None and hasattr(rule, "everyone"):
        mask = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
        return rule.everyone(rows, mask)[..., :count, :]
    lead = rows.shape[:-2]
    order = heard_first(heard) if order is None else order
    order, heard = order.expand(*lead, *order.shape[-2:]), heard.expand(*lead, count, total)
    at_once = max(1, _NUMBERS // max(1, order.shape[-1] * rows.shape[-1]))
    found = []
    for place, some, own in zip(
        order.split(at_once, -2), heard.split(at_once, -2),
        rows[..., :count, :].split(at_once, -2), strict=True,
    ):  # fmt: skip
        seen = rows.unsqueeze(-3).expand(*lead, place.shape[-2], *rows.shape[-2:])
        seen = seen.take_along_dim(place.unsqueeze(-1), -2)
        found.append(rule(seen, mask=some.take_along_dim(place, -1), center=own))
    return torch.cat(found, -2)


class Adversary:
    """Collects the vectors of a round and wakes the Byzantine peers when all are there."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._byzantine = set(method.byzantine)
        self._rounds: dict[tuple[int, int], _Collected] = {}

    @property
    def omniscient(self) -> bool:
        attack = self._method.attack
        return attack is not None and attack.knowledge is Knowledge.ALL

    def offer(self, round: int, hop: int, peer: int, vector: Vector) -> None:
        """A peer's honest vector of this hop now exists."""
        if self.omniscient:
            collected = self._of(round, hop)
            collected.vectors[peer] = vector
            if collected.vectors.keys() >= collected.awaited:
                for wait in collected.waits:
                    wait.resolve(None)

    async def craft(
        self, peer: Runtime, round: int, hop: int, own: Vector, receivers: Sequence[int]
    ) -> dict[int, Vector]:
        """What this Byzantine peer sends to each receiver."""
        method = self._method
        if not self.omniscient:
            index = method.byzantine.index(peer.id)
            stack = own.expand(len(method.byzantine), own.shape[-1])
            sides = [Sides((), method.byzantine)]
            vector = craft([method], round, hop, sides, stack[None, :0], stack[None])[0, index]
            return dict.fromkeys(receivers, vector)
        self.offer(round, hop, peer.id, own)
        collected = self._of(round, hop)
        hops = len(method.waves(round))
        latest = method.deadline(round, hop, hops) - FALLBACK * method.round_s / hops
        if not collected.vectors.keys() >= collected.awaited:
            wait = Wait(peer.ready)
            collected.waits.append(wait)
            peer.host.set_timer(peer, to_ns(latest), wait)
            await wait
        if collected.result is None:
            collected.result = collected.craft(method, round, hop, self._byzantine)
        return collected.vectors_for(peer.id, receivers, self._method)

    def _of(self, round: int, hop: int) -> _Collected:
        found = self._rounds.get((round, hop))
        if found is None:
            on = self._method.active(round).tolist()
            found = self._rounds[round, hop] = _Collected({p for p, a in enumerate(on) if a})
            for old in [k for k in self._rounds if k[0] < round - 4]:
                del self._rounds[old]
        return found


class _Collected:
    """One hop of one round."""

    def __init__(self, awaited: set[int]) -> None:
        self.awaited = awaited
        self.vectors: dict[int, Vector] = {}
        self.waits: list[Wait] = []
        self.result: Any = None
        self.order: list[int] = []
        self.honest: list[int] = []

    def craft(self, method: Method, round: int, hop: int, byzantine: set[int]) -> Stack:
        self.honest = sorted(p for p in self.vectors if p not in byzantine)
        self.order = sorted(p for p in self.vectors if p in byzantine)
        own = torch.stack([self.vectors[p] for p in self.order])
        if not self.honest:
            return own
        honest = torch.stack([self.vectors[p] for p in self.honest])
        sides = Sides(tuple(self.honest), tuple(self.order))
        return craft([method], round, hop, [sides], honest[None], own[None])[0]

    def vectors_for(self, peer: int, receivers: Sequence[int], method: Method) -> dict[int, Vector]:
        index = self.order.index(peer)
        if self.result.dim() == 2:
            return dict.fromkeys(receivers, cast("Vector", self.result[index]))
        # Equivocation: a row per honest receiver; other attackers get the own row's first.
        places = {p: i for i, p in enumerate(self.honest)}
        result: Stack = self.result
        return {r: result[places.get(r, 0), index] for r in receivers}
