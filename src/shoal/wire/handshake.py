"""From a fresh byte stream to a `Session` with a peer whose identity is proved. No sockets here.

    caller                                        called
    offered ciphers, e                     ->
                                           <-     chosen cipher, e, ee, s, es, {called peer's proof}
    s, se, {caller's proof}                ->
                                           <-     {welcome, or why not}

The messages are those of Noise XX (`shoal.wire.noise`); braces mark what is encrypted. A proof
holds the peer's number, the number it wants to talk to, a digest of the run and its message
schemas, the Ed25519 identity, and that identity's signature over the Noise static key, as in
libp2p-noise. The offer and the choice of ciphers are part of what both sides hash, so a changed
offer is noticed.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from shoal.base.errors import Forged, HandshakeError
from shoal.wire.identity import Identity, peer_name, verify
from shoal.wire.noise import Cipher, NoiseXX, StaticKey
from shoal.wire.session import LENGTH, OVERHEAD_BYTES, REKEY_EVERY, Session, check_length

_HEAD = struct.Struct("<4sBBH")
_MAGIC = b"ShN1"
_CLEAR_MAGIC = b"ShHi"
_REFUSAL, _FIRST, _SECOND, _THIRD, _ANSWER = range(5)
# All messages are short; nothing longer is waited for.
_MOST_BYTES = 512
_MOST_TEXT = 200
_PROOF = struct.Struct("<qq16s32s64s")
_SIGNED = b"shoal noise static key: "
_PROLOGUE = b"shoal noise 1: "
_BITS: dict[Cipher, int] = {"AESGCM": 1, "ChaChaPoly": 2}
NOBODY = -1


@lru_cache(maxsize=1)
def ciphers() -> tuple[Cipher, ...]:
    """What this machine offers, best first: AES-GCM only where the processor has instructions for
    it (elsewhere it is slow and tells its key by its timing), ChaCha20-Poly1305 always."""
    return ("AESGCM", "ChaChaPoly") if _has_aes() else ("ChaChaPoly",)


def _has_aes() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").lower().splitlines()
    except OSError:
        # Not Linux: every desktop processor of these two families sold since 2013 has them.
        return platform.machine().lower() in ("x86_64", "amd64", "arm64")
    flags = (line.partition(":") for line in lines)
    return any(name.strip() in ("flags", "features") and "aes" in text.split()
               for name, _, text in flags)  # fmt: skip


@lru_cache(maxsize=4096)
def _speaks_for(static: bytes, public: bytes, signature: bytes) -> bool:
    """Whether an identity signed a Noise key. Remembered, as it is the same for the life of the
    other side's process, and a third of a handshake's time; that the other side holds the key is
    proved in every handshake anew."""
    return verify(public, _SIGNED + static, signature)


class Credentials:
    """An identity with a Noise key pair for the life of this process, which the identity signed."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    @cached_property
    def static(self) -> StaticKey:
        return StaticKey()

    @cached_property
    def signature(self) -> bytes:
        return self.identity.sign(_SIGNED + self.static.public)


@dataclass(frozen=True)
class Trust:
    """Who may talk to this peer, and as whom.

    keys: the identity of each peer of the run. allow: names (`peer_name`) of those who may take
    part; empty: whoever is in `keys`. A peer that is not in `keys` needs its name in `allow`.

    >>> known = Identity.from_seed(bytes(32))
    >>> Trust({3: known.public}).check(3, known.public)
    >>> Trust({3: bytes(32)}).check(4, known.public)
    Traceback (most recent call last):
    ...
    shoal.base.errors.HandshakeError: peer: no peer 4 here
    """

    keys: Mapping[int, bytes] = field(default_factory=dict)
    allow: frozenset[str] = frozenset()

    def check(self, peer: int, public: bytes) -> None:
        """HandshakeError unless the holder of this key may be that peer."""
        name = peer_name(public)
        if self.allow and name not in self.allow:
            raise HandshakeError("not allowed", f"{name} is not on the allow-list")
        expected = self.keys.get(peer)
        if expected is None and not self.allow:
            raise HandshakeError("peer", f"no peer {peer} here")
        if expected is not None and expected != public:
            raise HandshakeError(
                "wrong key", f"peer {peer} is {peer_name(expected)}, but {name} came"
            )


class Proof(NamedTuple):
    """What a side says of itself under the cover of the handshake's keys."""

    source: int
    target: int
    digest: bytes
    public: bytes
    signature: bytes


class Handshake:
    """One side's steps; feed it what arrives, send what it returns, until `session` is there.

    peer: this side's number. target: whom the initiator calls; None makes this the called side.
    digest: 16 bytes that both sides must share, see `shoal.wire.frame.agreement`. check: raises
    HandshakeError when a proved identity may not be that peer, such as `Trust(...).check`.

    `receive` raises HandshakeError when there will be no session; `refusal(error)` is then what to
    send before closing. `remote` says who the other side is, once `session` is set.

    >>> keys = [Credentials(Identity.from_seed(bytes([n]) * 32)) for n in (1, 2)]
    >>> trust = Trust({n: key.identity.public for n, key in enumerate(keys)})
    >>> caller = Handshake(keys[0], 0, bytes(16), trust.check, target=1)
    >>> called = Handshake(keys[1], 1, bytes(16), trust.check)
    >>> answer = called.receive(caller.receive(called.receive(caller.begin())))
    >>> caller.receive(answer)
    b''
    >>> caller.remote.source, called.remote.source
    (1, 0)
    """

    def __init__(self, credentials: Credentials, peer: int, digest: bytes,
                 check: Callable[[int, bytes], None], target: int | None = None,
                 offered: tuple[Cipher, ...] | None = None) -> None:  # fmt: skip
        self.session: Session | None = None
        self.remote: Proof | None = None
        self.cipher: Cipher | None = None
        self._credentials = credentials
        self._peer = peer
        self._digest = digest
        self._check = check
        self._target = target
        self._offered = ciphers() if offered is None else offered
        self._ephemeral = StaticKey()
        self._noise: NoiseXX | None = None
        self._keys: Session | None = None
        self._awaits = _FIRST if target is None else _SECOND
        self._data = bytearray()
        self._needed = _HEAD.size

    def begin(self) -> bytes:
        """The initiator's first message."""
        return _pack(_FIRST, self._mask, self._ephemeral.public)

    @property
    def missing(self) -> int:
        """How many bytes the message at hand still needs; receive no more than that at once."""
        return self._needed - len(self._data)

    @property
    def _mask(self) -> int:
        return sum(_BITS[cipher] for cipher in self._offered)

    def receive(self, data: bytes) -> bytes:
        """Take up to `missing` bytes; what to send now, b"" for nothing."""
        self._data += data
        if self.missing > 0:
            return b""
        if self._awaits == _ANSWER:
            return self._receive_answer()
        magic, step, mask, length = _HEAD.unpack_from(self._data)
        if len(self._data) == _HEAD.size:
            self._check_head(magic, step, length)
            self._needed += length
            return b""
        body = bytes(self._data[_HEAD.size :])
        self._data.clear()
        self._needed = _HEAD.size
        if step == _REFUSAL:
            raise HandshakeError("refused", f"{_text(body)} (said without proof)")
        if step == _FIRST:
            return self._answer_first(mask, body)
        if step == _SECOND:
            return self._answer_second(mask, body)
        return self._answer_third(body)

    def _check_head(self, magic: bytes, step: int, length: int) -> None:
        if magic == _CLEAR_MAGIC:
            raise HandshakeError(
                "clear", "the other side does not encrypt (both need the same `security`)"
            )
        if magic != _MAGIC:
            raise HandshakeError("malformed", f"starts with {magic!r}, not {_MAGIC!r}")
        if not 0 < length <= _MOST_BYTES:
            raise HandshakeError("malformed", f"a message of {length} bytes")
        if step == _REFUSAL:
            return
        if step == self._awaits - 1:
            raise HandshakeError("reflected", f"message {step} came back")
        if step != self._awaits:
            raise HandshakeError("malformed", f"message {step} instead of {self._awaits}")

    def refusal(self, error: HandshakeError) -> bytes:
        """What to tell the other side before closing: as little as helps as long as nobody knows
        who is listening, and everything once the words are sealed."""
        if self._keys is None:
            return _pack(_REFUSAL, 0, error.reason.encode())
        return self._sealed(str(error).encode()[:_MOST_TEXT])

    # The called side.

    def _answer_first(self, mask: int, body: bytes) -> bytes:
        common: list[Cipher] = [cipher for cipher in self._offered if mask & _BITS[cipher]]
        if not common:
            raise HandshakeError(
                "downgraded", f"none of the offered ciphers ({mask:#x}) is one of {self._offered}"
            )
        self.cipher = common[0]
        noise = self._noise = self._new_noise(mask)
        noise.read(body)
        self._awaits = _THIRD
        return _pack(_SECOND, _BITS[self.cipher], noise.write(self._proof(NOBODY)))

    def _answer_third(self, body: bytes) -> bytes:
        assert self._noise is not None
        payload = self._noise.read(body)
        self._split()
        proof = self._proved(payload)
        self._judge(proof)
        if proof.target != self._peer:
            raise HandshakeError("peer", f"this is peer {self._peer}, not {proof.target}")
        self._finish(proof)
        return self._sealed(b"")

    # The calling side.

    def _answer_second(self, mask: int, body: bytes) -> bytes:
        chosen: list[Cipher] = [cipher for cipher in self._offered if mask == _BITS[cipher]]
        if not chosen:
            raise HandshakeError(
                "downgraded", f"cipher {mask:#x} was chosen, but only {self._offered} offered"
            )
        self.cipher = chosen[0]
        noise = self._noise = self._new_noise(self._mask)
        noise.write(b"")
        proof = self._proved(noise.read(body))
        if proof.source != self._target:
            raise HandshakeError("peer", f"peer {proof.source} answered for peer {self._target}")
        self._judge(proof)
        third = noise.write(self._proof(proof.source))
        self._split()
        self.remote = proof
        self._awaits = _ANSWER
        self._needed = LENGTH.size
        return _pack(_THIRD, 0, third)

    def _receive_answer(self) -> bytes:
        assert self._keys is not None
        assert self.remote is not None
        (size,) = LENGTH.unpack_from(self._data)
        try:
            if len(self._data) == LENGTH.size:
                if self._data == _MAGIC:
                    # In clear, from a peer that could not open the third message.
                    raise HandshakeError("refused", "at the last message (said without proof)")
                check_length(size)
                self._needed += min(size, _MOST_BYTES)
                return b""
            answer = bytes(self._keys.open(memoryview(self._data)[LENGTH.size :]))
        except Forged as error:
            raise HandshakeError("altered", f"the answer: {error}") from None
        if answer[:1] != b"\x01":
            raise HandshakeError("refused", _text(answer[1:]))
        self._finish(self.remote)
        return b""

    # Both.

    def _new_noise(self, mask: int) -> NoiseXX:
        assert self.cipher is not None
        prologue = _PROLOGUE + bytes((mask, _BITS[self.cipher]))
        initiates = self._target is not None
        return NoiseXX(initiates, self._credentials.static, self.cipher, prologue, self._ephemeral)

    def _proof(self, target: int) -> bytes:
        own = self._credentials
        return _PROOF.pack(self._peer, target, self._digest, own.identity.public, own.signature)

    def _proved(self, payload: bytes) -> Proof:
        assert self._noise is not None
        if len(payload) != _PROOF.size:
            raise HandshakeError("malformed", f"a proof of {len(payload)} bytes")
        proof = Proof._make(_PROOF.unpack(payload))
        if not _speaks_for(self._noise.remote_static, proof.public, proof.signature):
            raise HandshakeError(
                "identity", f"{peer_name(proof.public)} did not sign the key that speaks for it"
            )
        return proof

    def _judge(self, proof: Proof) -> None:
        if proof.public == self._credentials.identity.public:
            raise HandshakeError("reflected", "the other side has this side's own identity")
        if proof.digest != self._digest:
            raise HandshakeError("schemas", "another run, or other declared messages")
        self._check(proof.source, proof.public)

    def _split(self) -> None:
        assert self._noise is not None
        self._keys = Session(*self._noise.split(REKEY_EVERY))

    def _finish(self, proof: Proof) -> None:
        self.remote = proof
        self.session = self._keys

    def _sealed(self, refusal: bytes) -> bytes:
        assert self._keys is not None
        answer = bytes((not refusal,)) + refusal
        place = memoryview(bytearray(len(answer) + OVERHEAD_BYTES))
        return bytes(self._keys.seal((answer,), place)[0])


def _pack(step: int, mask: int, body: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, step, mask, len(body)) + body


def _text(data: bytes) -> str:
    """A stranger's words, fit for a log."""
    text = data[:_MOST_TEXT].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)
