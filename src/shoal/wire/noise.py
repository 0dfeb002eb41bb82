"""The Noise handshake XX on bytes in memory: who speaks is proved, what is said is secret.

    -> e
    <- e, ee, s, es
    -> s, se

Both sides prove that they hold their static key and share two fresh keys afterwards; recorded
traffic stays secret if the static keys are stolen later. Names and steps are those of the Noise
Protocol Framework, revision 34 (Perrin 2018), sections 4, 5 and 7.5; DH is X25519, the hash
SHA-256, the cipher AES-256-GCM or ChaCha20-Poly1305.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from shoal.base.errors import HandshakeError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

Cipher = Literal["AESGCM", "ChaChaPoly"]
Buffer = bytes | bytearray | memoryview

KEY_BYTES = 32
TAG_BYTES = 16
_EMPTY = b""
# The counter is big-endian for AES-GCM and little-endian for ChaCha20-Poly1305 (12.3, 12.4).
_NONCES = {"AESGCM": struct.Struct(">IQ"), "ChaChaPoly": struct.Struct("<IQ")}
_LAST_NONCE = (1 << 64) - 1


@lru_cache(maxsize=1)
def _aeads() -> dict[str, Any]:
    # Not at the top: the library takes longer to import than all the rest of this package.
    from cryptography.hazmat.primitives.ciphers import aead

    return {"AESGCM": aead.AESGCM, "ChaChaPoly": aead.ChaCha20Poly1305}


@lru_cache(maxsize=1)
def _x25519() -> Any:
    from cryptography.hazmat.primitives.asymmetric import x25519

    return x25519


@lru_cache(maxsize=1)
def _invalid_tag() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag


class Unauthentic(Exception):
    """A ciphertext's tag does not fit; whoever decrypts says what that means."""


class CipherState:
    """A key and a counter that never repeats under it (Noise, section 5.1).

    `rekey_every` messages the key is replaced by one that follows from it, on both sides at the
    same count, so that a key seals a bounded number of bytes (0: never).
    """

    __slots__ = ("_aead", "_cipher", "_key", "_pack", "_rekey_every", "count")

    def __init__(self, cipher: Cipher, key: bytes, rekey_every: int = 0) -> None:
        self._cipher = cipher
        self._key = key
        self._pack = _NONCES[cipher].pack
        self._rekey_every = rekey_every
        self._aead = _aeads()[cipher](key)
        self.count = 0

    def encrypt(self, plaintext: Buffer, associated: bytes = _EMPTY) -> bytes:
        sealed = self._aead.encrypt(self._pack(0, self.count), plaintext, associated)
        self._advance()
        return sealed

    def decrypt(self, ciphertext: Buffer, associated: bytes = _EMPTY) -> bytes:
        """Raises Unauthentic and is then unchanged."""
        if len(ciphertext) < TAG_BYTES:
            raise Unauthentic
        try:
            opened = self._aead.decrypt(self._pack(0, self.count), ciphertext, associated)
        except _invalid_tag():
            raise Unauthentic from None
        self._advance()
        return opened

    def encrypt_into(self, plaintext: Buffer, place: memoryview) -> None:
        """As `encrypt`, into a place of 16 bytes more than the plaintext."""
        self._aead.encrypt_into(self._pack(0, self.count), plaintext, None, place)
        self._advance()

    def decrypt_into(self, ciphertext: Buffer, place: memoryview) -> None:
        """As `decrypt`, into a place of 16 bytes less than the ciphertext; what stands in the place
        after an error is of no use."""
        try:
            self._aead.decrypt_into(self._pack(0, self.count), ciphertext, None, place)
        except _invalid_tag():
            raise Unauthentic from None
        self._advance()

    def _advance(self) -> None:
        self.count += 1
        if self._rekey_every and self.count % self._rekey_every == 0:
            self._rekey()

    def _rekey(self) -> None:
        # Noise, section 4.2: the default REKEY.
        nonce = self._pack(0, _LAST_NONCE)
        self._key = self._aead.encrypt(nonce, bytes(KEY_BYTES), _EMPTY)[:KEY_BYTES]
        self._aead = _aeads()[self._cipher](self._key)


class StaticKey:
    """An X25519 key pair, fresh unless its 32 secret bytes are given.

    >>> len(StaticKey().public)
    32
    """

    __slots__ = ("_private", "public")

    def __init__(self, secret: bytes | None = None) -> None:
        x25519 = _x25519()
        self._private: X25519PrivateKey = (
            x25519.X25519PrivateKey.generate()
            if secret is None
            else x25519.X25519PrivateKey.from_private_bytes(secret)
        )
        self.public = self._private.public_key().public_bytes_raw()

    def shared(self, public: bytes) -> bytes:
        """The 32 bytes that both key pairs give; HandshakeError for a key of low order."""
        try:
            return self._private.exchange(_x25519().X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise HandshakeError("malformed", "a public key of low order") from None


class _Symmetric:
    """Section 5.2: what both sides have hashed and mixed so far."""

    __slots__ = ("_chaining", "_cipher", "_state", "hash")

    def __init__(self, cipher: Cipher, prologue: bytes) -> None:
        name = f"Noise_XX_25519_{cipher}_SHA256".encode()
        self.hash = name.ljust(32, b"\0") if len(name) <= 32 else hashlib.sha256(name).digest()
        self._chaining = self.hash
        self._cipher: Cipher = cipher
        self._state: CipherState | None = None
        self.mix_hash(prologue)

    def mix_hash(self, data: Buffer) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self._chaining, key = _hkdf(self._chaining, material)
        self._state = CipherState(self._cipher, key)

    def seal(self, plaintext: bytes) -> bytes:
        if self._state is not None:
            plaintext = self._state.encrypt(plaintext, self.hash)
        self.mix_hash(plaintext)
        return plaintext

    def open(self, ciphertext: bytes) -> bytes:
        opened = ciphertext
        if self._state is not None:
            opened = self._state.decrypt(ciphertext, self.hash)
        self.mix_hash(ciphertext)
        return opened

    def split(self, rekey_every: int) -> tuple[CipherState, CipherState]:
        first, second = _hkdf(self._chaining, b"")
        return (
            CipherState(self._cipher, first, rekey_every),
            CipherState(self._cipher, second, rekey_every),
        )


class NoiseXX:
    """One side of one handshake; `write` and `read` alternate, three messages in all.

    After the third, `split()` gives the keys and `hash` stands for everything that was said. `read`
    raises HandshakeError; the handshake is then of no more use.

    static: the key pair that the other side will see. ephemeral: for test vectors only; a second
    use of the same one gives the secrets away.

    >>> one, two = (NoiseXX(first, StaticKey(), "AESGCM") for first in (True, False))
    >>> two.read(one.write(b"")), one.read(two.write(b"hi")), two.read(one.write(b"ho"))
    (b'', b'hi', b'ho')
    >>> one.hash == two.hash
    True
    """

    def __init__(self, initiator: bool, static: StaticKey, cipher: Cipher,
                 prologue: bytes = b"", ephemeral: StaticKey | None = None) -> None:  # fmt: skip
        self.initiator = initiator
        self.remote_static = b""
        self._symmetric = _Symmetric(cipher, prologue)
        self._static = static
        self._ephemeral = ephemeral or StaticKey()
        self._remote_ephemeral = b""
        self._step = 0

    @property
    def finished(self) -> bool:
        return self._step == 3

    @property
    def hash(self) -> bytes:
        """32 bytes that are equal on both sides only if all that was said was heard."""
        return self._symmetric.hash

    def write(self, payload: bytes) -> bytes:
        """The next message; its payload is secret from the second message on."""
        self._turn(writes=True)
        symmetric, ephemeral = self._symmetric, self._ephemeral
        message = b""
        if self._step < 2:
            message = ephemeral.public
            symmetric.mix_hash(message)
        if self._step == 1:
            symmetric.mix_key(ephemeral.shared(self._remote_ephemeral))
            message += symmetric.seal(self._static.public)
            symmetric.mix_key(self._static.shared(self._remote_ephemeral))
        elif self._step == 2:
            message = symmetric.seal(self._static.public)
            symmetric.mix_key(self._static.shared(self._remote_ephemeral))
        self._step += 1
        return message + symmetric.seal(payload)

    def read(self, message: bytes) -> bytes:
        """The payload of the other side's next message."""
        self._turn(writes=False)
        head = (KEY_BYTES, 2 * KEY_BYTES + TAG_BYTES, KEY_BYTES + TAG_BYTES)[self._step]
        if len(message) < head + (TAG_BYTES if self._step else 0):
            raise HandshakeError("malformed", f"message {self._step + 1} has {len(message)} bytes")
        try:
            return self._read(message, head)
        except Unauthentic:
            raise HandshakeError(
                "altered",
                f"message {self._step + 1} does not fit: it was changed on the way, or an earlier "
                "one was (such as the offer of ciphers), or it is from another session (a replay)",
            ) from None

    def _read(self, message: bytes, head: int) -> bytes:
        symmetric, ephemeral = self._symmetric, self._ephemeral
        static = message[:head]
        if self._step < 2:
            self._remote_ephemeral, static = message[:KEY_BYTES], message[KEY_BYTES:head]
            if self._remote_ephemeral == ephemeral.public:
                raise HandshakeError("reflected", "the other side sent this side's own key")
            symmetric.mix_hash(self._remote_ephemeral)
        if self._step == 1:
            symmetric.mix_key(ephemeral.shared(self._remote_ephemeral))
        if self._step:
            self.remote_static = symmetric.open(static)
            symmetric.mix_key(ephemeral.shared(self.remote_static))
        payload = symmetric.open(message[head:])
        self._step += 1
        return payload

    def split(self, rekey_every: int = 0) -> tuple[CipherState, CipherState]:
        """(for sending, for receiving), with fresh counters."""
        if not self.finished:
            raise UsageError(f"split: {self._step} of 3 messages were exchanged (finish first)")
        first, second = self._symmetric.split(rekey_every)
        return (first, second) if self.initiator else (second, first)

    def _turn(self, writes: bool) -> None:
        if self.finished or writes != (self.initiator == (self._step % 2 == 0)):
            raise UsageError(
                f"NoiseXX: {'write' if writes else 'read'} after {self._step} of 3 messages is out "
                "of turn (the initiator writes the first and the third)"
            )


def _hkdf(chaining: bytes, material: bytes) -> tuple[bytes, bytes]:
    """Section 4.3, two outputs."""
    mixed = hmac.digest(chaining, material, "sha256")
    first = hmac.digest(mixed, b"\x01", "sha256")
    return first, hmac.digest(mixed, first + b"\x02", "sha256")
