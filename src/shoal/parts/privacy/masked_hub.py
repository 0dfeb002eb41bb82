"""The hub's side of a masked sum: it passes on, adds up, and opens nothing but the sum.

It hands out the neighbours' keys and sealed shares, adds the masked vectors that come, asks the
neighbours of everybody that shared for one secret each (of those whose vector came their own mask,
of the others the key of their masks with others), and takes off what is left in the sum.

Wrong shares are found: an opened secret must fit what its owner advertised. Up to
(shares - threshold) / 2 of them are corrected, and their holders named; whether a holder lies or
was dealt a wrong share by a peer that wants it named, nobody can tell. A peer whose shares fit
nothing is named, and the sum of that round is lost.

Bonawitz et al. 2017, figure 4; Bell et al. 2020, section 3 (doi 10.1145/3372297.3417885).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError, PeerError
from shoal.parts.privacy.mask_graph import MaskGraph
from shoal.parts.privacy.mask_stream import Mask
from shoal.parts.privacy.masked_peer import Advert, own_mask, pair_mask
from shoal.parts.privacy.prime_field import Elements
from shoal.parts.privacy.sealed_shares import (
    ELEMENTS,
    SEALED_BYTES,
    agreed,
    commitment,
    secret_of,
    share_of,
)
from shoal.parts.privacy.secret_sharing import Shamir
from shoal.parts.privacy.share_correction import corrected
from shoal.wire.noise import StaticKey

KEY_BYTES = 32


class MaskedHub:
    """One round. Each `take_*` says whether what came was as it must be; what is not is passed
    over, and so is whatever a peer says a second time.

    entries: of a vector; bits: sums are modulo 2^bits.
    """

    def __init__(self, graph: MaskGraph, round: int, entries: int, bits: int) -> None:
        self.graph, self.round, self.bits = graph, round, bits
        self.adverts: dict[int, Advert] = {}
        self._pieces: dict[int, dict[int, bytes]] = {}
        self._revealed: dict[tuple[int, str], dict[int, bytes]] = {}
        self._asked: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._total = np.zeros(entries, np.uint64)
        self.summed: set[int] = set()
        """Whose masked vectors are in the sum."""
        self.liars: set[int] = set()
        """Holders whose shares were wrong, as far as that was found out: they lie, or those whose
        secrets they are shares of dealt them wrong ones."""

    # Keys and shares.

    def take_advert(self, peer: int, advert: Advert) -> bool:
        fine = (
            peer in self.graph.peers
            and peer not in self.adverts
            and all(len(field) == KEY_BYTES for field in advert)
            # A key of low order gives the same secret with everybody.
            and all(agreed(_PROBE, key, "probe") is not None for key in (advert.mask, advert.seal))
        )
        if fine:
            self.adverts[peer] = advert
        return fine

    def book(self, peer: int) -> dict[int, Advert]:
        """What a peer's neighbours advertised."""
        return {j: self.adverts[j] for j in self.graph.neighbors(peer) if j in self.adverts}

    def take_shares(self, peer: int, pieces: Mapping[int, bytes]) -> bool:
        fine = (
            peer in self.adverts
            and peer not in self._pieces
            and set(pieces) == set(self.book(peer))
            and all(len(piece) == SEALED_BYTES for piece in pieces.values())
        )
        if fine:
            self._pieces[peer] = dict(pieces)
        return fine

    @property
    def shared(self) -> list[int]:
        """Who has shared its secrets, ascending."""
        return sorted(self._pieces)

    def inbox(self, peer: int) -> dict[int, bytes]:
        """What neighbours sealed for a peer."""
        near = self.graph.neighbors(peer)
        return {j: self._pieces[j][peer] for j in near if j in self._pieces}

    # The sum.

    def take_vector(self, peer: int, codes: Tensor) -> bool:
        """codes: int64 [entries], masked."""
        fine = (
            peer in self._pieces
            and peer not in self.summed
            and not self._asked
            and codes.shape == self._total.shape
        )
        if fine:
            self._total += codes.cpu().numpy().view(np.uint64)
            self.summed.add(peer)
        return fine

    @property
    def total(self) -> Tensor:
        """The masked sum so far, int64 [entries], modulo 2^bits."""
        return torch.from_numpy((self._total & np.uint64((1 << self.bits) - 1)).view(np.int64))

    def question(self, peer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(survivors, dropped) among a peer's neighbours that shared; the sum takes no more."""
        near = [j for j in self.graph.neighbors(peer) if j in self._pieces]
        asked = (
            tuple([j for j in near if j in self.summed]),
            tuple([j for j in near if j not in self.summed]),
        )
        self._asked[peer] = asked
        return asked

    def take_reveal(self, peer: int, seeds: Mapping[int, bytes], keys: Mapping[int, bytes]) -> bool:
        """Shares of some of those that were asked about; of two of a holder the first counts."""
        survivors, dropped = self._asked.get(peer, ((), ()))
        fine = peer in self.summed and set(seeds) <= set(survivors) and set(keys) <= set(dropped)
        if fine:
            for kind, shares in (("seed", seeds), ("key", keys)):
                for owner, share in shares.items():
                    self._revealed.setdefault((owner, kind), {}).setdefault(peer, share)
        return fine

    def masks(self) -> tuple[Mask, ...]:
        """What to add to `total` to get the sum of the vectors that came.

        PeerError, with names, when a secret cannot be opened.
        """
        out: list[Mask] = []
        for owner in sorted(self.summed):
            seed = self._open(owner, "seed")
            out.append((own_mask(seed), -1))
        for owner in self.shared:
            near = [j for j in self.graph.neighbors(owner) if j in self.summed]
            if owner in self.summed or not near:
                continue
            key = StaticKey(self._open(owner, "key"))
            for j in near:
                secret = pair_mask(key, self.adverts[j].mask, self.round, owner, j)
                assert secret is not None
                out.append((secret, -1 if j < owner else 1))
        return tuple(out)

    # Opening.

    def _open(self, owner: int, kind: str) -> bytes:
        """A secret from its shares; it must fit what its owner advertised."""
        advert, near = self.adverts[owner], self.graph.neighbors(owner)

        def fits(secret: bytes | None) -> bool:
            if secret is None:
                return False
            if kind == "seed":
                return commitment(secret) == advert.commitment
            return StaticKey(secret).public == advert.mask

        shares: dict[int, Elements] = {}
        for holder, data in self._revealed.get((owner, kind), {}).items():
            try:
                shares[near.index(holder)] = share_of(data)
            except DecodeError:
                self.liars.add(holder)
        needed = self.graph.threshold
        if len(shares) < needed:
            raise PeerError(
                f"masked sum: {len(shares)} shares of the {kind} of peer {owner}; need {needed}"
            )
        places = sorted(shares)
        some = places[:needed]
        scheme = Shamir(len(near), needed - 1)
        found = scheme.reconstruct(np.stack([shares[place] for place in some]), some)
        secret = secret_of(found)
        if not fits(secret):
            secret, wrong = _corrected(shares, places, needed - 1)
            if not fits(secret):
                raise PeerError(
                    f"masked sum: the {len(shares)} shares of the {kind} of peer {owner} do not "
                    "open what it advertised (it dealt wrong ones, or too many holders lie)"
                )
            self.liars |= {near[place] for place in wrong}
        assert secret is not None
        return secret


def _corrected(
    shares: Mapping[int, Elements], places: list[int], degree: int
) -> tuple[bytes | None, set[int]]:
    """The secret on which most shares agree, and places of the others."""
    points, numbers, wrong = [place + 1 for place in places], [], set[int]()
    for element in range(ELEMENTS):
        found = corrected(points, [int(shares[place][element]) for place in places], degree)
        if found is None:
            return None, wrong
        numbers.append(found.secret)
        wrong |= {places[i] for i in found.wrong}
    return secret_of(np.array(numbers, np.uint64)), wrong


_PROBE = StaticKey(bytes(range(1, 33)))
"""Any key: it shows which public keys are of low order."""
