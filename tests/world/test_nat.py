"""NAT boxes are tables: every rule of RFC 4787 that they follow, on arbitrary traffic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.kernel.datagrams import Endpoint
from shoal.world import nat
from shoal.world.nat import ADDRESS, BEHAVIOURS, CLASSIC, INDEPENDENT, PORT, NatBox, NatTable
from shoal.world.network import Network

SECOND = 1_000_000_000
INSIDE = [Endpoint("10.0.0.1", 5000), Endpoint("10.0.0.1", 5001), Endpoint("10.0.0.2", 5000)]
OUTSIDE = [Endpoint(f"198.18.0.{host}", port) for host in (1, 2, 3) for port in (53, 54)]

packets = st.lists(
    st.tuples(st.sampled_from(INSIDE), st.sampled_from(OUTSIDE), st.integers(0, 20 * SECOND)),
    min_size=1, max_size=30,
)  # fmt: skip
behaviours = st.sampled_from(BEHAVIOURS)


def table_of(mapping: str, filtering: str, lifetime_s: float = 10.0) -> NatTable:
    return NatTable(NatBox((0,), mapping, filtering, lifetime_s), "198.18.9.9", seed=3)


def sent(table: NatTable, traffic: list) -> Iterator[tuple[Endpoint, Endpoint, Endpoint, int]]:
    now = 0
    for inside, outside, later in traffic:
        now += later // 8
        yield inside, outside, table.outbound(inside, outside, now), now


def same(kind: str, one: Endpoint, other: Endpoint) -> bool:
    """Whether a behaviour of this kind makes no difference between two remote endpoints."""
    return kind == INDEPENDENT or (one.host == other.host if kind == ADDRESS else one == other)


@given(mapping=behaviours, filtering=behaviours, traffic=packets)
def test_mapping_and_filtering_agree_with_a_plain_list_of_all_that_was_sent(
    mapping: str, filtering: str, traffic: list
) -> None:
    """The tables against their definition, searched in the whole history."""
    table, lifetime = table_of(mapping, filtering), 10 * SECOND
    history: list[tuple[Endpoint, Endpoint, Endpoint, int]] = []
    for inside, outside, external, now in sent(table, traffic):
        # Of the same mapping: the last packet that this one would share it with.
        shared = [h for h in history if h[0] == inside and same(mapping, h[1], outside)]
        if shared and shared[-1][3] + lifetime > now:
            assert external == shared[-1][2]
        else:
            held = {h[2] for h in history if h[3] + lifetime > now}
            assert external not in held
        history.append((inside, outside, external, now))
        for target in {h[2] for h in history}:
            for remote in OUTSIDE:
                allowed = [
                    h for h in history
                    if h[2] == target and h[3] + lifetime > now and same(filtering, h[1], remote)
                ]  # fmt: skip
                expected = allowed[-1][0] if allowed else None
                assert table.inbound(target, remote, now) == expected


@given(st.lists(st.sampled_from(OUTSIDE), unique=True, min_size=2))
def test_a_symmetric_box_gives_a_new_port_per_destination(remotes: list[Endpoint]) -> None:
    mapping, filtering = CLASSIC["symmetric"]
    table = table_of(mapping, filtering)
    assert len({table.outbound(INSIDE[0], remote, 0) for remote in remotes}) == len(remotes)
    cone = table_of(*CLASSIC["port-restricted"])
    assert len({cone.outbound(INSIDE[0], remote, 0) for remote in remotes}) == 1


def test_a_mapping_lives_by_outbound_traffic_alone() -> None:
    table = table_of(INDEPENDENT, INDEPENDENT)
    mapped = table.outbound(INSIDE[0], OUTSIDE[0], 0)
    for second in range(10):
        assert table.inbound(mapped, OUTSIDE[3], second * SECOND) == INSIDE[0]
    assert table.inbound(mapped, OUTSIDE[0], 10 * SECOND) is None
    table.outbound(INSIDE[0], OUTSIDE[0], 20 * SECOND)
    later = table.outbound(INSIDE[0], OUTSIDE[1], 29 * SECOND)
    assert table.inbound(later, OUTSIDE[0], 38 * SECOND) == INSIDE[0]


def test_a_punch_opens_its_own_filter_even_when_the_other_box_drops_it() -> None:
    kinds = CLASSIC["port-restricted"]
    a, b = (
        NatTable(NatBox((0,), *kinds), "198.18.0.7"),
        NatTable(NatBox((1,), *kinds), "198.18.0.8"),
    )
    inside_a, inside_b, reflector = INSIDE[0], INSIDE[2], OUTSIDE[0]
    seen_a, seen_b = a.outbound(inside_a, reflector, 0), b.outbound(inside_b, reflector, 0)
    first = a.outbound(inside_a, seen_b, 1)
    assert b.inbound(seen_b, first, 2) is None
    answer = b.outbound(inside_b, seen_a, 3)
    assert a.inbound(seen_a, answer, 4) == inside_a
    assert b.inbound(seen_b, a.outbound(inside_a, answer, 5), 6) == inside_b


def test_a_full_box_reuses_expired_ports_and_never_gives_one_twice() -> None:
    table = table_of(PORT, PORT, lifetime_s=1.0)
    ports = {
        table.outbound(INSIDE[0], Endpoint("198.18.0.1", port), 0).port for port in range(40_000)
    }
    assert len(ports) == 40_000
    later = {
        table.outbound(INSIDE[0], Endpoint("198.18.0.2", port), 2 * SECOND).port
        for port in range(40_000)
    }
    assert len(later) == 40_000


def test_boxes_are_data() -> None:
    boxes = nat.placed({"public": 2, "full cone": 3, "symmetric": 4}, seed=1, lifetime_s=60.0)
    assert len({peer for box in boxes for peer in box.who}) == len(boxes) == 7
    assert [box.name for box in boxes].count("symmetric") == 4
    assert tuple(nat.from_data(nat.to_data(box)) for box in boxes) == boxes
    assert hash(Network(9, nats=boxes).nats) == hash(boxes)
    assert boxes != nat.placed({"public": 2, "full cone": 3, "symmetric": 4}, seed=2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NatBox(()), "at least one peer"),
        (lambda: NatBox((1,), mapping="odd"), "mapping='odd'"),
        (lambda: NatBox((1,), lifetime_s=0.0), "lifetime_s=0.0"),
        (lambda: NatBox.classic("public", (1,)), "no kind 'public'"),
        (lambda: nat.from_data({"who": [1], "colour": 3}), "unknown setting 'colour'"),
        (lambda: nat.from_data({}), "no who"),
        (lambda: Network(2, nats=(NatBox((2,)),)), "no peer 2"),
        (lambda: Network(2, nats=(NatBox((0,)), NatBox((0, 1)))), "peer 0 is behind two boxes"),
    ],
)
def test_what_makes_no_sense_is_refused(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_a_given_port_lets_everybody_in_until_it_is_taken_back() -> None:
    box = NatBox((0,), PORT, PORT, lifetime_s=1.0, upnp=True)
    table = NatTable(box, "198.18.9.9")
    before = table.outbound(INSIDE[0], OUTSIDE[0], 0)
    given_port = table.map_port(INSIDE[0])
    assert given_port is not None
    assert given_port == table.map_port(INSIDE[0]) != before
    late = 100 * SECOND
    assert {table.inbound(given_port, remote, late) for remote in OUTSIDE} == {INSIDE[0]}
    # It answers from there, whatever its mapping would be; other ports are as before.
    assert {table.outbound(INSIDE[0], remote, late) for remote in OUTSIDE} == {given_port}
    assert len({table.outbound(INSIDE[1], remote, late) for remote in OUTSIDE}) == len(OUTSIDE)
    table.unmap_port(INSIDE[0])
    assert table.inbound(given_port, OUTSIDE[0], late) is None
    assert table.outbound(INSIDE[0], OUTSIDE[0], late) != given_port
    assert NatTable(NatBox((0,)), "198.18.9.9").map_port(INSIDE[0]) is None


def test_a_full_box_keeps_the_ports_that_it_gave() -> None:
    table = NatTable(NatBox((0,), PORT, PORT, lifetime_s=1.0, upnp=True), "198.18.9.9")
    kept = table.map_port(INSIDE[0])
    assert kept is not None
    for second in range(2):
        for port in range(40_000):
            table.outbound(INSIDE[1], Endpoint("198.18.0.1", port), 2 * second * SECOND)
    assert table.inbound(kept, OUTSIDE[0], 5 * SECOND) == INSIDE[0]
