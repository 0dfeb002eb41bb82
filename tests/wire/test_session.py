"""Sealed records: any split of the stream, and nothing that the other end did not seal."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import Forged
from shoal.wire.noise import CipherState
from shoal.wire.session import OVERHEAD_BYTES, RECORD_BYTES, SCRATCH_BYTES, Session

MEMORY = memoryview(bytearray(SCRATCH_BYTES))


def _ends(rekey_every: int = 0) -> tuple[Session, Session]:
    def state(byte: bytes) -> CipherState:
        return CipherState("AESGCM", byte * 32, rekey_every)

    return Session(state(b"1"), state(b"2")), Session(state(b"2"), state(b"1"))


def _sealed(session: Session, buffers: list[bytes], place: memoryview = MEMORY) -> bytes:
    """All of the buffers, in as many turns as the place needs."""
    whole, done = b"".join(buffers), 0
    stream = bytearray()
    views = [memoryview(buffer) for buffer in buffers]
    while done < len(whole):
        out, taken = session.seal(views, place)
        assert 0 < taken <= len(whole) - done
        stream += out
        done += taken
        while taken:
            first = views.pop(0)
            if len(first) > taken:
                views.insert(0, first[taken:])
            taken -= min(taken, len(first))
    return bytes(stream)


def _opened(session: Session, pieces: Iterable[bytes]) -> bytes:
    found = bytearray()
    for piece in pieces:
        while piece:
            space = session.space(MEMORY)
            count = min(len(space), len(piece))
            space[:count] = piece[:count]
            piece = piece[count:]
            session.came(count, MEMORY)
            while (record := session.record()) is not None:
                found += session.open(record)
    return bytes(found)


def _bytes(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 300), st.sampled_from([8192, 8193, 20_000, RECORD_BYTES + 1])),
        max_size=12,
    ),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=12),
    room=st.sampled_from([9_000, 40_000, RECORD_BYTES + OVERHEAD_BYTES, SCRATCH_BYTES]),
    rekey_every=st.sampled_from([0, 1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_any_buffers_arrive_over_any_split(
    sizes: list[int], cuts: list[int], room: int, rekey_every: int
) -> None:
    here, there = _ends(rekey_every)
    buffers = [_bytes(index, size) for index, size in enumerate(sizes)]
    stream = _sealed(here, buffers, MEMORY[:room])
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    pieces = [stream[a:b] for a, b in itertools.pairwise(ends)]
    assert _opened(there, pieces) == b"".join(buffers)
    assert not there.partial


def test_byte_by_byte() -> None:
    here, there = _ends()
    stream = _sealed(here, [b"some", b"thing"])
    assert _opened(there, [stream[i : i + 1] for i in range(len(stream))]) == b"something"


def test_a_long_buffer_is_opened_where_it_belongs() -> None:
    here, there = _ends()
    data = _bytes(1, 3 * RECORD_BYTES)
    stream = _sealed(here, [data])
    assert len(stream) == len(data) + 3 * OVERHEAD_BYTES
    MEMORY[: len(stream)] = stream
    place = memoryview(bytearray(len(data)))
    at = 0
    there.came(len(stream), MEMORY)
    while (record := there.record()) is not None:
        there.open(record, place[at : at + RECORD_BYTES])
        at += RECORD_BYTES
    assert place == data


def test_short_buffers_share_a_record_and_never_exceed_it() -> None:
    here, _ = _ends()
    many = [bytes(100)] * 1000
    assert len(_sealed(here, many)) == 100_000 + OVERHEAD_BYTES
    more = [bytes(8000)] * 17
    assert len(_sealed(here, more)) == 17 * 8000 + 2 * OVERHEAD_BYTES


@given(at=st.integers(0, 5 * 40 - 1), change=st.integers(1, 255))
@settings(max_examples=100)
def test_a_changed_byte_is_forged_and_what_came_before_is_whole(at: int, change: int) -> None:
    here, there = _ends()
    texts = [bytes([index]) * 20 for index in range(5)]
    stream = bytearray(b"".join(_sealed(here, [text]) for text in texts))
    stream[at] ^= change
    found = bytearray()
    space = there.space(MEMORY)
    space[: len(stream)] = stream
    try:
        there.came(len(stream), MEMORY)
        while (record := there.record()) is not None:
            found += there.open(record)
    except Forged:
        pass
    else:
        # A length that grew within the bounds of a record waits for bytes that never come.
        assert there.partial
    assert found == b"".join(texts[: at // 40])


def test_replayed_reordered_dropped_and_reflected_records_are_forged() -> None:
    for order in ((0, 0), (1, 0), (1,), (0, 2)):
        here, there = _ends()
        records = [_sealed(here, [b"text %d" % index]) for index in range(3)]
        with pytest.raises(Forged, match="replayed"):
            _opened(there, [records[index] for index in order])
    here, _ = _ends()
    with pytest.raises(Forged, match="reflected"):
        _opened(here, [_sealed(here, [b"text"])])


def test_bytes_of_another_session_are_forged() -> None:
    here, _ = _ends()
    other = Session(CipherState("AESGCM", b"3" * 32), CipherState("AESGCM", b"4" * 32))
    with pytest.raises(Forged, match="record 0"):
        _opened(other, [_sealed(here, [b"text"])])


@pytest.mark.parametrize("size", [0, 16, RECORD_BYTES + 17, 0xFFFFFFFF])
def test_impossible_lengths_are_refused_before_the_bytes_come(size: int) -> None:
    _, there = _ends()
    with pytest.raises(Forged, match="record of"):
        _opened(there, [size.to_bytes(4, "little")])
