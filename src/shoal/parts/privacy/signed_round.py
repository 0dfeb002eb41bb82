"""Who said what in a round of masked sums: keys signed by identities, one set of survivors for all.

Masks hide vectors from a hub that looks. One that lies has three ways around them:

- It puts keys of its own in place of the clients', and so knows their masks. Every client signs
  its keys with its Ed25519 identity, for one session, round and peer, and checks those of its
  neighbours against a roster that it had before.
- It tells clients of different survivors, so that each names enough of them, and opens the sum of
  fewer than that. So the `witnesses` of the round, as many as anybody has neighbours and
  drawn by key, sign the set that they were shown, and no other; a client answers for the set that
  `threshold` of them signed, if it is in it itself. As 2 threshold > degree + corrupt, there are no
  two such sets.
- It sends clients different parameters, such that all gradients but one vanish. The witnesses sign
  what they were sent, too.

What is left to it: see `mask_graph`. The roster must come from where the hub cannot change it, and
a session must not come twice: a key of an earlier one may have been opened.

Bonawitz et al. 2017, section 6 and figure 4, where everybody signs; Bell et al. 2020, section 4.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from shoal.base.errors import PeerError, UsageError
from shoal.parts.privacy.mask_graph import MaskGraph
from shoal.parts.privacy.masked_peer import Advert
from shoal.wire.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, verify
from shoal.wire.tensors import describe, raw

ROSTER_FILE = "roster.txt"
KeyOf = Callable[[int], bytes | None]
"""The public key of a peer, None when it is unknown."""

_KEYS, _SET = b"shoal masked keys", b"shoal masked set"


@dataclass(frozen=True)
class Roster:
    """Who is who in a run. session: 32 bytes that no other run with these identities has; key_of:
    the public key of each peer; identity_of: the key pair of a peer that runs here.

    >>> roster = Roster.of_run(seed=7)
    >>> roster.key_of(3) == roster.identity_of(3).public
    True
    """

    session: bytes
    key_of: KeyOf
    identity_of: Callable[[int], Identity]

    @classmethod
    def of_run(cls, seed: int, session: str = "") -> Roster:
        """Everybody's key pair follows from the seed: for runs that can be repeated. Whoever knows
        the seed can sign for everybody."""
        key_of, identity_of = partial(_public_of_run, seed), partial(_identity_of_run, seed)
        return cls(_session(seed, session), key_of, identity_of)

    @classmethod
    def of_folder(cls, folder: str | Path, peers: int, seed: int, session: str = "") -> Roster:
        """Public keys from the file roster.txt, 64 hexadecimal digits a line in the order of peers;
        the own key pair from peer-N.key (`shoal.wire.identity`). UsageError for anything else."""
        path = Path(folder) / ROSTER_FILE
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"roster {path}: {error} (see Roster.of_folder)") from None
        texts = [text for line in lines if (text := line.partition("#")[0].strip())]
        keys = []
        for place, text in enumerate(texts):
            try:
                key = bytes.fromhex(text)
            except ValueError:
                key = b""
            if len(key) != KEY_BYTES or key in keys:
                raise UsageError(
                    f"roster {path}: {text[:70]!r} for peer {place}; need a public key of "
                    f"{2 * KEY_BYTES} hexadecimal digits that no other peer has"
                )
            keys.append(key)
        if len(keys) < peers:
            raise UsageError(
                f"roster {path}: {len(keys)} keys for {peers} peers; need one a line for each"
            )
        known = tuple(keys)
        key_of, identity_of = partial(_listed, known), partial(_loaded, str(folder), known)
        return cls(_session(seed, session), key_of, identity_of)

    @staticmethod
    def write(folder: str | Path, peers: int) -> None:
        """A roster of peers that all run on this machine; key files that are there are kept."""
        folder = Path(folder)
        found = [Identity.load_or_new(folder / f"peer-{peer}.key") for peer in range(peers)]
        lines = [f"{identity.public.hex()}  # peer {peer}" for peer, identity in enumerate(found)]
        (folder / ROSTER_FILE).write_text("\n".join([*lines, ""]), encoding="utf-8")


# Functions of the module, so that a roster can go to other processes.


@lru_cache(maxsize=1 << 14)
def _identity_of_run(seed: int, peer: int) -> Identity:
    text = f"shoal masked identity {seed} {peer}"
    return Identity.from_seed(hashlib.sha256(text.encode()).digest())


def _public_of_run(seed: int, peer: int) -> bytes:
    return _identity_of_run(seed, peer).public


def _listed(keys: tuple[bytes, ...], peer: int) -> bytes | None:
    return keys[peer] if 0 <= peer < len(keys) else None


def _loaded(folder: str, keys: tuple[bytes, ...], peer: int) -> Identity:
    own = Path(folder) / f"peer-{peer}.key"
    found = Identity.load(own)
    if found.public != keys[peer]:
        raise UsageError(
            f"key file {own}: its public key {found.public.hex()} is not what {ROSTER_FILE} says "
            f"of peer {peer} (put it there, at everybody's)"
        )
    return found


def _session(seed: int, session: str) -> bytes:
    return hashlib.sha256(f"shoal masked session {seed} {session}".encode()).digest()


def told(params: Tensor, extra: Mapping[str, Tensor]) -> bytes:
    """32 bytes that stand for what the hub sent to begin with."""
    digest = hashlib.sha256()
    for name, value in [("", params), *sorted(extra.items())]:
        (size, form), word = describe(value), name.encode()
        digest.update(struct.pack(">qqq", len(word), len(form), size) + word + form)
        digest.update(raw(value))
    return digest.digest()


def bitmap(peers: Sequence[int], chosen: Collection[int]) -> bytes:
    """Some of the peers, a bit for each in their order.

    >>> bitmap((2, 3, 5, 7), {3, 7}).hex(), chosen_of((2, 3, 5, 7), bytes([10]))
    ('0a', (3, 7))
    """
    flags = np.array([peer in chosen for peer in peers], np.uint8)
    return np.packbits(flags, bitorder="little").tobytes()


def chosen_of(peers: Sequence[int], data: bytes) -> tuple[int, ...] | None:
    """Inverse of `bitmap`; None for a wrong length, or bits of nobody."""
    if len(data) != -(-len(peers) // 8):
        return None
    flags = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if flags[len(peers) :].any():
        return None
    return tuple(peer for peer, flag in zip(peers, flags.tolist(), strict=False) if flag)


class SignedRound:
    """What one peer signs in a round, and what it accepts of others.

    told: as of `told`, by what this peer sent or was sent. Raises PeerError where the hub lies.
    """

    def __init__(self, roster: Roster, graph: MaskGraph, round: int, me: int, told: bytes) -> None:
        self.roster, self.graph, self.round, self.me, self.told = roster, graph, round, me, told
        self._vouched: bytes | None = None

    # Keys.

    def sign_keys(self, advert: Advert) -> bytes:
        """What goes with the own keys."""
        return self.roster.identity_of(self.me).sign(self._keys(self.me, advert))

    def keys_hold(self, peer: int, advert: Advert, signature: bytes) -> bool:
        """Whether a peer advertised this, in this round of this run."""
        return self._signed(peer, self._keys(peer, advert), signature)

    def check_keys(self, book: Mapping[int, Advert], signatures: Mapping[int, bytes]) -> None:
        """Everybody in the book signed its keys; the own key is the one that the roster has."""
        for peer in sorted(book):
            if not self.keys_hold(peer, book[peer], signatures[peer]):
                raise PeerError(
                    f"peer {self.me}: the keys that the hub passed on for peer {peer} are not what "
                    f"it signed for round {self.round} (swapped, of another round, or of a peer "
                    "that is not in the roster)"
                )

    def _keys(self, peer: int, advert: Advert) -> bytes:
        place = struct.pack(">qq", self.round, peer)
        return _KEYS + self.roster.session + place + b"".join(advert)

    # Survivors.

    def vouch(self, survivors: bytes) -> bytes:
        """A witness's signature, once a round. survivors: a bitmap of the graph's peers."""
        self._there(survivors)
        if self.me not in self.graph.witnesses:
            raise PeerError(f"peer {self.me}: asked to vouch, and is no witness of {self.round}")
        if self._vouched not in (None, survivors):
            raise PeerError(self._second())
        self._vouched = survivors
        return self.roster.identity_of(self.me).sign(self._set(survivors))

    def vouches(self, witness: int, survivors: bytes, signature: bytes) -> bool:
        """Whether a witness signed this set, and what this peer was told."""
        return self._signed(witness, self._set(survivors), signature)

    def agreed(self, survivors: bytes, witnesses: bytes, signatures: bytes) -> frozenset[int]:
        """The survivors, if enough witnesses signed them. witnesses: a bitmap of the graph's;
        signatures: of these, one after the other."""
        there = self._there(survivors)
        if self._vouched not in (None, survivors):
            raise PeerError(self._second())
        signers = chosen_of(self.graph.witnesses, witnesses) or ()
        needed = self.graph.threshold
        if len(signers) < needed or len(signatures) != SIGNATURE_BYTES * len(signers):
            raise PeerError(
                f"peer {self.me}: {len(signers)} witnesses and {len(signatures)} bytes of "
                f"signatures for the survivors of round {self.round}; need {needed} witnesses and "
                f"{SIGNATURE_BYTES} bytes of each"
            )
        for place, witness in enumerate(signers):
            start = SIGNATURE_BYTES * place
            if not self.vouches(witness, survivors, signatures[start : start + SIGNATURE_BYTES]):
                raise PeerError(
                    f"peer {self.me}: witness {witness} did not sign these survivors of round "
                    f"{self.round} together with the parameters that this peer was sent (the hub "
                    "tells clients different things)"
                )
        return there

    def _there(self, survivors: bytes) -> frozenset[int]:
        there = chosen_of(self.graph.peers, survivors)
        if there is None or self.me not in there:
            raise PeerError(
                f"peer {self.me}: the survivors of round {self.round} are "
                + ("malformed" if there is None else "without this peer, which sent its vector")
            )
        return frozenset(there)

    def _second(self) -> str:
        return (
            f"peer {self.me}: shown a second set of survivors of round {self.round}; it vouched "
            "for another (the hub tells clients different things)"
        )

    def _set(self, survivors: bytes) -> bytes:
        place = struct.pack(">q", self.round)
        return _SET + self.roster.session + place + self.told + survivors

    def _signed(self, peer: int, text: bytes, signature: bytes) -> bool:
        key = self.roster.key_of(peer)
        return key is not None and verify(key, text, signature)
