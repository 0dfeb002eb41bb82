"""Who a peer is: an Ed25519 key pair (RFC 8032), its file, and the name that follows from it.

A name is the SHA-256 of the public key as a multihash in lower-case base32, so whoever holds a name
can check a key against it, and nobody can choose the name of another.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_BYTES = 32
SIGNATURE_BYTES = 64
# Multihash: the code of SHA-256, the length of its digest.
_SHA_256 = b"\x12\x20"


@lru_cache(maxsize=1)
def _ed25519() -> Any:
    # Not at the top: the library takes longer to import than all the rest of this package.
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return ed25519


def peer_name(public: bytes) -> str:
    """The name of a public key of 32 bytes: 56 characters, the same in every process.

    >>> peer_name(Identity.from_seed(bytes(32)).public)[:12]
    'bciqbhhrzidt'
    """
    if len(public) != KEY_BYTES:
        raise UsageError(f"peer_name: a key of {len(public)} bytes; Ed25519 keys have {KEY_BYTES}")
    digest = _SHA_256 + hashlib.sha256(public).digest()
    return "b" + base64.b32encode(digest).decode().rstrip("=").lower()


def is_name(text: str) -> bool:
    """Whether `text` has the form of a peer's name.

    >>> is_name(peer_name(bytes(32))), is_name("alice")
    (True, False)
    """
    if len(text) != 56 or not text.startswith("b") or text != text.lower():
        return False
    try:
        return base64.b32decode(text[1:].upper() + "=").startswith(_SHA_256)
    except ValueError:
        return False


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the holder of the key pair signed exactly these bytes; False for broken input.

    >>> own = Identity.from_seed(bytes(32))
    >>> verify(own.public, b"yes", own.sign(b"yes")), verify(own.public, b"no", own.sign(b"yes"))
    (True, False)
    """
    from cryptography.exceptions import InvalidSignature

    try:
        _ed25519().Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Identity:
    """A peer's key pair. The seed is the secret; it is not shown and must not be sent.

    seed: the 32 secret bytes of RFC 8032. Equal seeds are the same peer.

    >>> Identity.from_seed(bytes(32)).public.hex()[:8]
    '3b6a27bc'
    """

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.seed) != KEY_BYTES:
            raise UsageError(f"Identity: a seed of {len(self.seed)} bytes; need {KEY_BYTES}")

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The key pair of 32 bytes that only its owner may know (simulations may derive them)."""
        return cls(bytes(seed))

    @classmethod
    def new(cls) -> Identity:
        """A fresh key pair from the operating system's randomness."""
        return cls(_ed25519().Ed25519PrivateKey.generate().private_bytes_raw())

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        return _ed25519().Ed25519PrivateKey.from_private_bytes(self.seed)

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes by which others know this peer."""
        return self._private.public_key().public_bytes_raw()

    @cached_property
    def name(self) -> str:
        """`peer_name(self.public)`."""
        return peer_name(self.public)

    def sign(self, data: bytes) -> bytes:
        """64 bytes that only this peer can make and that `verify` accepts for `data` only."""
        return self._private.sign(data)

    def __reduce__(self) -> tuple[Any, ...]:
        # The cached key objects cannot be pickled, and need not be.
        return Identity, (self.seed,)

    # Files.

    def save(self, path: str | Path) -> None:
        """Write the secret to a new file that only its owner can read (PEM, PKCS 8, mode 0600).

        A file that is there is never written over: UsageError.
        """
        from cryptography.hazmat.primitives import serialization

        data = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path = Path(path)
        try:
            self._write(path, data)
        except OSError as error:
            if isinstance(error, FileExistsError) and path.exists():
                raise UsageError(
                    f"key file {path}: it exists (load it, or remove it to become another peer)"
                ) from None
            raise UsageError(
                f"key file {path}: {error.strerror} (name another place, or free space)"
            ) from None

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written whole under another name first, so that a crash leaves no half a key. A link fails
        # if the name is taken, where a rename would replace the other key.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            os.unlink(temporary)

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read a file that `save` or `openssl genpkey -algorithm ed25519` wrote.

        Raises UsageError for a missing file, one that others than its owner can read or write, and
        one that holds no Ed25519 key.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization

        try:
            with Path(path).open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                data = file.read(1 << 16)
        except OSError as error:
            raise UsageError(f"key file {path}: {error.strerror} (make one first)") from None
        if mode & 0o077:
            raise UsageError(
                f"key file {path}: mode {mode:04o}, so others can read or write it (run `chmod 600 "
                f"{path}`; if a stranger may have read it, make a new key)"
            )
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise UsageError(
                f"key file {path}: no private key in PEM form without a password: {error}"
            ) from None
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"key file {path}: {type(key).__name__}; need an Ed25519 key")
        return cls(key.private_bytes_raw())

    @classmethod
    def load_or_new(cls, path: str | Path) -> Identity:
        """The identity of that file; a fresh one is made and saved if there is none."""
        if not Path(path).exists():
            identity = cls.new()
            identity.save(path)
            return identity
        return cls.load(path)
