"""Handshakes between friends, strangers and forgers: who gets a session, and why others do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import HandshakeError
from shoal.wire import handshake as module
from shoal.wire.frame import Greeting, pack_answer
from shoal.wire.handshake import Credentials, Handshake, Trust, ciphers
from shoal.wire.identity import Identity
from shoal.wire.noise import Cipher, StaticKey
from shoal.wire.session import SCRATCH_BYTES

IDENTITIES = [Identity.from_seed(bytes([n]) * 32) for n in range(4)]
KEYS = [Credentials(identity) for identity in IDENTITIES]
TRUST = Trust({peer: identity.public for peer, identity in enumerate(IDENTITIES)})
DIGEST = bytes(range(16))
BOTH: tuple[Cipher, ...] = ("AESGCM", "ChaChaPoly")
REASONS = {
    "malformed", "clear", "downgraded", "altered", "reflected", "identity", "wrong key",
    "not allowed", "peer", "schemas", "refused",
}  # fmt: skip


def caller(peer: int = 0, target: int = 1, **more: Any) -> Handshake:
    return _side(peer, target=target, **more)


def called(peer: int = 1, **more: Any) -> Handshake:
    return _side(peer, **more)


def _side(peer: int, *, keys: Credentials | None = None, trust: Trust = TRUST,
          digest: bytes = DIGEST, **more: Any) -> Handshake:  # fmt: skip
    return Handshake(keys or KEYS[peer], peer, digest, trust.check, **more)


def feed(side: Handshake, data: bytes, pieces: Callable[[int], int] = lambda n: n) -> bytes:
    """What the side replies to bytes that come in pieces; they must be what it waits for."""
    reply = b""
    while data:
        count = max(1, min(pieces(side.missing), side.missing, len(data)))
        reply += side.receive(data[:count])
        data = data[count:]
    return reply


def talk(one: Handshake, two: Handshake, pieces: Callable[[int], int] = lambda n: n) -> None:
    third = feed(one, feed(two, one.begin(), pieces), pieces)
    feed(one, feed(two, third, pieces), pieces)


def refused(one: Handshake, two: Handshake) -> tuple[HandshakeError, HandshakeError]:
    """The error of who refuses, and what the other side hears of it."""
    sides, at, data = (one, two), 1, one.begin()
    while True:
        try:
            data = feed(sides[at], data)
        except HandshakeError as error:
            with pytest.raises(HandshakeError) as heard:
                feed(sides[1 - at], sides[at].refusal(error))
            assert sides[0].session is None
            assert sides[1].session is None
            return error, heard.value
        at = 1 - at


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_session_comes_of_any_split_of_the_bytes(data: st.DataObject) -> None:
    one, two = caller(), called()
    talk(one, two, lambda most: data.draw(st.integers(1, most)))
    assert one.remote is not None
    assert two.remote is not None
    assert (one.remote.source, two.remote.source) == (1, 0)
    assert one.remote.public == IDENTITIES[1].public
    assert one.session is not None
    assert two.session is not None
    memory = memoryview(bytearray(SCRATCH_BYTES))
    for sends, receives in ((one.session, two.session), (two.session, one.session)):
        sealed, _ = sends.seal([b"text"], memory)
        receives.came(len(sealed), memory)
        assert bytes(receives.open(receives.record())) == b"text"  # type: ignore[arg-type]
        assert receives.record() is None


@pytest.mark.parametrize(
    ("offered", "accepted", "chosen"),
    [
        (BOTH, BOTH, "AESGCM"),
        (("ChaChaPoly",), BOTH, "ChaChaPoly"),
        (BOTH, ("ChaChaPoly",), "ChaChaPoly"),
    ],
)
def test_aes_is_chosen_where_both_have_it(
    offered: tuple[Cipher, ...], accepted: tuple[Cipher, ...], chosen: Cipher
) -> None:
    one, two = caller(offered=offered), called(offered=accepted)
    talk(one, two)
    assert one.cipher == two.cipher == chosen


def test_a_machine_without_aes_instructions_does_not_offer_aes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for text, expected in (
        ("flags\t\t: fpu sse2 aes avx", BOTH),
        ("Features\t: fp asimd aes pmull", BOTH),
        ("flags\t\t: fpu sse2 vaesx\nbugs : aes", ("ChaChaPoly",)),
    ):
        file = tmp_path / "cpuinfo"
        file.write_text(text)
        monkeypatch.setattr(module, "Path", lambda _, file=file: file)
        assert ciphers.__wrapped__() == expected


def test_no_common_cipher_is_a_downgrade() -> None:
    error, heard = refused(caller(offered=("AESGCM",)), called(offered=("ChaChaPoly",)))
    assert error.reason == "downgraded"
    assert heard.reason == "refused"
    assert "downgraded" in str(heard)


def test_an_offer_that_was_cut_on_the_way_is_noticed_by_the_caller() -> None:
    one, two = caller(offered=BOTH), called(offered=BOTH)
    first = bytearray(one.begin())
    assert first[5] == 3
    first[5] = 2
    second = feed(two, bytes(first))
    assert two.cipher == "ChaChaPoly"
    with pytest.raises(HandshakeError) as caught:
        feed(one, second)
    assert caught.value.reason == "altered"
    # Nor does it help to change the choice back.
    one, two = caller(offered=BOTH), called(offered=BOTH)
    first = bytearray(one.begin())
    first[5] = 2
    second = bytearray(feed(two, bytes(first)))
    second[5] = 1
    with pytest.raises(HandshakeError) as caught:
        feed(one, bytes(second))
    assert caught.value.reason == "altered"


def test_a_choice_that_was_not_offered_is_a_downgrade() -> None:
    one, two = caller(offered=("AESGCM",)), called(offered=BOTH)
    second = bytearray(feed(two, one.begin()))
    second[5] = 2
    with pytest.raises(HandshakeError) as caught:
        feed(one, bytes(second))
    assert caught.value.reason == "downgraded"


def test_who_does_not_encrypt_is_told_apart_on_both_sides() -> None:
    for side, data in (
        (called(), Greeting(0, 1, DIGEST).pack()),
        (caller(), pack_answer("this peer speaks in clear")),
    ):
        with pytest.raises(HandshakeError, match="does not encrypt") as caught:
            feed(side, data)
        assert caught.value.reason == "clear"


def test_the_bytes_of_an_old_session_open_nothing() -> None:
    one, two = caller(), called()
    first = one.begin()
    second = feed(two, first)
    third = feed(one, second)
    feed(one, feed(two, third))
    again = called()
    feed(again, first)
    with pytest.raises(HandshakeError, match="replay") as caught:
        feed(again, third)
    assert caught.value.reason == "altered"
    # Nor do the answers of an old session fool a new caller.
    with pytest.raises(HandshakeError) as caught:
        feed(caller(), second)
    assert caught.value.reason == "altered"


def test_reflected_messages_are_refused() -> None:
    one = caller()
    with pytest.raises(HandshakeError) as caught:
        feed(one, one.begin())
    assert caught.value.reason == "reflected"
    # The called side's identity comes back to it through a man in the middle.
    mirror, two = caller(peer=0, target=1, keys=KEYS[1]), called()
    error, _ = refused(mirror, two)
    assert error.reason == "reflected"


def test_the_wrong_key_for_a_peer_is_refused_on_both_sides() -> None:
    error, heard = refused(caller(keys=KEYS[2]), called())
    assert error.reason == "wrong key"
    assert IDENTITIES[0].name in str(error)
    assert IDENTITIES[2].name in str(error)
    # This refusal is sealed, so the whole reason arrives, with proof.
    assert "wrong key" in str(heard)
    assert "without proof" not in str(heard)
    error, heard = refused(caller(), called(keys=KEYS[2]))
    assert error.reason == "wrong key"
    assert "wrong key (said without proof)" in str(heard)


@pytest.mark.parametrize("thief", ["caller", "called"])
def test_a_stolen_identity_claim_is_refused(thief: str) -> None:
    stolen = Credentials(IDENTITIES[0 if thief == "caller" else 1])
    # The thief knows the public key and a signature over the owner's Noise key, but not its secret.
    signature = stolen.signature
    stolen.static = StaticKey()
    stolen.signature = signature
    one = caller(keys=stolen) if thief == "caller" else caller()
    two = called(keys=stolen) if thief == "called" else called()
    error, heard = refused(one, two)
    assert error.reason == "identity"
    assert "did not sign" in str(error)
    assert "identity" in str(heard)


def test_the_allow_list_names_who_may_take_part() -> None:
    names = frozenset(identity.name for identity in IDENTITIES[:2])
    few = Trust(TRUST.keys, names)
    talk(caller(trust=few), called(trust=few))
    error, heard = refused(caller(peer=2), called(trust=few))
    assert error.reason == "not allowed"
    assert IDENTITIES[2].name in str(error)
    assert "not on the allow-list" in str(heard)
    # The caller refuses as well, before it says anything of itself.
    error, _ = refused(caller(target=3, trust=few), called(peer=3))
    assert error.reason == "not allowed"


def test_a_peer_without_a_known_key_needs_its_name_on_the_list() -> None:
    error, _ = refused(caller(), called(trust=Trust({})))
    assert error.reason == "peer"
    talk(caller(), called(trust=Trust({}, frozenset({IDENTITIES[0].name}))))


def test_other_schemas_and_other_peers_are_refused() -> None:
    error, heard = refused(caller(digest=bytes(16)), called())
    assert error.reason == "schemas"
    assert "schemas" in str(heard)
    error, _ = refused(caller(target=1), called(peer=2))
    assert error.reason == "peer"
    assert str(error) == "peer: peer 2 answered for peer 1"


def test_words_of_strangers_are_cut_and_made_harmless() -> None:
    body = b"\x1b[2J\n" + b"x" * 400
    refusal = module._pack(0, 0, body)
    with pytest.raises(HandshakeError) as caught:
        feed(caller(), refusal)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300
    for side in (caller(), called()):
        with pytest.raises(HandshakeError, match="a message of 60000 bytes"):
            feed(side, module._HEAD.pack(b"ShN1", 1, 3, 60000))


def _mutated(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.choice((0, 1, 2, 3, 4, 255))
            case 2:
                del changed[at : at + draw.randrange(1, 40)]
            case _:
                changed[at:at] = draw.randbytes(draw.randrange(1, 40))
        if not changed:
            break
    return bytes(changed)


def _attacked(draw: random.Random, kept: list[bytes]) -> str:
    """One handshake with one of its messages changed; the outcome."""
    one, two = caller(), called()
    sides, at, step, data = (one, two), 1, 0, one.begin()
    victim = draw.randrange(4)
    try:
        while data:
            if step == victim:
                data = draw.choice(kept) if kept and draw.random() < 0.1 else _mutated(draw, data)
            elif len(kept) < 50:
                kept.append(data)
            reply = b""
            while data and not reply and not sides[at].session:
                count = min(sides[at].missing, len(data))
                reply = sides[at].receive(data[:count])
                data = data[count:]
            at, step, data = 1 - at, step + 1, reply
    except HandshakeError as error:
        return error.reason
    return "waits" if one.session is None or two.session is None else "session"


def test_no_changed_handshake_crashes_or_gets_a_session_with_another() -> None:
    draw = random.Random(20)
    kept: list[bytes] = []
    # 2,000 of whole handshakes; the cheap first message alone gets many more.
    outcomes = {_attacked(draw, kept) for _ in range(2000)}
    assert outcomes <= REASONS | {"waits", "session"}
    assert {"altered", "malformed", "reflected", "waits"} <= outcomes


def test_18_000_changed_first_bytes_are_errors_or_answers() -> None:
    draw = random.Random(21)
    valid = caller().begin()
    for _ in range(18_000):
        side = called()
        data = _mutated(draw, valid)
        try:
            while data:
                count = side.missing
                if side.receive(data[:count]):
                    break
                data = data[count:]
        except HandshakeError as error:
            assert error.reason in REASONS  # noqa: PT017
        assert side.session is None
