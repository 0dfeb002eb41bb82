"""A whole masked sum in one place, with peers that drop out where they are told to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.privacy.mask_graph import MaskGraph
from shoal.parts.privacy.mask_stream import Cipher, add_masks
from shoal.parts.privacy.masked_hub import MaskedHub
from shoal.parts.privacy.masked_peer import MaskedPeer
from shoal.parts.privacy.sealed_shares import derived

PHASES = ("advertise", "share", "vector", "reveal")
"""What a peer says, in this order; who drops out in a phase says nothing from there on."""


@dataclass(frozen=True)
class Summed:
    """total int64 [entries], modulo 2^bits; peers: whose vectors are in it; views: what the hub got
    of each, int64 [entries]."""

    total: Tensor
    peers: tuple[int, ...]
    views: Mapping[int, Tensor]


@dataclass(frozen=True)
class MaskedSum:
    """The protocol of `masked_peer` and `masked_hub` without messages.

    secret: 32 bytes from which each peer's secrets are made, so that a sum can be repeated; among
    peers that must not trust each other each has its own.

    >>> import torch
    >>> graph = MaskGraph(tuple(range(5)), degree=4, threshold=3, key=(1,))
    >>> summed = MaskedSum(graph, bits=16)(torch.arange(10).reshape(5, 2), gone={3: "vector"})
    >>> summed.total.tolist(), summed.peers
    ([14, 18], (0, 1, 2, 4))
    """

    graph: MaskGraph
    bits: int
    cipher: Cipher = "aes"
    round: int = 0
    secret: bytes = bytes(32)

    def peer(self, me: int) -> MaskedPeer:
        """A peer at its beginning."""
        graph, secret = self.graph, derived(self.secret, f"peer {me}, round {self.round}")
        return MaskedPeer(me, graph.neighbors(me), graph.threshold, self.round, secret)

    def __call__(self, codes: Tensor, gone: Mapping[int, str] | None = None) -> Summed:
        """codes: int64 [peers, entries] in the order of the graph's peers; gone: peer -> phase.

        PeerError when too many are gone to open the sum.
        """
        graph, gone = self.graph, gone or {}
        if codes.shape[0] != len(graph.peers) or not set(gone.values()) <= set(PHASES):
            raise UsageError(
                f"MaskedSum: {codes.shape[0]} vectors for {len(graph.peers)} peers, gone in "
                f"{sorted(set(gone.values()))}; need one for each, and phases of {PHASES}"
            )
        until = {peer: PHASES.index(phase) for peer, phase in gone.items()}

        def there(phase: int) -> list[int]:
            return [peer for peer in graph.peers if until.get(peer, len(PHASES)) > phase]

        hub = MaskedHub(graph, self.round, codes.shape[1], self.bits)
        peers = {me: self.peer(me) for me in graph.peers}
        for me in there(0):
            hub.take_advert(me, peers[me].advert)
        for me in there(1):
            hub.take_shares(me, peers[me].shares(hub.book(me)))
        rows, views = dict(zip(graph.peers, codes, strict=True)), {}
        for me in there(2):
            masks = peers[me].masks(hub.inbox(me))
            views[me] = add_masks(rows[me], masks, self.bits, self.cipher)
            hub.take_vector(me, views[me])
        for me in there(3):
            hub.take_reveal(me, *peers[me].reveal(*hub.question(me)))
        total = add_masks(hub.total, hub.masks(), self.bits, self.cipher)
        return Summed(total, tuple(sorted(hub.summed)), views)


def gone_by_key(peers: int, part: float, seed: int) -> dict[int, str]:
    """A part of the peers 0 to peers - 1, drawn by key, that drops out in all phases in turn."""
    order = sorted(range(peers), key=lambda peer: keyed.uniform(seed, "gone", peer))
    chosen = order[: round(part * peers)]
    return {peer: PHASES[place % len(PHASES)] for place, peer in enumerate(chosen)}
