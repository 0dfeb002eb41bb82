"""A client of masked rounds: it works, masks, and helps to open the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from shoal.parts.privacy.signed_round import SignedRound
from shoal.rounds import method as phases
from shoal.tensor import keyed
from shoal.tensor.types import Key
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


def like(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    """What two tensors have in common of which one can stand for the other."""
    return value.shape, value.dtype


class Client:
    """One incarnation of a client. A round that it was in before it crashed goes on without it: to
    send two vectors under the same masks would give their difference away.
    """

    def __init__(self, program: SecureRounds, peer: Peer) -> None:
        method = program.method
        self.program, self.peer, self.method = program, peer, method
        self.hub = PeerId(program.hub)
        if program.masking.signs:
            # Before anything is begun: a peer without its key can take no part.
            program.roster.identity_of(peer.id)
        self.initial = method.initial
        self.shard = method.shard(peer.id)
        self.state = method.strategy.init(method.start(peer.id))
        self.codec = method.transform.init(self.initial)
        self.given = {name: like(value) for name, value in phases.down(self.state, method).items()}
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
                if told.round <= self.joined:
                    continue
                over = told.round >= rounds
                if not over and not self._fits(told):
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

    def _fits(self, told: wire.Begin) -> bool:
        """Whether the strategy can take what the hub gives."""
        given = {name: like(value) for name, value in told.extra.items()}
        return like(told.params) == like(self.initial) and given == self.given

    async def _round(self, told: wire.Begin) -> None:
        peer, program, round = self.peer, self.program, told.round
        peer.enter_round(round)
        for kind in (wire.Book, wire.Dealt, wire.Question, wire.Standing, wire.Agreed):
            peer.discard(kind, before=(round,))
        graph = program.graph(round)
        if peer.id not in graph.peers:
            return
        secret = program.masking.secret(peer, round)
        own = MaskedPeer(peer.id, graph.neighbors(peer.id), graph.threshold, round, secret)
        signed = program.signed(peer.id, round, told.params, told.extra)
        async with peer.tasks() as group:
            # Keys and shares need no result, so they are agreed on meanwhile.
            work = group.start(self._work(told))
            try:
                masks = await self._agree(own, signed, round)
            except PeerError as error:
                peer.record("gave_up", round, why=str(error))
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
            await peer.send(self.hub, wire.Masked(round, Packed(row)))
            if signed is None or not program.masking.agrees:
                await self._open(own, round)
                return
            vouching = group.start(self._vouch(signed))
            await self._open_agreed(own, signed)
            vouching.cancel()

    async def _agree(
        self, own: MaskedPeer, signed: SignedRound | None, round: int
    ) -> tuple[Mask, ...] | None:
        """Keys, then shares: the masks; None when the hub is silent."""
        peer, hub = self.peer, self.hub
        signature = b"" if signed is None else signed.sign_keys(own.advert)
        await peer.send(hub, wire.Advertise(round, b"".join((*own.advert, signature))))
        book = await self._hear(wire.Book, round)
        if book is None:
            return None
        entries = wire.apart(book.peers, book.keys, wire.entry_bytes(signs=signed is not None))
        read = {j: wire.advert_of(entry) for j, entry in (entries or {}).items()}
        found = {j: pair for j, pair in read.items() if pair is not None}
        adverts = {j: advert for j, (advert, _) in found.items()}
        if signed is not None:
            signed.check_keys(adverts, {j: signature for j, (_, signature) in found.items()})
        shares = own.shares(adverts)
        await peer.send(hub, wire.Deal(round, *wire.together(shares)))
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
        while (asked := await self._hear(wire.Question, round)) is not None:
            await self._reveal(own, asked.survivors, asked.dropped)

    async def _open_agreed(self, own: MaskedPeer, signed: SignedRound) -> None:
        """Answer for the one set of survivors that witnesses signed."""
        while (asked := await self._hear(wire.Agreed, own.round)) is not None:
            try:
                there = signed.agreed(asked.survivors, asked.witnesses, asked.signatures)
            except PeerError as error:
                self._refused(own.round, error)
                continue
            survivors = sorted(own.there & there)
            await self._reveal(own, survivors, sorted(own.there - there))

    async def _vouch(self, signed: SignedRound) -> None:
        """Say, as a witness, which survivors this client was shown."""
        if self.peer.id not in signed.graph.witnesses:
            return
        while (shown := await self._hear(wire.Standing, signed.round)) is not None:
            try:
                signature = signed.vouch(shown.survivors)
            except PeerError as error:
                self._refused(signed.round, error)
                continue
            await self.peer.send(self.hub, wire.Vouched(signed.round, signature))

    async def _reveal(
        self, own: MaskedPeer, survivors: Sequence[int], dropped: Sequence[int]
    ) -> None:
        peer = self.peer
        try:
            seeds, keys = own.reveal(survivors, dropped)
        except PeerError as error:
            self._refused(own.round, error)
            return
        peer.record(
            "revealed", own.round, seeds=" ".join(map(str, seeds)), keys=" ".join(map(str, keys))
        )
        named, opened = wire.together(seeds)
        others, more = wire.together(keys)
        await peer.send(self.hub, wire.Reveal(own.round, named, others, opened + more))

    def _refused(self, round: int, error: PeerError) -> None:
        self.peer.record("refused", round, why=str(error))

    async def _hear(self, kind: type[M], round: int) -> M | None:
        """The hub's next word of a kind; None when it does not come."""
        deadline = self.peer.now() + self.program.masking.round_s
        envelope = await self.peer.recv(kind, tag=(round,), source=self.hub, deadline=deadline)
        return None if envelope is None else envelope.message
