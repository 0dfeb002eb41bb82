"""A client of masked rounds: it works, masks, and helps to open the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from shoal.base.errors import PeerError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.privacy import _masked_wire as wire
from shoal.parts.privacy.mask_stream import Mask, add_masks
from shoal.parts.privacy.masked_peer import MaskedPeer
from shoal.parts.privacy.sealed_shares import SEALED_BYTES
from shoal.rounds import method as phases
from shoal.tensor import keyed
from shoal.tensor.types import Key
from shoal.wire.checksum import intact, sealed
from shoal.wire.message import Packed

if TYPE_CHECKING:
    from shoal.parts.privacy.secure_rounds import SecureRounds

M = TypeVar("M")


def weighted_codes(
    codes: Tensor, broken: Tensor, weight: int, extra: Mapping[str, Tensor], loose: Any, key: Key
) -> Tensor:
    """What a client adds to the sum: int64 [entries], the weight last; all 0 where it has nothing
    to say, a vector that is not finite for one.

    codes [dim] and broken [] are of the encoded vector; extras go on the same levels here.
    """
    pieces = [codes.to(torch.int64)]
    for place, name in enumerate(sorted(extra)):
        flat = extra[name].reshape(-1)
        payload, _ = loose.encode(flat, None, keyed.fold(key, "extra", place))
        pieces.append(payload.codes.to(torch.int64))
        broken = broken | payload.broken
    ones = torch.ones(1, dtype=torch.int64, device=codes.device)
    return torch.cat([*pieces, ones]) * torch.where(broken, 0, weight)


def linear_check(codes: Tensor, bits: int) -> float:
    """A number below 2^32 that is, modulo a power of two, a linear function of codes [entries]."""
    entries = keyed.grid(keyed.key_of(0, "linear check"), len(codes))
    total = int((codes.cpu() * entries).sum())
    return float(total & ((1 << min(bits, 32)) - 1))


class Client:
    """One incarnation of a client. A round that it was in before it crashed goes on without it: to
    send two vectors under the same masks would give their difference away.
    """

    def __init__(self, program: SecureRounds, peer: Peer) -> None:
        method = program.method
        self.program, self.peer, self.method = program, peer, method
        self.hub = PeerId(program.hub)
        self.initial = method.initial
        self.shard = method.shard(peer.id)
        self.state = method.strategy.init(method.start(peer.id))
        self.codec = method.transform.init(self.initial)
        stored = peer.store.get("joined")
        self.joined = -1 if stored is None else int.from_bytes(stored, "little")
        if peer.store.get("state/0") is not None:
            self.state, self.codec = phases.thaw((self.state, self.codec), peer.store.get)

    async def live(self) -> None:
        """Until the hub says that it is over, or nothing is heard of it any more."""
        peer, rounds = self.peer, self.method.rounds
        at_work = None
        async with peer.tasks() as group:
            while True:
                envelope = await peer.recv(
                    wire.Begin, source=self.hub, deadline=peer.now() + self.program.gives_up_s
                )
                if envelope is None:
                    break
                told = envelope.message
                if not intact(told) or told.round <= self.joined:
                    continue
                over = told.round >= rounds
                if not over and not self._fits(told.params):
                    continue
                if at_work is not None:
                    at_work.cancel()
                if over:
                    break
                self.joined = told.round
                await peer.store.commit({"joined": told.round.to_bytes(8, "little")})
                at_work = group.start(self._round(told))
            if at_work is not None:
                at_work.cancel()

    def _fits(self, params: Tensor) -> bool:
        return params.shape == self.initial.shape and params.dtype == self.initial.dtype

    async def _round(self, told: wire.Begin) -> None:
        peer, program, round = self.peer, self.program, told.round
        peer.enter_round(round)
        for kind in (wire.Book, wire.Dealt, wire.Question):
            peer.discard(kind, before=(round,))
        graph = program.graph(round)
        if peer.id not in graph.peers:
            return
        secret = program.masking.secret(peer, round)
        own = MaskedPeer(peer.id, graph.neighbors(peer.id), graph.threshold, round, secret)
        async with peer.tasks() as group:
            # Keys and shares need no result, so they are agreed on meanwhile.
            work = group.start(self._work(told))
            try:
                masks = await self._agree(own, round)
            except PeerError:
                peer.record("gave_up", round)
                return
            codes = await work.join()
            if masks is None:
                return
            if program.masking.audit:
                peer.record("masked", linear_check(codes, program.bits))
            masked = await peer.compute(
                add_masks, codes, static=(masks, program.bits, program.masking.cipher),
                cost=program.mask_cost(len(masks)), batch="never",
            )  # fmt: skip
            row = wire.Row(masked, program.bits)
            await peer.send(self.hub, sealed(wire.Masked(round, Packed(row))))
            await self._open(own, round)

    async def _agree(self, own: MaskedPeer, round: int) -> tuple[Mask, ...] | None:
        """Keys, then shares: the masks; None when the hub is silent."""
        peer, hub = self.peer, self.hub
        await peer.send(hub, sealed(wire.Advertise(round, b"".join(own.advert))))
        book = await self._hear(wire.Book, round)
        if book is None:
            return None
        keys = wire.apart(book.peers, book.keys, 3 * wire.KEY_BYTES)
        adverts = {j: wire.advert_of(each) for j, each in (keys or {}).items()}
        shares = own.shares({j: advert for j, advert in adverts.items() if advert is not None})
        await peer.send(hub, sealed(wire.Deal(round, *wire.together(shares))))
        dealt = await self._hear(wire.Dealt, round)
        if dealt is None:
            return None
        masks = own.masks(wire.apart(dealt.peers, dealt.sealed, SEALED_BYTES) or {})
        if own.bad:
            peer.record("bad_shares", len(own.bad))
        return masks

    async def _work(self, told: wire.Begin) -> Tensor:
        """Local work: the codes to be masked."""
        method, program, round = self.method, self.program, told.round
        received = told.params.to(self.initial.device)
        if method.reports(round):
            self.peer.record("params", received)
        given = {name: value.to(received.device) for name, value in told.extra.items()}
        key = method.keys(round)[self.peer.id]
        done = await self.peer.compute(
            phases.adopt_and_work, self.state, received, given, self.codec, self.shard, key,
            static=(method, round), cost=method.work_cost,
        )  # fmt: skip
        self.state, self.codec, payload, _, weight, extra = done
        await self.peer.store.commit(phases.freeze((self.state, self.codec)))
        whole = program.whole(weight)
        codes: Any = payload
        return weighted_codes(codes.codes, codes.broken, whole, extra, program.loose, key)

    async def _open(self, own: MaskedPeer, round: int) -> None:
        """Answer questions, as far as answers tell of nothing but the sum."""
        peer = self.peer
        while (asked := await self._hear(wire.Question, round)) is not None:
            try:
                seeds, keys = own.reveal(asked.survivors, asked.dropped)
            except PeerError:
                peer.record("refused", round)
                continue
            peer.record(
                "revealed", round, seeds=" ".join(map(str, seeds)), keys=" ".join(map(str, keys))
            )
            named, opened = wire.together(seeds)
            others, more = wire.together(keys)
            await peer.send(self.hub, sealed(wire.Reveal(round, named, others, opened + more)))

    async def _hear(self, kind: type[M], round: int) -> M | None:
        """The hub's next word of a kind; None when it does not come."""
        deadline = self.peer.now() + self.program.masking.round_s
        while True:
            envelope = await self.peer.recv(kind, tag=(round,), source=self.hub, deadline=deadline)
            if envelope is None:
                return None
            if intact(envelope.message):
                return envelope.message
