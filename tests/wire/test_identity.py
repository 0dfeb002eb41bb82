"""Identities: RFC 8032 vectors, key files that only their owner can read, names."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.wire.identity import Identity, is_name, peer_name, verify

# RFC 8032, section 7.1, tests 1 to 3: seed, public key, message, signature.
RFC_8032 = (
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b"
        "46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11"
        "d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc"
        "6594a7c15e9716ed28dc027beceea1ec40a",
    ),
)


@pytest.mark.parametrize(("seed", "public", "data", "signature"), RFC_8032)
def test_keys_and_signatures_are_those_of_rfc_8032(
    seed: str, public: str, data: str, signature: str
) -> None:
    own = Identity.from_seed(bytes.fromhex(seed))
    assert own.public.hex() == public
    assert own.sign(bytes.fromhex(data)).hex() == signature
    assert verify(own.public, bytes.fromhex(data), bytes.fromhex(signature))


@given(st.binary(max_size=80), st.integers(0, 63), st.integers(1, 255))
def test_a_changed_signature_is_none(data: bytes, at: int, change: int) -> None:
    own = Identity.from_seed(bytes(range(32)))
    signature = bytearray(own.sign(data))
    signature[at] ^= change
    assert not verify(own.public, data, bytes(signature))


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_broken_input_is_a_no_and_no_error(public: bytes, signature: bytes) -> None:
    assert not verify(public, b"data", signature)


def test_a_name_is_a_function_of_the_key_alone() -> None:
    first, second = Identity.new(), Identity.new()
    assert first.name == peer_name(first.public) != second.name
    assert is_name(first.name)
    assert not is_name(first.name.upper())
    assert not is_name("b" + "1" * 55)
    with pytest.raises(UsageError, match="31 bytes"):
        peer_name(bytes(31))


def test_a_saved_identity_comes_back_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    own = Identity.new()
    path = tmp_path / "keys" / "peer.pem"
    own.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load(path) == own
    assert [each.name for each in path.parent.iterdir()] == ["peer.pem"]
    assert Identity.load_or_new(path) == own
    other = tmp_path / "other.pem"
    assert Identity.load_or_new(other) == Identity.load(other) != own


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "peer.pem"
    own = Identity.new()
    own.save(path)
    with pytest.raises(UsageError, match="it exists"):
        Identity.new().save(path)
    assert Identity.load(path) == own
    assert [each.name for each in tmp_path.iterdir()] == ["peer.pem"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "peer.pem"
    Identity.new().save(path)
    os.chmod(path, mode)
    with pytest.raises(UsageError, match=rf"mode {mode:04o}.*chmod 600"):
        Identity.load(path)


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    with pytest.raises(UsageError, match="No such file"):
        Identity.load(tmp_path / "none.pem")
    path = tmp_path / "peer.pem"
    path.touch(mode=0o600)
    for content in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="no private key in PEM form"):
            Identity.load(path)
    path.write_bytes(
        X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(UsageError, match="need an Ed25519 key"):
        Identity.load(path)


def test_the_secret_is_not_shown_and_travels_by_pickle() -> None:
    own = Identity.new()
    assert own.public
    assert own.seed.hex() not in repr(own)
    assert repr(own.seed) not in repr(own)
    assert pickle.loads(pickle.dumps(own)) == own


def test_the_library_is_imported_only_when_a_key_is_used() -> None:
    code = "import sys, shoal, shoal.wire.identity; print('cryptography' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
