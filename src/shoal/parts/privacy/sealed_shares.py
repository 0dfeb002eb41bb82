"""Keys that two peers agree on, and shares of secrets that only their holder can read.

Keys are X25519 and live for one round, so that each derived key seals one message and makes one
mask. What is derived for a purpose says so, and is bound to both public keys; what is sealed is
bound to sender, receiver and round.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.base.errors import DecodeError, HandshakeError
from shoal.parts.privacy.mask_stream import SECRET_BYTES, stream
from shoal.parts.privacy.prime_field import PRIME, Elements
from shoal.wire.noise import TAG_BYTES, StaticKey

CHUNK_BYTES = 7
ELEMENTS = -(-SECRET_BYTES // CHUNK_BYTES)
"""Elements of the field that hold a secret, 7 bytes each."""

SHARE_BYTES = 8 * ELEMENTS
"""A holder's share of one secret."""

SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
"""A holder's shares of a peer's two secrets, sealed."""


def derived(secret: bytes, purpose: str) -> bytes:
    """32 bytes that tell nothing of the secret, nor of those for another purpose."""
    return hashlib.blake2b(purpose.encode(), key=secret, digest_size=SECRET_BYTES).digest()


def commitment(secret: bytes) -> bytes:
    """What a secret of 32 random bytes is checked against once it is open."""
    return hashlib.sha256(b"shoal commitment" + secret).digest()


def agreed(own: StaticKey, other: bytes, purpose: str) -> bytes | None:
    """32 bytes that the owners of both keys know and nobody else; None for a key of low order."""
    try:
        shared = own.shared(other)
    except (HandshakeError, ValueError):
        return None
    low, high = sorted((own.public, other))
    label = purpose.encode()
    return hashlib.blake2b(label + low + high, key=shared, digest_size=SECRET_BYTES).digest()


def elements_of(secret: bytes) -> Elements:
    """A secret of 32 bytes as elements of the field, uint64 [5]."""
    pieces = [secret[i : i + CHUNK_BYTES] for i in range(0, len(secret), CHUNK_BYTES)]
    return np.array([int.from_bytes(piece, "little") for piece in pieces], np.uint64)


def secret_of(elements: Elements) -> bytes | None:
    """Inverse of `elements_of`; None where no secret makes these.

    >>> secret_of(elements_of(bytes(range(32)))) == bytes(range(32))
    True
    """
    sizes = [CHUNK_BYTES] * (ELEMENTS - 1) + [SECRET_BYTES - CHUNK_BYTES * (ELEMENTS - 1)]
    numbers = [int(number) for number in elements]
    if any(number >> (8 * size) for number, size in zip(numbers, sizes, strict=True)):
        return None
    pairs = zip(numbers, sizes, strict=True)
    return b"".join(number.to_bytes(size, "little") for number, size in pairs)


def uniform_elements(secret: bytes, count: int) -> Elements:
    """`count` uniform elements of the field from 32 secret bytes."""
    drawn = np.frombuffer(stream(secret, 8 * (count + 8)), "<u8") >> np.uint64(3)
    # PRIME itself, once in 2^61, is no element; that it comes nine times is out of the question.
    return drawn[drawn < PRIME][:count].astype(np.uint64)


def share_bytes(share: Elements) -> bytes:
    """A holder's elements as bytes."""
    return share.astype("<u8").tobytes()


def share_of(data: bytes) -> Elements:
    """Inverse of `share_bytes` for one secret; DecodeError for a wrong length, or what is no
    element of the field."""
    if len(data) != SHARE_BYTES:
        raise DecodeError(f"share: {len(data)} bytes; need {SHARE_BYTES}")
    share = np.frombuffer(data, "<u8").astype(np.uint64)
    if (share >= PRIME).any():
        raise DecodeError(f"share: {int(share.max())} is no element (need less than {PRIME})")
    return share


@dataclass(frozen=True)
class Seal:
    """How one peer seals shares for another. key: as agreed for sealing; no key seals twice."""

    key: bytes
    round: int
    sender: int
    receiver: int

    def seal(self, shares: bytes) -> bytes:
        """`SEALED_BYTES` bytes."""
        return self._aead().encrypt(bytes(12), shares, self._context())

    def open(self, sealed: bytes) -> bytes:
        """What was sealed; DecodeError for anything else."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead().decrypt(bytes(12), sealed, self._context())
        except InvalidTag:
            raise DecodeError(
                f"shares of peer {self.sender} for {self.receiver}: not what it sealed"
            ) from None

    def _aead(self) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        # Both directions agree on one key; each seals with its own.
        return ChaCha20Poly1305(derived(self.key, f"from {self.sender} to {self.receiver}"))

    def _context(self) -> bytes:
        return b"".join(n.to_bytes(8, "little") for n in (self.round, self.sender, self.receiver))
