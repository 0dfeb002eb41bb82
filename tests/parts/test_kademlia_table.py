"""The XOR metric, k-buckets, and what a node keeps for others: against plain models."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.parts.overlay.records import Copy, Record, Records, is_intact, sealed, size_of
from shoal.parts.overlay.routing_table import BITS, RoutingTable, number_of_peer
from shoal.wire.identity import Identity

NUMBERS = st.integers(0, (1 << BITS) - 1)
KEY, OTHER = bytes(32), b"\x01" * 32


@given(a=NUMBERS, b=NUMBERS, c=NUMBERS)
def test_distance_is_a_metric_and_one_way(a: int, b: int, c: int) -> None:
    assert (a ^ b) == (b ^ a)
    assert ((a ^ b) == 0) == (a == b)
    assert (a ^ c) <= (a ^ b) + (b ^ c)
    # One way: for a number and a distance there is exactly one other number.
    assert a ^ (a ^ b) == b


@given(own=NUMBERS, other=NUMBERS)
def test_a_bucket_holds_the_distances_of_one_power_of_two(own: int, other: int) -> None:
    index = RoutingTable(own, 20).index(other)
    distance = own ^ other
    assert (distance == 0) if index == 0 else (1 << (index - 1) <= distance < 1 << index)


@st.composite
def stories(draw: Any) -> list[tuple[str, int]]:
    """What may happen to a table whose own number is 0, in a space small enough for collisions."""
    return draw(
        st.lists(
            st.tuples(st.sampled_from(["heard", "silent", "evict"]), st.integers(0, 63)),
            max_size=150,
        )
    )


@given(story=stories(), k=st.integers(1, 4), target=st.integers(0, 63))
@settings(max_examples=300)
def test_table_against_a_plain_model(story: list[tuple[str, int]], k: int, target: int) -> None:
    """Buckets as lists, written out as in section 2.2 of the paper."""
    table = RoutingTable(0, k)
    buckets: dict[int, list[int]] = {}
    spares: dict[int, list[int]] = {}
    responsive: set[int] = set()
    for what, number in story:
        index = number.bit_length()
        bucket, waiting = buckets.setdefault(index, []), spares.setdefault(index, [])
        if what == "heard":
            asked = table.heard(number, PeerId(number))
            if number == 0:
                assert asked is None
            elif number in bucket or len(bucket) < k:
                if number in bucket:
                    bucket.remove(number)
                if number in waiting:
                    waiting.remove(number)
                bucket.append(number)
                responsive.add(number)
                assert asked is None
            else:
                if number in waiting:
                    waiting.remove(number)
                waiting.append(number)
                del waiting[:-k]
                assert asked == next((n for n in bucket if n not in responsive), bucket[0])
        elif what == "silent":
            table.silent(number)
            responsive.discard(number)
        else:
            new = table.evict(number)
            responsive.discard(number)
            if number in bucket and waiting:
                bucket.remove(number)
                bucket.append(waiting.pop())
                responsive.add(bucket[-1])
                assert new == bucket[-1]
            else:
                assert new is None
        assert all(len(each) <= k for each in table.buckets.values())
        assert list(table.buckets.get(index, ())) == (bucket if number else [])
    known = [n for each in buckets.values() for n in each]
    order = sorted((n for n in known if n in responsive), key=lambda n: n ^ target)
    assert table.closest(target, 5) == order[:5]
    silent = sorted((n for n in known if n not in responsive), key=lambda n: n ^ target)
    assert table.suspects(target, 5) == silent[:5]
    assert len(table) == len(order)


def test_a_flood_of_strangers_replaces_nobody_who_answers() -> None:
    """The eclipse attack: without a failed ping no contact leaves."""
    table = RoutingTable(0, 20)
    first = [number_of_peer(peer) for peer in range(200)]
    for peer, number in enumerate(first):
        table.heard(number, PeerId(peer))
    before = {index: list(bucket) for index, bucket in table.buckets.items()}
    full = [index for index, bucket in before.items() if len(bucket) == 20]
    for peer in range(1000, 6000):
        table.heard(number_of_peer(peer), PeerId(peer))
    assert len(full) >= 3
    assert all(list(table.buckets[index]) == before[index] for index in full)
    # And the memory for those who wait is bounded.
    assert all(len(spares) <= 20 for spares in table._spares.values())


# Records.


@given(
    value=st.binary(max_size=40), bit=st.integers(0, 10_000), owner=st.integers(-3, 1 << 62),
    signed=st.booleans(),
)  # fmt: skip
def test_a_damaged_record_is_seen(value: bytes, bit: int, owner: int, signed: bool) -> None:
    identity = Identity.from_seed(bytes(32)) if signed else None
    key_of = (lambda peer: identity.public) if identity else None
    record = sealed(KEY, owner, 5, 60.0, value, identity)
    assert is_intact(KEY, record, key_of)
    assert not is_intact(OTHER, record, key_of)
    parts = [owner, 5, 60.0, value, record.seal]
    place = bit % 3
    if place == 0:
        parts[0] = owner ^ (1 << (bit % 62))
    elif place == 1:
        parts[1] = 5 ^ (1 << (bit % 62))
    else:
        data = bytearray(value or record.seal)
        data[bit % len(data)] ^= 1 << (bit % 8)
        parts[3 if value else 4] = bytes(data)
    assert not is_intact(KEY, Record(*parts), key_of)


def test_numbers_that_no_seal_can_hold_are_refused_and_raise_nothing() -> None:
    good = sealed(KEY, 1, 1, 60.0, b"")
    for owner, version, lifetime_s in (
        (1 << 63, 1, 60.0), (1, 1 << 63, 60.0), (1, 1, float("nan")), (1, 1, float("inf")),
    ):  # fmt: skip
        assert not is_intact(KEY, Record(owner, version, lifetime_s, b"", good.seal))


def test_a_signature_of_another_peer_does_not_count() -> None:
    keys = {peer: Identity.from_seed(bytes([peer]) * 32) for peer in (1, 2)}

    def key_of(peer: PeerId) -> bytes | None:
        return keys[peer].public if peer in keys else None

    assert is_intact(KEY, sealed(KEY, 1, 1, 9.0, b"x", keys[1]), key_of)
    assert not is_intact(KEY, sealed(KEY, 1, 1, 9.0, b"x", keys[2]), key_of)
    assert not is_intact(KEY, sealed(KEY, 3, 1, 9.0, b"x", keys[2]), key_of)


def store(**limits: Any) -> Records:
    return Records(**{"most_bytes": 10_000, "sender_bytes": 2_000, "record_bytes": 100, **limits})


def test_writers_under_one_key_do_not_overwrite_each_other_and_newer_wins() -> None:
    held = store()
    for owner, version, value in ((1, 1, b"a"), (2, 1, b"b"), (1, 2, b"c"), (2, 0, b"old")):
        held.add(KEY, Copy(sealed(KEY, owner, version, 60.0, value), 60.0), PeerId(owner))
    values = [(c.record.owner, c.record.value) for c in held.under(KEY, now_s=0.0)]
    assert values == [(1, b"c"), (2, b"b")]


def test_without_signatures_nobody_replaces_what_the_owner_sent_itself() -> None:
    forged = sealed(KEY, 1, 99, 60.0, b"forged")
    for signed, first in ((False, b"own"), (True, b"forged")):
        held = store(signed=signed)
        assert held.add(KEY, Copy(sealed(KEY, 1, 1, 60.0, b"own"), 60.0), PeerId(1))
        assert held.add(KEY, Copy(forged, 60.0), PeerId(7)) == signed
        assert held.under(KEY, now_s=0.0)[0].record.value == first


def test_a_cached_copy_expires_by_itself_and_is_not_stored_again() -> None:
    held = store()
    record = sealed(KEY, 1, 1, 600.0, b"")
    held.add(KEY, Copy(record, 600.0), PeerId(2), cached_s=10.0)
    assert held.neglected(5.0, 5.0) == []
    assert held.under(KEY, now_s=11.0) == []
    held.add(KEY, Copy(record, 595.0), PeerId(1), now_s=5.0)
    assert held.neglected(100.0, 4.0) == []
    assert held.neglected(100.0, 5.0) == [(KEY, Copy(record, 500.0))]
    held.sweep(600.0)
    assert held.held_bytes == 0


def test_a_record_is_kept_for_what_is_left_of_it_and_never_longer_than_it_lasts() -> None:
    held = store()
    record = sealed(KEY, 1, 1, 60.0, b"")
    held.add(KEY, Copy(record, 20.0), PeerId(2), now_s=100.0)
    assert held.under(KEY, now_s=119.0) == [Copy(record, 1.0)]
    # One that knows more, and says less than it knows, and more than there can be.
    for left_s, lasts_s in ((50.0, 155.0), (10.0, 155.0), (60.0, 160.0), (1e9, 160.0)):
        assert held.add(KEY, Copy(record, left_s), PeerId(3), now_s=105.0)
        assert held.under(KEY, now_s=lasts_s - 1.0) == [Copy(record, 1.0)]
    for now_s in (130.0, 150.0, 159.0):
        assert held.add(KEY, Copy(record, 60.0), PeerId(3), now_s=now_s)
    assert held.under(KEY, now_s=160.0) == []
    # A cached copy says what is left of the record, not of the copy.
    held.add(OTHER, Copy(record, 50.0), PeerId(2), cached_s=10.0)
    assert held.under(OTHER, now_s=9.0) == [Copy(record, 41.0)]
    assert held.under(OTHER, now_s=10.0) == []


@given(
    story=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(0, 3), st.integers(0, 90)),
        max_size=120,
    )
)
@settings(max_examples=200)
def test_a_sender_and_all_senders_together_are_bounded(
    story: list[tuple[int, int, int, int]],
) -> None:
    held = store(most_bytes=3_000, sender_bytes=1_000)
    for sender, name, version, size in story:
        key = bytes([name]) * 32
        record = sealed(key, sender, version, 60.0, b"v" * size)
        held.add(key, Copy(record, 60.0), PeerId(sender))
        total = 0
        for each in range(5):
            mine = [
                copy.record
                for name in range(31)
                for copy in held.under(bytes([name]) * 32, now_s=0.0)
                if copy.record.owner == each
            ]
            assert sum(map(size_of, mine)) <= 1_000
            total += sum(map(size_of, mine))
        assert total == held.held_bytes <= 3_000


def test_a_flood_displaces_itself() -> None:
    held = store(most_bytes=3_000, sender_bytes=2_900)
    held.add(KEY, Copy(sealed(KEY, 1, 1, 60.0, b"mine"), 60.0), PeerId(1))
    for name in range(200):
        key = bytes([name]) * 32
        held.add(key, Copy(sealed(key, 2, 1, 60.0, b"v" * 90), 60.0), PeerId(2))
    # Room for others is made from what the flooder holds.
    for owner in range(3, 9):
        assert held.add(OTHER, Copy(sealed(OTHER, owner, 1, 60.0, b""), 60.0), PeerId(owner))
    assert [c.record.value for c in held.under(KEY, now_s=0.0) if c.record.owner == 1] == [b"mine"]


def test_misuse_is_told() -> None:
    with pytest.raises(UsageError, match="k=0"):
        RoutingTable(0, 0)
    with pytest.raises(UsageError, match="sender_bytes=0"):
        store(sender_bytes=0)
