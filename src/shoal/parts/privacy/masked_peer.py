"""One peer's side of a masked sum: what it sends, and what it refuses to say.

    advert   its public keys, and a commitment to its own mask
    shares   its two secrets (its own mask, its key for masks with others), shared among neighbours
    masks    what it adds to its vector: its own mask, and one for each neighbour that shared
    reveal   of neighbours that are there a share of their own masks, of those that are gone a share
             of their keys; of nobody both

Nothing here waits or sends; a program carries it (see `secure_rounds`), a bench calls it.

Bonawitz et al. 2017, figure 4; Bell et al. 2020, section 3 (doi 10.1145/3372297.3417885).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shoal.base.errors import DecodeError, PeerError, UsageError
from shoal.parts.privacy.mask_stream import SECRET_BYTES, Mask
from shoal.parts.privacy.sealed_shares import (
    ELEMENTS,
    SHARE_BYTES,
    Seal,
    agreed,
    commitment,
    derived,
    elements_of,
    share_bytes,
    share_of,
    uniform_elements,
)
from shoal.parts.privacy.secret_sharing import Shamir
from shoal.wire.noise import StaticKey


class Advert(NamedTuple):
    """A peer's public keys for masks and for sealing, and the commitment to its own mask."""

    mask: bytes
    seal: bytes
    commitment: bytes


def pair_mask(own: StaticKey, other: bytes, round: int, a: int, b: int) -> bytes | None:
    """The secret from which both peers of a pair, a and b, make the same mask.

    It is bound to who they are: otherwise whoever repeats the public key of another has that one's
    masks with everybody, which cancel where one is added and the other subtracted.
    """
    return agreed(own, other, f"mask {round} of {min(a, b)} and {max(a, b)}")


def own_mask(seed: bytes) -> bytes:
    """The secret of a peer's own mask from what its shares open."""
    return derived(seed, "own mask")


class MaskedPeer:
    """A peer in one round. secret: 32 bytes that nobody else knows and that serve this round only.

    neighbors: from the round's `MaskGraph`; threshold: how many of them open a secret.
    Raises PeerError where going on would tell more than a sum.
    """

    def __init__(
        self, me: int, neighbors: Sequence[int], threshold: int, round: int, secret: bytes
    ) -> None:
        if me in neighbors or not 2 <= threshold <= len(neighbors) or len(secret) != SECRET_BYTES:
            raise UsageError(
                f"MaskedPeer: peer {me} of neighbours {tuple(neighbors)} with threshold "
                f"{threshold} and a secret of {len(secret)} bytes; need others, a threshold from 2 "
                f"to their number and {SECRET_BYTES} bytes"
            )
        self.me, self.neighbors, self.threshold, self.round = me, tuple(neighbors), threshold, round
        self._key_secret = derived(secret, "key for masks")
        self._seed = derived(secret, "seed of the own mask")
        self._coefficients = derived(secret, "coefficients of shares")
        self._mask_key = StaticKey(self._key_secret)
        self._seal_key = StaticKey(derived(secret, "key for sealing"))
        self._book: dict[int, Advert] = {}
        self._held: dict[int, tuple[bytes, bytes]] | None = None
        self._there: frozenset[int] = frozenset()
        self._given: dict[int, str] = {}
        self._agreed: dict[bytes, bytes] = {}
        self.bad: tuple[int, ...] = ()
        """Neighbours whose shares were not what they must be."""

    @property
    def there(self) -> frozenset[int]:
        """Neighbours that shared, as far as this peer was shown: with whom it has masks."""
        return self._there

    @property
    def advert(self) -> Advert:
        """What the hub passes on to the neighbours."""
        return Advert(self._mask_key.public, self._seal_key.public, commitment(self._seed))

    def shares(self, book: Mapping[int, Advert]) -> dict[int, bytes]:
        """For each neighbour in the book its sealed shares of both secrets."""
        self._among("the book", book, self.neighbors)
        secrets = np.concatenate((elements_of(self._seed), elements_of(self._key_secret)))
        scheme = Shamir(len(self.neighbors), self.threshold - 1)
        drawn = uniform_elements(self._coefficients, (self.threshold - 1) * 2 * ELEMENTS)
        rows = scheme.spread(secrets, drawn)
        out: dict[int, bytes] = {}
        for place, other in enumerate(self.neighbors):
            if other in book:
                out[other] = self._seal(book[other], self.me, other).seal(share_bytes(rows[place]))
        self._book = dict(book)
        return out

    def masks(self, inbox: Mapping[int, bytes]) -> tuple[Mask, ...]:
        """What to add to the vector, given the sealed shares of neighbours (all that shared).

        What cannot be opened counts as no share; the mask with its sender is added all the same,
        as it adds the one with this peer.
        """
        if self._held is not None:
            raise PeerError(f"peer {self.me}: shares of round {self.round} came a second time")
        self._among("the inbox", inbox, self._book)
        held, bad = {}, []
        masks: list[Mask] = [(own_mask(self._seed), 1)]
        for other in sorted(inbox):
            try:
                opened = self._seal(self._book[other], other, self.me).open(inbox[other])
                share_of(opened[:SHARE_BYTES])
                share_of(opened[SHARE_BYTES:])
                held[other] = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
            except DecodeError:
                bad.append(other)
            secret = pair_mask(self._mask_key, self._book[other].mask, self.round, self.me, other)
            if secret is None:
                raise PeerError(f"peer {self.me}: the key of peer {other} is of low order")
            masks.append((secret, 1 if self.me < other else -1))
        self._held, self._there, self.bad = held, frozenset(inbox), tuple(bad)
        return tuple(masks)

    def reveal(
        self, survivors: Sequence[int], dropped: Sequence[int]
    ) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """(shares of the survivors' own masks, shares of the dropped ones' keys).

        Refused, with PeerError: of a peer both kinds, now or in two questions; of who did not
        share; fewer survivors than the threshold.
        """
        asked = [*survivors, *dropped]
        if self._held is None:
            raise PeerError(f"peer {self.me}: asked to reveal before it masked anything")
        if len(set(asked)) != len(asked):
            twice = sorted({peer for peer in asked if asked.count(peer) > 1})
            raise PeerError(
                f"peer {self.me}: asked twice about peers {twice}; with both kinds of shares a "
                "vector could be unmasked by itself"
            )
        self._among("the question", survivors, self._there)
        if not set(dropped) <= self._there:
            raise PeerError(f"peer {self.me}: asked about strangers, {sorted(dropped)}")
        for kind, peers in (("seed", survivors), ("key", dropped)):
            for peer in peers:
                if self._given.get(peer, kind) != kind:
                    raise PeerError(
                        f"peer {self.me}: asked for the {kind} of peer {peer} after its "
                        f"{self._given[peer]}; both would unmask its vector"
                    )
        self._given |= dict.fromkeys(survivors, "seed") | dict.fromkeys(dropped, "key")
        held = self._held
        return (
            {peer: held[peer][0] for peer in survivors if peer in held},
            {peer: held[peer][1] for peer in dropped if peer in held},
        )

    def _seal(self, other: Advert, sender: int, receiver: int) -> Seal:
        key = self._agreed.get(other.seal)
        if key is None:
            key = agreed(self._seal_key, other.seal, f"shares {self.round}")
        if key is None:
            raise PeerError(f"peer {self.me}: a key of {sender} or {receiver} is of low order")
        self._agreed[other.seal] = key
        return Seal(key, self.round, sender, receiver)

    def _among(self, what: str, peers: Collection[int], known: Iterable[int]) -> None:
        strangers = sorted(set(peers) - set(known))
        if strangers or len(peers) < self.threshold:
            raise PeerError(
                f"peer {self.me}: {what} of round {self.round} has {len(peers)} peers, strangers "
                f"{strangers}; need {self.threshold} or more, neighbours that shared"
            )
