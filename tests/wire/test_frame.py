"""Greetings, and what two peers must have in common."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_messages import Inner, Plain

from shoal.base.errors import DecodeError
from shoal.wire.frame import (
    ANSWER_BYTES,
    GREETING_BYTES,
    Greeting,
    agreement,
    pack_answer,
    schema,
    unpack_answer,
)
from shoal.wire.message import message


@given(
    st.integers(0, (1 << 63) - 1),
    st.integers(0, (1 << 63) - 1),
    st.binary(min_size=16, max_size=16),
)
def test_greetings_round_trip(source: int, target: int, digest: bytes) -> None:
    packed = Greeting(source, target, digest).pack()
    assert len(packed) == GREETING_BYTES
    assert Greeting.unpack(packed) == (source, target, digest)


@given(st.binary(max_size=80))
def test_random_greetings_and_answers_only_raise_decode_errors(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Greeting.unpack(data)
    with pytest.raises(DecodeError):
        unpack_answer(data)


def test_greetings_of_other_versions_and_lengths() -> None:
    packed = bytearray(Greeting(1, 2, bytes(16)).pack())
    packed[4] = 7
    with pytest.raises(DecodeError, match="version 7"):
        Greeting.unpack(packed)
    with pytest.raises(DecodeError, match="39 bytes"):
        Greeting.unpack(bytes(packed[:39]))


@given(st.text(max_size=100))
def test_answers(text: str) -> None:
    packed = pack_answer(text)
    assert len(packed) == ANSWER_BYTES
    answer = unpack_answer(packed)
    assert bool(answer) == bool(text)
    if len(text.encode()) <= 56 and "\0" not in text:
        assert answer == text


def test_agreement_depends_on_run_names_and_fields() -> None:
    schemas = {kind.kind: schema(kind) for kind in (Plain, Inner)}
    turned = dict(reversed(schemas.items()))
    assert agreement(b"run", schemas) == agreement(b"run", turned)
    assert len(agreement(b"run", schemas)) == 16
    assert agreement(b"run", schemas) != agreement(b"nur", schemas)
    assert agreement(b"run", schemas) != agreement(b"run", {Plain.kind: schemas[Plain.kind]})
    assert agreement(b"run", schemas) != agreement(b"run", {**schemas, Plain.kind: "other"})


def test_schema_tells_nested_messages_by_name() -> None:
    @message
    class Outer:
        inner: Inner
        count: int

    assert schema(Outer).endswith(f"Outer(inner: {Inner.kind}, count: <class 'int'>)")
