"""A whole round-based method and its phases as pure functions with leading axes.

`event` and `live` call the phases per peer (batched or not), `lockstep` on all peers at once, so
that no engine has a second version of the arithmetic:

    work        strategy.local, then encode
    combine     decode what was heard, aggregate
    conclude    combine, then strategy.apply
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.kernel.peer import Cost
from shoal.rounds.aggregator import Aggregator
from shoal.rounds.attack import Attack
from shoal.rounds.exchange import Exchange, Hop
from shoal.rounds.strategy import Heard, Parcel, Step, Strategy
from shoal.rounds.task import Shard, Task
from shoal.rounds.transform import Payload, Transform
from shoal.tensor import keyed, tree
from shoal.tensor.flops import count_flops
from shoal.tensor.types import Key, Mask, Vector


@dataclass(frozen=True)
class Wave:
    """One hop, prepared for engines that go peer by peer. Lists are indexed by peer."""

    hop: Hop
    row: dict[int, int]
    """the hop's row of each receiver"""
    sources: tuple[tuple[int, ...], ...]
    """active sources in slot order; -1 where a slot is empty in this round"""
    expected: tuple[tuple[int, ...], ...]
    """those whose message a peer waits for"""
    targets: tuple[tuple[int, ...], ...]
    """to whom each peer sends, ascending"""
    mixing: Tensor | None
    """[receivers, k + 1], own weight first; None when the hop has no weights"""
    everyone: Mask
    """bool [k + 1], all set: the mask of whoever heard from every slot"""


@dataclass(frozen=True, eq=False)
class Method:
    """Strategy, data and communication of a run. Compared by identity: it is a batching key.

    transform: already bound to `task.spec`. round_s: seconds from one round's deadline to the next.
    report_every: parameters are recorded after every so many rounds, and after the last.
    checkpoint_every: rounds between commits to the peer's store; 0 = never.
    independent: every peer draws initial parameters of its own; a hub's go to its clients.
    worlds: how many seeds' tasks are joined in `task` (lockstep runs seeds together).
    counted: `work_cost`, where it is known already.
    """

    strategy: Strategy
    task: Task
    exchange: Exchange
    aggregator: Aggregator
    transform: Transform
    rounds: int
    round_s: float
    seed: int = 0
    attack: Attack | None = None
    byzantine: tuple[int, ...] = ()
    report_every: int = 1
    checkpoint_every: int = 0
    independent: bool = False
    worlds: int = 1
    counted: Cost | None = None
    _waves: dict[int, tuple[Wave, ...]] = field(default_factory=dict, repr=False)
    _active: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _working: dict[int, list[bool]] = field(default_factory=dict, repr=False)
    _keys: dict[int, tuple[Key, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        peers = self.exchange.peers
        if self.task.peers != peers * self.worlds:
            raise UsageError(
                f"the task has data for {self.task.peers} peers and the exchange joins {peers} "
                "(give both the same number of peers)"
            )
        fitted = getattr(self.strategy, "fitted", None)
        if fitted is not None:
            object.__setattr__(self, "strategy", fitted(self.task.spec, peers))
        if self.rounds < 1 or not self.round_s > 0:
            raise UsageError(
                f"rounds={self.rounds}, round_s={self.round_s}; need at least one round of "
                "positive length"
            )
        if self.exchange.hub is None and getattr(self.strategy, "needs_hub", False):
            raise UsageError(
                f"{type(self.strategy).__name__} needs a hub, and {type(self.exchange).__name__} "
                "has none (set exchange = 'star')"
            )
        if self.pushes and (self.exchange.hub is not None or len(self.waves(0)) != 1):
            raise UsageError(
                f"{type(self.strategy).__name__} pushes shares to equals, once a round; "
                f"{type(self.exchange).__name__} has a hub or several waves (set exchange = "
                "'gossip', with steps = 1)"
            )
        if self.addresses and (self.exchange.hub is not None or len(self.waves(0)) != 1):
            raise UsageError(
                f"{type(self.strategy).__name__} says something else to each neighbour, once a "
                f"round; {type(self.exchange).__name__} has a hub or several waves (set exchange = "
                "'gossip', with steps = 1)"
            )
        if self.byzantine and self.attack is None:
            raise UsageError("byzantine peers without an attack (name one, or set byzantine to 0)")
        if len(self.byzantine) >= peers:
            raise UsageError(
                f"{len(self.byzantine)} of {peers} peers are byzantine; leave one honest"
            )

    @property
    def peers(self) -> int:
        return self.exchange.peers

    @cached_property
    def combines(self) -> bool:
        """Whether the strategy takes the aggregator's place."""
        return hasattr(self.strategy, "combine")

    @cached_property
    def pushes(self) -> bool:
        """Whether senders divide what they have among those who hear them, themselves included."""
        return self.combines and bool(getattr(self.strategy, "pushes", False))

    @cached_property
    def addresses(self) -> bool:
        """Whether the strategy says something to single receivers."""
        return self.combines and hasattr(self.strategy, "address")

    @cached_property
    def names_sources(self) -> bool:
        """Whether the strategy is told who sent each row."""
        return self.addresses or (
            self.combines and bool(getattr(self.strategy, "names_sources", False))
        )

    @cached_property
    def initial(self) -> Vector:
        """The common initial parameters [dim]; with `independent` no peer's, but of their kind."""
        return self.task.init(keyed.key_of(self.seed, "init"))

    def start(self, peer: int) -> Vector:
        """A peer's initial parameters [dim]."""
        if not self.independent:
            return self.initial
        return self.task.init(keyed.key_of(self.seed, "init", peer))

    def shard(self, peer: int | Tensor) -> Shard:
        """A peer's own data, poisoned if the peer is Byzantine and the attack poisons."""
        shard = self.task.shard(peer)
        if self.attack is not None and isinstance(peer, int) and peer in self.byzantine:
            key = keyed.key_of(self.seed, "poison", peer, device=shard.size.device)
            return self.attack.poison(self.task, shard, key)
        return shard

    def reports(self, round: int) -> bool:
        """Whether parameters are recorded after this round."""
        return (round + 1) % self.report_every == 0 or round == self.rounds - 1

    def deadline(self, round: int, hop: int = 0, hops: int = 1) -> float:
        """When a hop of a round ends at the latest, in seconds since the start."""
        return (round + (hop + 1) / hops) * self.round_s

    def active(self, round: int) -> Mask:
        """bool [peers]: who takes part (a function of seed and round alone)."""
        found = self._active.get(round)
        if found is None:
            found = self._active[round] = self.exchange.active(round, self.seed)
            self._active.pop(round - 8, None)
        return found

    def working(self, round: int) -> list[bool]:
        """`active` as a list, for engines that go peer by peer; not to be written into."""
        found = self._working.get(round)
        if found is None:
            found = self._working[round] = self.active(round).tolist()
            self._working.pop(round - 8, None)
        return found

    def keys(self, round: int) -> tuple[Key, ...]:
        """Each peer's key of a round, what `peer.key("round", round)` gives in a run of this seed.

        All at once: a key takes a microsecond as a row of a tensor, and five as one of its own.
        """
        found = self._keys.get(round)
        if found is None:
            peers = torch.arange(self.peers, device="cpu")
            folded = keyed.fold(keyed.key_of(self.seed, "peer"), peers, "round", round)
            folded = folded.to(self.initial.device, non_blocking=True)
            found = self._keys[round] = folded.unbind()
            self._keys.pop(round - 8, None)
        return found

    def waves(self, round: int) -> tuple[Wave, ...]:
        """The hops of a round as lists; kept for the rounds that peers are in."""
        found = self._waves.get(round)
        if found is None:
            hops = self.exchange.hops(round, self.seed)
            last = self._waves.get(round - 1)
            active = self.active(round)
            if (
                last is not None
                and all(a.same(b.hop) for a, b in zip(hops, last, strict=True))
                and torch.equal(active, self.active(round - 1))
            ):
                found = last
            else:
                on = self.working(round)
                found = tuple(_wave(hop, on, self.exchange.hub, self.pushes) for hop in hops)
            self._waves[round] = found
            self._waves.pop(round - 8, None)
        return found

    @cached_property
    def work_cost(self) -> Cost:
        """What one peer's local work takes; counted once at one peer's shapes."""
        if self.counted is not None:
            return self.counted
        state, codec = self.strategy.init(self.initial), self.transform.init(self.initial)
        key = keyed.key_of(self.seed, "cost", device=self.initial.device)
        return Cost(flops=count_flops(work, state, codec, self.task.shard(0), key, self, 0))

    def works_as(self, other: Method) -> bool:
        """Whether one peer's local work takes what it takes with the other method, which is the
        same one with another seed.

        To count is to do all of it once, with every product looked at.
        """
        same = type(self.transform) is type(other.transform)
        if self.strategy is not other.strategy or not same:
            return False
        try:
            self.task.joined([self.task, other.task])
        except UsageError:
            return False
        shards = self.task.shard(0), other.task.shard(0)
        leaves = [tree.flatten(shard)[0] for shard in shards]
        shapes = [[leaf.shape for leaf in found] for found in leaves]
        held = [[int(_held(shard, round).size) for round in (0, 1)] for shard in shards]
        return shapes[0] == shapes[1] and held[0] == held[1]

    def combine_cost(self, sources: int) -> Cost:
        """What combining takes: a multiplication and an addition per number heard."""
        return Cost(flops=2.0 * (sources + 1) * self.task.spec.dim)


def _wave(hop: Hop, on: list[bool], hub: int | None, pushes: bool) -> Wave:
    peers = len(on)
    receivers = list(range(peers)) if hop.receivers is None else hop.receivers.tolist()
    sources: list[tuple[int, ...]] = [()] * peers
    expected: list[tuple[int, ...]] = [()] * peers
    targets: list[list[int]] = [[] for _ in on]
    taken = None if hop.taken is None else hop.taken.tolist()
    for place, (receiver, slots) in enumerate(zip(receivers, hop.sources.tolist(), strict=True)):
        # A hub listens whether or not it works on data of its own in this round.
        listens = on[receiver] or receiver == hub
        live = tuple(s if s >= 0 and on[s] and listens else -1 for s in slots)
        sources[receiver] = live
        for source in live:
            if source >= 0:
                targets[source].append(receiver)
        if taken is None:
            expected[receiver] = tuple(s for s in live if s >= 0)
        else:
            pairs = zip(live, taken[place], strict=True)
            expected[receiver] = tuple(s for s, take in pairs if take and s >= 0)
    mixing = None
    if hop.weights is not None and hop.own is not None:
        mixing = torch.cat((hop.own.unsqueeze(-1), hop.weights), -1)
    if pushes:
        part = [1.0 / (1 + len(heard)) for heard in targets]
        rows = [
            [part[receiver], *(part[s] if s >= 0 else 0.0 for s in sources[receiver])]
            for receiver in receivers
        ]
        mixing = torch.tensor(rows, dtype=torch.float64, device="cpu")
    everyone = torch.ones(hop.sources.shape[-1] + 1, dtype=torch.bool, device="cpu")
    return Wave(
        hop, {receiver: place for place, receiver in enumerate(receivers)}, tuple(sources),
        tuple(expected), tuple(tuple(t) for t in targets), mixing, everyone,
    )  # fmt: skip


def _held(shard: Shard, round: int) -> Shard:
    """What is left of a peer's data in a round."""
    if shard.until is None:
        return shard
    size = torch.where(shard.until > round, shard.size, torch.zeros_like(shard.size))
    return replace(shard, size=size)


def _step(shard: Shard, key: Key, method: Method, round: int, **more: Any) -> Step:
    active = torch.ones_like(key, dtype=torch.bool)
    held = _held(shard, round)
    return Step(round, method.task, held, key, active, peers=method.peers, **more)


def local(
    state: Any, shard: Shard, key: Key, method: Method, round: int
) -> tuple[Any, Vector, Tensor | None, Mapping[str, Tensor]]:
    """strategy.local as (state, vector, weight, extra)."""
    state, parcel = method.strategy.local(state, _step(shard, key, method, round))
    assert isinstance(parcel, Parcel)
    return state, parcel.vector, parcel.weight, dict(parcel.extra)


def encode(
    vector: Vector, codec: Any, key: Key, method: Method, hop: int
) -> tuple[Payload, Any, Vector]:
    """(payload, codec state, what the receivers will see)."""
    payload, codec = method.transform.encode(vector, codec, keyed.fold(key, "encode", hop))
    return payload, codec, method.transform.decode(payload)


def work(
    state: Any, codec: Any, shard: Shard, key: Key, method: Method, round: int
) -> tuple[Any, Any, Payload, Vector, Tensor | None, Mapping[str, Tensor]]:
    """Local work and the first hop's payload: (state, codec, payload, sent, weight, extra)."""
    state, vector, weight, extra = local(state, shard, key, method, round)
    payload, codec, sent = encode(vector, codec, key, method, 0)
    return state, codec, payload, sent, weight, extra


def address(
    state: Any, to: Tensor, own: Tensor, shard: Shard, key: Key, method: Method, round: int
) -> dict[str, Tensor]:
    """strategy.address: what each of the receivers [..., t] is told by itself, [..., t, *]."""
    step = _step(shard, key, method, round, own=own)
    return dict(method.strategy.address(state, to, step))  # type: ignore[attr-defined]


def misaddressed(said: Mapping[str, Tensor], state: Any, method: Method) -> dict[str, Tensor]:
    """What Byzantine peers say to single receivers in place of that."""
    tells = getattr(method.attack, "tells", None)
    return dict(said) if tells is None else dict(tells(said, state))


def down(state: Any, method: Method) -> dict[str, Tensor]:
    """strategy.down, or nothing: what goes to a hub's clients beside its parameters."""
    found = getattr(method.strategy, "down", None)
    return {} if found is None else dict(found(state))


def adopt(
    state: Any, received: Vector, given: Mapping[str, Tensor], shard: Shard, key: Key,
    method: Method, round: int,
) -> Any:  # fmt: skip
    """A client takes the hub's parameters, and what came with them."""
    taking = getattr(method.strategy, "adopt", None)
    if taking is None:
        return method.strategy.init(received)
    return taking(state, received, _step(shard, key, method, round, given=given))


def adopt_and_work(
    state: Any, received: Vector, given: Mapping[str, Tensor], codec: Any, shard: Shard, key: Key,
    method: Method, round: int,
) -> tuple[Any, Any, Payload, Vector, Tensor | None, Mapping[str, Tensor]]:  # fmt: skip
    """A client's round under a hub."""
    state = adopt(state, received, given, shard, key, method, round)
    return work(state, codec, shard, key, method, round)


def weights_of(
    mask: Mask, mixing: Tensor | None, taught: Tensor | None, pushes: bool = False
) -> tuple[Mask, Tensor | None]:
    """Final mask and weights of the rows, own row first: [..., k + 1].

    `taught` (the senders' own weights) takes precedence over the exchange's mixing weights; a
    sender with weight 0 has nothing to say and counts as absent. A missing neighbour's mixing
    weight goes to the own row, which keeps each row's sum at 1; of shares that were pushed it is
    lost with the message.
    """
    if taught is not None:
        mask = mask & (taught > 0)
        return mask, torch.where(mask, taught, 0.0)
    if mixing is None:
        return mask, None
    if pushes:
        return mask, torch.where(mask, mixing, 0.0)
    lost = torch.where(mask, 0.0, mixing).sum(-1)
    kept = torch.where(mask, mixing, 0.0)
    return mask, torch.cat((kept[..., :1] + lost.unsqueeze(-1), kept[..., 1:]), -1)


def combine(
    own: Vector, payloads: tuple[Payload, ...], mask: Mask, mixing: Tensor | None,
    taught: Tensor | None, extras: tuple[Mapping[str, Tensor], ...], method: Method,
) -> tuple[Vector, Tensor, dict[str, Tensor]]:  # fmt: skip
    """(aggregate [..., dim], rows that counted [...], combined extras); own row first."""
    x = _rows(own, payloads, method)
    mask, weight = weights_of(mask, mixing, taught)
    vector = method.aggregator(x, mask=mask, weight=weight, center=own)
    return vector, mask.sum(-1), combine_extras(shares(mask, weight), extras)


def _rows(own: Vector, payloads: tuple[Payload, ...], method: Method) -> Tensor:
    """[..., k + 1, dim], own first."""
    decode = method.transform.decode
    # What a peer hears lies in one tensor already where engines could see to that.
    return tree.stack_tensors([own, *[decode(payload) for payload in payloads]]).movedim(0, -2)


def shares(mask: Mask, weight: Tensor | None) -> Tensor:
    """What each row counts in a weighted mean: float64 [..., k + 1], of sum 1."""
    share = mask.to(torch.float64) if weight is None else weight.to(torch.float64)
    total = share.sum(-1, keepdim=True)
    # A peer that heard nobody, itself included, keeps its own.
    alone = torch.zeros_like(share)
    alone[..., 0] = 1.0
    return torch.where(total > 0, share / torch.where(total > 0, total, 1.0), alone)


def own_combine(
    state: Any, rows: Tensor, mask: Mask, weight: Tensor | None, extra: Mapping[str, Tensor],
    sent: Vector, shard: Shard, key: Key, method: Method, round: int,
) -> Heard:  # fmt: skip
    """strategy.combine on rows [..., k + 1, dim] and extras [..., k + 1, *]."""
    step = _step(shard, key, method, round, sent=sent)
    share = weight if method.pushes and weight is not None else shares(mask, weight)
    heard = method.strategy.combine(  # type: ignore[attr-defined]
        state, rows, mask, share, extra, step
    )
    assert isinstance(heard, Heard)
    return heard


def combine_extras(share: Tensor, extras: tuple[Mapping[str, Tensor], ...]) -> dict[str, Tensor]:
    """Weighted means of the extras: share [..., k + 1], each extra [..., *]."""
    combined = {}
    for name in extras[0] if extras else ():
        stacked = torch.stack([extra[name] for extra in extras], share.dim() - 1)
        portion = share.reshape(share.shape + (1,) * (stacked.dim() - share.dim()))
        combined[name] = (stacked * portion.to(stacked.dtype)).sum(share.dim() - 1)
    return combined


def apply(
    state: Any, heard: Heard, sent: Vector, shard: Shard, key: Key, method: Method, round: int
) -> tuple[Any, Vector]:
    """strategy.apply as (state, parameters)."""
    state = method.strategy.apply(state, heard, _step(shard, key, method, round, sent=sent))
    return state, method.strategy.params(state)


def conclude(
    state: Any, own: Vector, payloads: tuple[Payload, ...], mask: Mask, mixing: Tensor | None,
    taught: Tensor | None, extras: tuple[Mapping[str, Tensor], ...], sent: Vector, shard: Shard,
    key: Key, method: Method, round: int,
) -> tuple[Any, Vector]:  # fmt: skip
    """The last hop: combine, then apply. `own` is aggregated, `sent` is the first payload."""
    if method.combines:
        rows = _rows(own, payloads, method)
        mask, weight = weights_of(mask, mixing, taught, method.pushes)
        names = extras[0] if extras else ()
        extra = {name: torch.stack([each[name] for each in extras], key.dim()) for name in names}
        heard = own_combine(
            state, rows, mask, weight, extra, sent, shard, key, method, round
        )  # fmt: skip
    else:
        heard = Heard(*combine(own, payloads, mask, mixing, taught, extras, method))
    return apply(state, heard, sent, shard, key, method, round)


def report(state: Any, method: Method) -> Mapping[str, Tensor]:
    """strategy.report, or nothing: name -> [...]."""
    found = getattr(method.strategy, "report", None)
    return {} if found is None else found(state, method.task.spec)


def freeze(state: Any) -> dict[str, Any]:
    """A state as storable items; `thaw` is the inverse for a state of the same structure."""
    leaves, _ = tree.flatten(state)
    return {f"state/{i}": leaf for i, leaf in enumerate(leaves)}


def thaw(like: Any, stored: Any) -> Any:
    """A state of `like`'s structure from a store's `get`."""
    leaves, structure = tree.flatten(like)
    found = [stored(f"state/{i}").to(leaf.device) for i, leaf in enumerate(leaves)]
    return tree.unflatten(structure, found)
