"""The Noise handshake against the vectors of the cacophony project, and against itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import HandshakeError, UsageError
from shoal.wire.noise import CipherState, NoiseXX, StaticKey, Unauthentic

# Static and ephemeral keys and the prologue that all cacophony vectors share.
INITIATOR = (
    "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1",
    "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a",
)
RESPONDER = (
    "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893",
    "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b",
)
PROLOGUE = "4a6f686e2047616c74"
PAYLOADS = (
    "4c756477696720766f6e204d69736573",
    "4d757272617920526f746862617264",
    "462e20412e20486179656b",
    "4361726c204d656e676572",
    "4a65616e2d426170746973746520536179",
    "457567656e2042f6686d20766f6e2042617765726b",
)
CIPHERTEXTS = {
    "AESGCM": (
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c79444c756477696720766f6e204d6973"
        "6573",
        "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843757117acceb05bd7a45733bc2201"
        "5c97a9d0cbaf41b80446d5988ff5127235d76b79eade70f473d6a4ef521fdcbeda5340d01e028ba793fc059f2724"
        "a83af05f12dda0448a7621a926b379a92477fd",
        "c90f1cf77eba4e50edb038991565e36c9758943a989229b6051244dc4fbecb6946744b401af2ee1a5881b65fbb87"
        "fd07cb6a328ececc9ce6ce84c399dc332d4fd521fa4bb7f467ce909395",
        "bc3fa77f6aca3e8466d7dc6bea10013e88a6a29add5132b461806c",
        "250b01074cdfe0df2ecf8ccbf1737b15a2ddb5b52fd9a396604e9c793cee3b3bb9",
        "449d4d433b3cdc3d02bf6fc881774b9df54366ebcffb9689bb13f14709822cd7ef42bcdb4d",
    ),
    "ChaChaPoly": (
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c79444c756477696720766f6e204d6973"
        "6573",
        "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f14480884381cbad1f276e038c48378ffce2b6"
        "5285e08d6b68aaa3629a5a8639392490e5b9bd5269c2f1e4f488ed8831161f19b7815528f8982ffe09be9b5c412f"
        "8a0db50f8814c7194e83f23dbd8d162c9326ad",
        "c7195ffacac1307ff99046f219750fc47693e23c3cb08b89c2af808b444850a80ae475b9df0f169ae80a89be0865"
        "b57f58c9fea0d4ec82a286427402f113e4b6ae769a1d95941d49b25030",
        "96763ed773f8e47bb3712f0e29b3060ffc956ffc146cee53d5e1df",
        "3e40f15f6f3a46ae446b253bf8b1d9ffb6ed9b174d272328ff91a7e2e5c79c07f5",
        "eb3f3515110702e047a6c9da4478b6ead94873c11c0f2d710ddb3f09fce024b3a58502ae3f",
    ),
}
CIPHERS = tuple(CIPHERTEXTS)


def _key(secret: str) -> StaticKey:
    return StaticKey(bytes.fromhex(secret))


def _pair(cipher: Any, prologues: tuple[bytes, bytes] = (b"", b"")) -> tuple[NoiseXX, NoiseXX]:
    return (
        NoiseXX(True, StaticKey(), cipher, prologues[0]),
        NoiseXX(False, StaticKey(), cipher, prologues[1]),
    )


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_byte_is_that_of_the_published_vectors(cipher: Any) -> None:
    prologue = bytes.fromhex(PROLOGUE)
    one = NoiseXX(True, _key(INITIATOR[0]), cipher, prologue, _key(INITIATOR[1]))
    two = NoiseXX(False, _key(RESPONDER[0]), cipher, prologue, _key(RESPONDER[1]))
    messages = list(
        zip(map(bytes.fromhex, PAYLOADS), map(bytes.fromhex, CIPHERTEXTS[cipher]), strict=True)
    )
    for index, (payload, ciphertext) in enumerate(messages[:3]):
        writer, reader = (one, two) if index % 2 == 0 else (two, one)
        assert writer.write(payload) == ciphertext
        assert reader.read(ciphertext) == payload
    assert one.hash == two.hash
    assert one.remote_static == _key(RESPONDER[0]).public
    assert two.remote_static == _key(INITIATOR[0]).public
    ends = {True: one.split(), False: two.split()}
    for index, (payload, ciphertext) in enumerate(messages[3:], start=3):
        # The vectors go on in turns: the responder sends the fourth message.
        sends, receives = ends[index % 2 == 0][0], ends[index % 2 != 0][1]
        assert sends.encrypt(payload) == ciphertext
        assert receives.decrypt(ciphertext) == payload


@pytest.mark.parametrize("cipher", CIPHERS)
@given(payloads=st.lists(st.binary(max_size=200), min_size=3, max_size=3))
@settings(max_examples=20)
def test_any_payload_arrives(cipher: Any, payloads: list[bytes]) -> None:
    one, two = _pair(cipher)
    assert two.read(one.write(payloads[0])) == payloads[0]
    assert one.read(two.write(payloads[1])) == payloads[1]
    assert two.read(one.write(payloads[2])) == payloads[2]
    assert one.finished
    assert two.finished
    assert one.hash == two.hash


def test_another_prologue_or_cipher_is_noticed_by_the_first_who_can() -> None:
    for one, two in (
        _pair("AESGCM", (b"offers: both", b"offers: one")),
        (NoiseXX(True, StaticKey(), "AESGCM"), NoiseXX(False, StaticKey(), "ChaChaPoly")),
    ):
        two.read(one.write(b""))
        with pytest.raises(HandshakeError, match="does not fit") as caught:
            one.read(two.write(b""))
        assert caught.value.reason == "altered"


def test_a_reflected_key_and_one_of_low_order_are_refused() -> None:
    one, _ = _pair("AESGCM")
    first = one.write(b"")
    with pytest.raises(HandshakeError) as caught:
        one.read(first.ljust(96, b"\0"))
    assert caught.value.reason == "reflected"
    _, two = _pair("AESGCM")
    two.read(bytes(32))
    with pytest.raises(HandshakeError, match="low order"):
        two.write(b"")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_short_messages_are_malformed(step: int) -> None:
    one, two = _pair("AESGCM")
    sides = ((one, two), (two, one), (one, two))
    for writer, reader in sides[:step]:
        reader.read(writer.write(b""))
    writer, reader = sides[step]
    message = writer.write(b"")
    with pytest.raises(HandshakeError) as caught:
        reader.read(message[:-1])
    assert caught.value.reason == "malformed"


def test_messages_out_of_turn_are_a_mistake_of_the_caller() -> None:
    one, two = _pair("AESGCM")
    with pytest.raises(UsageError, match="out of turn"):
        two.write(b"")
    with pytest.raises(UsageError, match="out of turn"):
        one.read(b"")
    with pytest.raises(UsageError, match="0 of 3"):
        one.split()


@pytest.mark.parametrize("cipher", CIPHERS)
def test_keys_are_replaced_on_both_sides_at_the_same_count(cipher: Any) -> None:
    key = bytes(range(32))
    sends, receives = CipherState(cipher, key, 3), CipherState(cipher, key, 3)
    never = CipherState(cipher, key)
    for index in range(10):
        sealed = sends.encrypt(b"text")
        # The first three are sealed by the first key, and no later one is.
        assert (sealed == never.encrypt(b"text")) == (index < 3)
        assert receives.decrypt(sealed) == b"text"


def test_a_failed_decryption_changes_nothing() -> None:
    sends, receives = (CipherState("AESGCM", bytes(32)) for _ in range(2))
    sealed = sends.encrypt(b"text")
    for wrong in (b"", sealed[:-1], sealed[::-1]):
        with pytest.raises(Unauthentic):
            receives.decrypt(wrong)
    assert receives.decrypt(sealed) == b"text"
    with pytest.raises(Unauthentic):
        receives.decrypt(sealed)
