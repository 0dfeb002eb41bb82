"""The hub of masked rounds: parameters down, a sum up, apply."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from shoal.base.errors import PeerError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.privacy import _masked_wire as wire
from shoal.parts.privacy._secure_client import linear_check
from shoal.parts.privacy.mask_stream import add_masks
from shoal.parts.privacy.masked_hub import MaskedHub
from shoal.parts.privacy.sealed_shares import SEALED_BYTES, SHARE_BYTES
from shoal.parts.privacy.signed_round import SignedRound, bitmap
from shoal.rounds import method as phases
from shoal.rounds.method import Method
from shoal.rounds.strategy import Heard
from shoal.rounds.task import Shard
from shoal.tensor.types import Key, Vector

if TYPE_CHECKING:
    from shoal.parts.privacy.secure_rounds import SecureRounds

M = TypeVar("M")


def conclude(
    state: object, vector: Vector, count: Tensor, extra: Mapping[str, Tensor], params: Vector,
    shard: Shard, key: Key, method: Method, round: int,
) -> tuple[object, Vector]:  # fmt: skip
    """strategy.apply on a mean that is known as such: (state, parameters)."""
    # As in a plain star, a hub without data stands in with its parameters.
    _, _, sent = phases.encode(params, method.transform.init(params), key, method, 0)
    heard = Heard(vector, count, extra)
    return phases.apply(state, heard, sent, shard, key, method, round)


class Hub:
    """One incarnation of the hub. A round in which it crashed is over; clients drop it."""

    def __init__(self, program: SecureRounds, peer: Peer) -> None:
        method = program.method
        self.program, self.peer, self.method = program, peer, method
        self.state = method.strategy.init(method.start(peer.id))
        self.first = 0
        stored = peer.store.get("round")
        if stored is not None:
            self.first = int.from_bytes(stored, "little") + 1
            (self.state,) = phases.thaw((self.state,), peer.store.get)
        self.params = method.strategy.params(self.state)

    async def live(self) -> None:
        """All rounds that are left; then tell everybody that it is over."""
        peer, method = self.peer, self.method
        for round in range(self.first, method.rounds):
            peer.enter_round(round)
            # Before anybody hears of it: no round begins twice.
            await peer.store.commit(
                {**phases.freeze((self.state,)), "round": round.to_bytes(8, "little")}
            )
            await self._round(round)
            for kind in (wire.Advertise, wire.Deal, wire.Masked, wire.Vouched, wire.Reveal):
                peer.discard(kind, before=(round + 1,))
            if method.reports(round):
                peer.record("params", self.params)
        await peer.store.commit(
            {**phases.freeze((self.state,)), "round": method.rounds.to_bytes(8, "little")}
        )
        end = wire.Begin(method.rounds, self.params[:0], {})
        for client in range(method.peers):
            if client != peer.id:
                await peer.send(PeerId(client), end)

    async def _round(self, round: int) -> None:
        peer, program, method = self.peer, self.program, self.method
        graph = program.graph(round)
        given = phases.down(self.state, method)
        begin = wire.Begin(round, self.params, given)
        for client in graph.peers:
            await peer.send(PeerId(client), begin)
        sum_of = MaskedHub(graph, round, program.entries, program.bits)
        signed = program.signed(peer.id, round, self.params, given)
        try:
            await self._agree(sum_of, signed, round)
            total = await self._collect(sum_of, signed, round)
        except PeerError as error:
            # What cannot be opened is nobody's loss but this round's.
            peer.record("abandoned", round, why=str(error))
            return
        if sum_of.liars:
            peer.record("liars", len(sum_of.liars), who=" ".join(map(str, sorted(sum_of.liars))))
        if program.masking.audit:
            peer.record(
                "summed", linear_check(total, program.bits), bits=str(program.bits),
                sources=" ".join(map(str, sorted(sum_of.summed))),
            )  # fmt: skip
        peer.record(
            "clients", len(sum_of.summed), early=str(len(graph.peers) - len(sum_of.shared)),
            late=str(len(sum_of.shared) - len(sum_of.summed)),
        )  # fmt: skip
        found = program.mean(total)
        if found is None:
            return
        vector, extra = found
        key, count = method.keys(round)[peer.id], torch.tensor(len(sum_of.summed), device="cpu")
        self.state, self.params = await peer.compute(
            conclude, self.state, vector, count.to(vector.device), extra, self.params,
            method.shard(peer.id), key, static=(method, round),
            cost=method.combine_cost(len(sum_of.summed)),
        )  # fmt: skip

    async def _agree(self, sum_of: MaskedHub, signed: SignedRound | None, round: int) -> None:
        """Keys up and down, then shares up and down."""
        peer, patience_s = self.peer, self.program.masking.phase_s
        heard = await self._gather(wire.Advertise, round, sum_of.graph.peers, patience_s)
        entries: dict[int, bytes] = {}
        for client, told in heard.items():
            read = wire.advert_of(told.keys)
            if read is None or len(told.keys) != wire.entry_bytes(signs=signed is not None):
                continue
            advert, signature = read
            # Clients go no further with a key that its owner did not sign.
            if signed is not None and not signed.keys_hold(client, advert, signature):
                continue
            if sum_of.take_advert(client, advert):
                entries[client] = told.keys
        for client in sorted(sum_of.adverts):
            near = {j: entries[j] for j in sum_of.book(client)}
            await peer.send(PeerId(client), wire.Book(round, *wire.together(near)))
        heard = await self._gather(wire.Deal, round, sum_of.adverts, patience_s)
        for client, told in heard.items():
            pieces = wire.apart(told.peers, told.sealed, SEALED_BYTES)
            if pieces is not None:
                sum_of.take_shares(client, pieces)
        for client in sum_of.shared:
            dealt = wire.Dealt(round, *wire.together(sum_of.inbox(client)))
            await peer.send(PeerId(client), dealt)

    async def _collect(self, sum_of: MaskedHub, signed: SignedRound | None, round: int) -> Tensor:
        """Vectors up, questions down, shares up: the sum."""
        peer, program, masking = self.peer, self.program, self.program.masking
        heard = await self._gather(wire.Masked, round, sum_of.shared, masking.work_s)
        for client, told in heard.items():
            codes = wire.row_of(told.codes, program.entries, program.bits)
            if codes is not None:
                sum_of.take_vector(client, codes)
        if signed is None or not masking.agrees:
            for client in sorted(sum_of.summed):
                question = wire.Question(round, *sum_of.question(client))
                await peer.send(PeerId(client), question)
        else:
            agreed = await self._vouched(sum_of, signed)
            for client in sorted(sum_of.summed):
                sum_of.question(client)
                await peer.send(PeerId(client), agreed)
        answers = await self._gather(wire.Reveal, round, sum_of.summed, masking.phase_s)
        for client, told in answers.items():
            seeds = wire.apart(
                told.seeds, told.shares[: SHARE_BYTES * len(told.seeds)], SHARE_BYTES
            )
            keys = wire.apart(told.keys, told.shares[SHARE_BYTES * len(told.seeds) :], SHARE_BYTES)
            if seeds is not None and keys is not None:
                sum_of.take_reveal(client, seeds, keys)
        masks = sum_of.masks()
        return await peer.compute(
            add_masks, sum_of.total, static=(masks, program.bits, masking.cipher),
            cost=program.mask_cost(len(masks)), batch="never",
        )  # fmt: skip

    async def _vouched(self, sum_of: MaskedHub, signed: SignedRound) -> wire.Agreed:
        """The survivors down to the witnesses, as many signatures up as clients ask for."""
        graph, round = sum_of.graph, sum_of.round
        survivors = bitmap(graph.peers, sum_of.summed)
        witnesses = [peer for peer in graph.witnesses if peer in sum_of.summed]
        for witness in witnesses:
            await self.peer.send(PeerId(witness), wire.Standing(round, survivors))
        heard = await self._gather(wire.Vouched, round, witnesses, self.program.masking.phase_s)
        fine = {
            witness: told.signature
            for witness, told in heard.items()
            if signed.vouches(witness, survivors, told.signature)
        }
        if len(fine) < graph.threshold:
            raise PeerError(
                f"masked sum: {len(fine)} of {len(graph.witnesses)} witnesses signed the survivors "
                f"of round {round}; need {graph.threshold}"
            )
        first = sorted(fine)[: graph.threshold]
        signatures = b"".join(fine[witness] for witness in first)
        return wire.Agreed(round, survivors, bitmap(graph.witnesses, first), signatures)

    async def _gather(
        self, kind: type[M], round: int, clients: Collection[int], patience_s: float
    ) -> dict[int, M]:
        """One message of each, as far as they come in time."""
        if not clients:
            raise PeerError("masked sum: nobody is left")
        heard = await self.peer.gather(
            kind, tag=(round,), expect=[PeerId(client) for client in sorted(clients)],
            deadline=self.peer.now() + patience_s,
        )  # fmt: skip
        return {int(client): told for client, told in heard.items()}
