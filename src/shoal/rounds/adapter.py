"""A round-based method as a peer program, for `event` and `live`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal.base.errors import Leaving
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Peer
from shoal.rounds import method as phases
from shoal.rounds.adversary import Adversary
from shoal.rounds.method import Method, Wave
from shoal.rounds.task import Shard
from shoal.rounds.transform import Payload
from shoal.tensor import tree
from shoal.tensor.types import Vector
from shoal.wire.message import Packed, message

T = TypeVar("T")
_BYTES = (bytes, bytearray, memoryview)
_NOTHING: Mapping[str, Tensor] = {}
_FREE = Cost()


@message(tag=("round", "hop"), checked=True)
class Update:
    """A peer's payload of one hop. weight: None when the strategy gives none."""

    round: int
    hop: int
    payload: Packed
    weight: float | None
    extra: dict[str, Tensor]


@message(tag=("round",), checked=True)
class Model:
    """The hub's parameters at the start of a round, and what the strategy gives beside them."""

    round: int
    params: Tensor
    extra: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Rounds:
    """The adapter: a peer's loop over the rounds of a `Method`.

    A round ends when everybody expected was heard, or at its absolute deadline. A peer that starts
    late or again continues at the round that the schedule is in, with the state of its last
    checkpoint.
    """

    method: Method
    adversary: Adversary

    @classmethod
    def of(cls, method: Method) -> Rounds:
        return cls(method, Adversary(method))

    async def run(self, peer: Peer) -> None:
        method = self.method
        own = _Own(method, peer)
        try:
            for round in range(own.first_round, method.rounds):
                if not method.working(round)[peer.id] and peer.id != method.exchange.hub:
                    continue
                if method.exchange.hub is None:
                    peer.enter_round(round)
                    await self._exchange(peer, own, round)
                elif peer.id == method.exchange.hub:
                    peer.enter_round(round)
                    await self._lead(peer, own, round)
                else:
                    await self._follow(peer, own, round)
                if method.checkpoint_every and (round + 1) % method.checkpoint_every == 0:
                    await own.commit(round)
        except Leaving:
            return

    async def _exchange(self, peer: Peer, own: _Own, round: int) -> None:
        """A round among equals."""
        method = self.method
        waves = method.waves(round)
        await self._work(peer, own, round)
        vector = own.sent
        for hop, wave in enumerate(waves):
            if hop:
                await self._encode(peer, own, vector, round, hop)
            await self._spread(peer, own, wave, round, hop)
            heard = await self._hear(peer, own, wave, round, hop, len(waves))
            if hop < len(waves) - 1:
                cost = method.combine_cost(len(heard[0]))
                vector, _, own.extra = await peer.compute(
                    phases.combine, own.current, *heard, static=(method,), cost=cost
                )
            else:
                await self._conclude(peer, own, heard, round)
        peer.discard(Update, before=(round + 1, 0))
        if method.reports(round):
            peer.record("params", own.params)
            for name, value in phases.report(own.state, method).items():
                peer.record(name, float(value))

    async def _lead(self, peer: Peer, own: _Own, round: int) -> None:
        """The hub's round: parameters down, updates up, apply."""
        method = self.method
        on = method.working(round)
        wave = method.waves(round)[0]
        given = phases.down(own.hub_state, method)
        model = Model(round, own.hub_params, given)
        for client in range(method.peers):
            if on[client] and client != peer.id:
                await peer.send(PeerId(client), model)
        if on[peer.id]:
            await self._work(peer, own, round, own.hub_params, given)
        else:
            own.rest(own.hub_params)
            own.key = method.keys(round)[peer.id]
        heard = await self._hear(peer, own, wave, round, 0, 1)
        payloads, mask, *rest = heard
        mask = mask.clone()
        mask[0] = on[peer.id]
        own.state, own.hub_state = own.hub_state, own.state
        await self._conclude(peer, own, (payloads, mask, *rest), round)
        own.state, own.hub_state = own.hub_state, own.state
        own.hub_params = own.params
        peer.discard(Update, before=(round + 1, 0))
        if method.reports(round):
            peer.record("params", own.hub_params)

    async def _follow(self, peer: Peer, own: _Own, round: int) -> None:
        """A client's round."""
        method = self.method
        hub = method.exchange.hub
        assert hub is not None
        deadline = method.deadline(round)
        envelope = await peer.recv(Model, tag=(round,), source=hub, deadline=deadline)
        peer.discard(Model, before=(round + 1,))
        if envelope is None:
            return
        # Not before: clients wait for a hub, so it is the hub that begins a round.
        peer.enter_round(round)
        received = own.there(envelope.message.params)
        if method.reports(round):
            peer.record("params", received)
        await self._work(peer, own, round, received, own.there(dict(envelope.message.extra)))
        await self._spread(peer, own, method.waves(round)[0], round, 0)

    async def _work(
        self, peer: Peer, own: _Own, round: int, received: Vector | None = None,
        given: Mapping[str, Tensor] = _NOTHING,
    ) -> None:  # fmt: skip
        """Local work, and what others will get from it."""
        method, cost = self.method, self.method.work_cost
        own.key = method.keys(round)[peer.id]
        byzantine = peer.id in method.byzantine
        if not byzantine:
            if received is None:
                done = await peer.compute(
                    phases.work, own.state, own.codec, own.shard, own.key,
                    static=(method, round), cost=cost,
                )  # fmt: skip
            else:
                done = await peer.compute(
                    phases.adopt_and_work, own.state, received, given, own.codec, own.shard,
                    own.key, static=(method, round), cost=cost,
                )  # fmt: skip
            own.state, own.codec, own.payload, own.sent, own.weight, own.extra = done
            self.adversary.offer(round, 0, peer.id, own.sent)
            own.current = own.sent
            return
        if received is not None:
            own.state = phases.adopt(own.state, received, given, own.shard, own.key, method, round)
        own.state, vector, own.weight, own.extra = await peer.compute(
            phases.local, own.state, own.shard, own.key, static=(method, round), cost=cost
        )
        own.sent = own.current = vector
        # Stands in for an empty slot; what others get is made for them.
        own.payload, _, _ = phases.encode(vector, own.codec, own.key, method, 0)

    async def _encode(self, peer: Peer, own: _Own, vector: Vector, round: int, hop: int) -> None:
        """A later hop sends the last hop's aggregate on."""
        own.current = vector
        if peer.id not in self.method.byzantine:
            own.payload, own.codec, own.current = phases.encode(
                vector, own.codec, own.key, self.method, hop
            )
            self.adversary.offer(round, hop, peer.id, own.current)

    async def _spread(self, peer: Peer, own: _Own, wave: Wave, round: int, hop: int) -> None:
        targets = wave.targets[peer.id]
        weight = None if own.weight is None else float(own.weight)
        extra = dict(own.extra)
        told = await self._told(peer, own, targets, round) if self.method.addresses else None
        if peer.id not in self.method.byzantine:
            update = Update(round, hop, Packed(own.payload), weight, extra)
            for place, target in enumerate(targets):
                if told is not None:
                    alone = {**extra, **told[place]}
                    update = Update(round, hop, Packed(own.payload), weight, alone)
                await peer.send(PeerId(target), update)
            return
        vectors = await self.adversary.craft(peer, round, hop, own.current, targets)  # type: ignore[arg-type]
        last: Vector | None = None
        for place, target in enumerate(targets):
            vector = vectors[target]
            if vector is not last:
                own.payload, _, _ = phases.encode(vector, own.codec, own.key, self.method, hop)
                last = vector
            alone = extra if told is None else {**extra, **told[place]}
            await peer.send(PeerId(target), Update(round, hop, Packed(own.payload), weight, alone))

    async def _told(
        self, peer: Peer, own: _Own, targets: tuple[int, ...], round: int
    ) -> list[dict[str, Tensor]]:
        """What each target is told by itself."""
        to = own.there(torch.tensor(targets or (-1,), device="cpu"))
        said = await peer.compute(
            phases.address, own.state, to, own.id, own.shard, own.key, static=(self.method, round),
            cost=_FREE,
        )  # fmt: skip
        if peer.id in self.method.byzantine:
            said = phases.misaddressed(said, own.state, self.method)
        own.untold = {name: torch.zeros_like(value[0]) for name, value in said.items()}
        return [{name: value[place] for name, value in said.items()} for place in range(len(to))]

    async def _hear(
        self, peer: Peer, own: _Own, wave: Wave, round: int, hop: int, hops: int
    ) -> tuple[Any, ...]:
        """Arguments of `combine`, beginning with the payloads: one per slot of the wave."""
        method = self.method
        expected = wave.expected[peer.id]
        got: Mapping[int, Update] = await peer.gather(
            Update, tag=(round, hop), expect=expected,  # type: ignore[arg-type]
            deadline=method.deadline(round, hop, hops),
        )  # fmt: skip
        slots = [got.get(source) for source in wave.sources[peer.id]]
        payloads = tuple([own.payload if u is None else own.there(self._open(u)) for u in slots])
        heard = [True, *[u is not None for u in slots]]
        # One mask for all who heard everybody: a batch need not stack it.
        mask = wave.everyone if all(heard) else torch.tensor(heard, device="cpu")
        mask = own.there(mask)
        mixing = None if wave.mixing is None else own.there(wave.mixing[wave.row[peer.id]])
        weights = [own.weight, *[None if u is None else u.weight for u in slots]]
        taught = None
        if any(w is not None for w in weights):
            numbers = [0.0 if w is None else float(w) for w in weights]
            taught = own.there(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
        extras = [own.extra, *[{} if u is None else own.there(u.extra) for u in slots]]
        like = {name: value for extra in reversed(extras) for name, value in extra.items()}
        if like or own.untold:
            silent = {name: torch.zeros_like(value) for name, value in like.items()}
            extras = [{**own.untold, **silent, **extra} for extra in extras]
        elif not method.names_sources:
            return payloads, mask, mixing, taught, ()
        if method.names_sources:
            sources = wave.sources[peer.id]
            named = [s if u is not None else -1 for s, u in zip(sources, slots, strict=True)]
            ids = own.there(torch.tensor([peer.id, *named], device="cpu"))
            extras = [{**e, "source": i} for e, i in zip(extras, ids.unbind(), strict=True)]
        return payloads, mask, mixing, taught, tuple(extras)

    def _open(self, update: Update) -> Payload:
        content = update.payload.content
        if isinstance(content, _BYTES):
            return self.method.transform.unpack(content)
        return content  # type: ignore[return-value]

    async def _conclude(self, peer: Peer, own: _Own, heard: tuple[Any, ...], round: int) -> None:
        own.state, own.params = await peer.compute(
            phases.conclude, own.state, own.current, *heard, own.sent, own.shard, own.key,
            static=(self.method, round), cost=self.method.combine_cost(len(heard[0])),
        )  # fmt: skip


class _Own:
    """What one peer keeps between rounds."""

    payload: Payload
    sent: Vector
    current: Vector
    key: Tensor
    shard: Shard

    def __init__(self, method: Method, peer: Peer) -> None:
        strategy = method.strategy
        self.peer = peer
        self.device = method.initial.device
        self.shard = method.shard(peer.id)
        self.id = self.there(torch.tensor(peer.id, device="cpu"))
        initial = method.start(peer.id)
        self.state = strategy.init(initial)
        self.codec = method.transform.init(initial)
        self.hub_state = strategy.init(initial)
        self.weight: Tensor | None = None
        self.extra: Mapping[str, Tensor] = {}
        self.untold: Mapping[str, Tensor] = {}
        """zeros in the form of what single receivers are told"""
        self.method = method
        done = peer.store.get("round")
        stored = -1
        if done is not None:
            stored = int.from_bytes(done, "little")
            self.state, self.codec, self.hub_state = phases.thaw(self._all(), peer.store.get)
        # Messages of rounds that ended are of no use: join the schedule where it is.
        self.first_round = max(stored + 1, int(peer.now() / method.round_s), peer.round + 1)
        self.params = strategy.params(self.state)
        self.hub_params = strategy.params(self.hub_state)

    def there(self, value: T) -> T:
        """A tree of tensors where the parameters are: keys, masks and mail are made elsewhere."""
        return tree.there(value, self.device)

    def _all(self) -> tuple[Any, Any, Any]:
        return self.state, self.codec, self.hub_state

    def rest(self, params: Vector) -> None:
        """A hub that does no local work in this round stands in for an empty slot."""
        self.key = self.there(self.peer.key("round", 0))
        self.payload, _, self.sent = phases.encode(
            params, self.method.transform.init(params), self.key, self.method, 0
        )
        self.current = self.sent

    async def commit(self, round: int) -> None:
        items = {**phases.freeze(self._all()), "round": round.to_bytes(8, "little")}
        await self.peer.store.commit(items)
