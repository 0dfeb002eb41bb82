"""CRDT values form lattices; signed deltas in any order give one state; nothing false gets in."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from crdt_programs import identity_of
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.overlay.crdt import (
    ExpiringMap,
    GCounter,
    LwwMap,
    LwwRegister,
    OrSet,
    PNCounter,
)
from shoal.parts.overlay.crdt_store import CrdtStore, rules
from shoal.parts.overlay.dag import Content, Dag, Node, Rules, chosen, signed
from shoal.parts.overlay.hybrid_clock import MOST_COUNT, HybridClock
from shoal.wire.identity import Identity

KINDS: tuple[Any, ...] = (GCounter, PNCounter, LwwRegister, LwwMap, OrSet, ExpiringMap)
AUTHORS = [identity_of(n) for n in range(3)]
OPS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 3), st.booleans(), st.integers(0, 4), st.integers(0, 2)
    ),
    max_size=14,
)  # fmt: skip


def delta_of(kind: Any, value: Any, author: bytes, item: int, flag: bool, time: int) -> Any:
    stamp = (time, 0)
    if kind is GCounter:
        return value.added(author, item)
    if kind is PNCounter:
        return value.added(author, -item if flag else item)
    if kind is LwwRegister:
        return value.written(author, stamp, None if flag else item)
    if kind is LwwMap:
        return value.written(author, stamp, f"k{item}", None if flag else item)
    if kind is OrSet:
        return value.removed(item) if flag else value.added(author, item)
    return value.held(author, stamp, item, expires_ns=time + (5 if flag else 50))


def histories(kind: Any, ops: list[Any]) -> tuple[list[Any], list[Any]]:
    """Three replicas that write alone and now and then hear of each other: values and deltas."""
    replicas, deltas = [kind(), kind(), kind()], []
    for time, (who, item, flag, heard, other) in enumerate(ops):
        # `heard` gives some writes equal stamps by different authors.
        author = AUTHORS[who].public
        delta = delta_of(kind, replicas[who], author, item, flag, 10 * (time // 3) + who % 2)
        deltas.append(delta)
        replicas[who] = replicas[who].merge(delta)
        if heard > 2:
            replicas[other] = replicas[other].merge(replicas[who])
    return replicas, deltas


@pytest.mark.parametrize("kind", KINDS)
@given(ops=OPS, data=st.data())
@settings(max_examples=150)
def test_merge_is_a_join_and_deltas_give_one_state_in_any_order(
    kind: Any, ops: list[Any], data: Any
) -> None:
    (a, b, c), deltas = histories(kind, ops)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(a) == a
    assert a.merge(b).merge(a) == a.merge(b)
    assert a.merge(kind()) == a
    whole = a.merge(b).merge(c)
    order = data.draw(st.permutations([*deltas, *deltas[::2]]))
    other = kind()
    for delta in order:
        other = other.merge(delta)
    assert other == whole
    raw = msgspec.msgpack.encode(whole)
    assert msgspec.msgpack.decode(raw, type=kind) == whole


@given(ops=OPS, item=st.integers(0, 3))
def test_an_add_wins_over_a_removal_that_did_not_see_it(ops: list[Any], item: int) -> None:
    (a, b, _), _ = histories(OrSet, ops)
    add, removal = a.added(AUTHORS[0].public, item), b.removed(item)
    assert item in a.merge(add).merge(b.merge(removal))
    seen = b.merge(a.merge(add))
    assert item not in seen.merge(seen.removed(item))


@given(ops=OPS)
def test_a_set_keeps_no_tombstones(ops: list[Any]) -> None:
    """After everything is removed, what is left is one number per author."""
    (a, b, c), _ = histories(OrSet, ops)
    whole = a.merge(b).merge(c)
    for item in range(4):
        whole = whole.merge(whole.removed(item))
    assert whole.items == {}
    assert whole.apart == ()
    assert len(whole.seen) <= 3


@given(ops=OPS)
def test_counters_count_every_increment_once(ops: list[Any]) -> None:
    (a, b, c), _ = histories(PNCounter, ops)
    expected = sum(-item if flag else item for _, item, flag, _, _ in ops)
    assert a.merge(b).merge(c).merge(b).value == expected


def test_leases_expire_and_are_forgotten_and_an_older_one_does_not_come_back() -> None:
    me = AUTHORS[0].public
    long = ExpiringMap().held(me, (1, 0), "long", expires_ns=100)
    short = long.held(me, (2, 0), "short", expires_ns=50)
    both = long.merge(short)
    assert both.value(40) == {me: "short"}
    assert both.value(60) == {}
    assert both.pruned(60).merge(long).value(60) == {}
    assert both.pruned(101).leases == {}


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(-50, 50), st.integers(0, 30), st.integers(0, 9)),
        max_size=30,
    )
)
def test_hybrid_stamps_only_grow_and_stay_near_the_clocks(steps: list[Any]) -> None:
    clock, largest = HybridClock(), -(1 << 62)
    for tick, now_ns, ahead, count in steps:
        before = clock
        stamp = (now_ns + ahead, count)
        clock = clock.tick(now_ns) if tick else clock.observed(stamp, now_ns)
        largest = max(largest, now_ns, clock.time_ns if tick else stamp[0])
        assert clock.stamp > before.stamp
        assert tick or clock.stamp > stamp
        assert clock.time_ns <= largest
    assert HybridClock(5, MOST_COUNT).tick(5).stamp == (6, 0)
    assert HybridClock.too_far((101, 0), 90, 10)
    assert not HybridClock.too_far((100, 0), 90, 10)


# Nodes.


def written(me: Identity, dag: Dag, payload: bytes = b"x", now_ns: int = 1) -> Node:
    node = signed(me, dag.next(me.public, payload, now_ns=now_ns))
    assert dag.add(node.raw, now_ns) == "accepted"
    return node


def some_nodes(steps: list[tuple[int, int]], fork: bool) -> tuple[list[Node], list[Dag]]:
    dags = [Dag(Rules("s")) for _ in AUTHORS]
    nodes: list[Node] = []
    for time, (who, other) in enumerate(steps, 1):
        nodes.append(written(AUTHORS[who], dags[who], b"%d" % time, time))
        for raw in chosen(dags[who], (), dags[other].frontier, most_bytes=10**6):
            dags[other].add(raw, time)
    if fork:
        first = dags[0].next(AUTHORS[0].public, b"other", now_ns=100)
        made = [
            signed(AUTHORS[0], msgspec.structs.replace(first, payload=b"f%d" % k)) for k in (1, 2)
        ]
        made += [
            signed(
                AUTHORS[0],
                msgspec.structs.replace(
                    first, seq=first.seq + 1, parents=(made[1].id,), time_ns=101
                ),
            )
        ]
        nodes += made
    return nodes, dags


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12),
    fork=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=60)
def test_any_order_and_duplication_gives_one_digest(
    steps: list[tuple[int, int]], fork: bool, data: Any
) -> None:
    nodes, _ = some_nodes(steps, fork)
    in_order, shuffled = Dag(Rules("s")), Dag(Rules("s"))
    for node in nodes:
        in_order.add(node.raw, 200)
    for node in data.draw(st.permutations([*nodes, *nodes[::3]])):
        shuffled.add(node.raw, 200)
    assert len(in_order.log) == len(shuffled.log) == len(nodes)
    assert shuffled.digest == in_order.digest
    assert shuffled.forked == in_order.forked
    assert bool(in_order.forked) == fork
    assert {n.id for n in shuffled.log if shuffled.excluded(n)} == {
        n.id for n in in_order.log if in_order.excluded(n)
    }
    assert shuffled.pending == 0
    # One node less is another digest.
    if nodes:
        less = Dag(Rules("s"))
        for node in nodes[:-1]:
            less.add(node.raw, 200)
        assert less.digest != in_order.digest


def test_what_is_false_is_refused() -> None:
    me, other, dag = *AUTHORS[:2], Dag(Rules("s", ahead_s=10e-9))
    first = written(me, dag, now_ns=5)

    def content(**changed: Any) -> Content:
        return msgspec.structs.replace(dag.next(me.public, b"y", now_ns=6), **changed)

    good = content()
    for place in range(len(first.raw)):
        edited = first.raw[:place] + bytes([first.raw[place] ^ 4]) + first.raw[place + 1 :]
        assert dag.add(edited, 6) in ("malformed", "wrong signature")
    body = msgspec.msgpack.encode(good)
    assert dag.add(body + other.sign(b"shoal signed delta 1\0" + body), 6) == "wrong signature"
    assert dag.add(b"", 6) == "malformed"
    assert dag.add(signed(me, content(store="t")).raw, 6) == "of another store"
    assert dag.add(signed(me, content(seq=2)).raw, 6) == "wrong seq"
    assert dag.add(signed(me, content(seq=-1)).raw, 6) == "malformed"
    assert dag.add(signed(me, content(seq=0)).raw, 6) == "wrong seq"
    assert dag.add(signed(me, content(parents=())).raw, 6) == "wrong seq"
    assert dag.add(signed(me, content(time_ns=5, count=0)).raw, 6) == "stamp not above its parents'"
    assert dag.add(signed(me, content(time_ns=17)).raw, 6) == "early"
    assert dag.add(signed(me, content(payload=bytes(1 << 16))).raw, 6) == "too large"
    assert dag.add(signed(me, content(parents=(first.id,) * 17)).raw, 6) == "too many parents"
    assert len(dag.log) == 1
    # A stamp that was early is good once this peer's clock has come near.
    early = signed(me, content(time_ns=17))
    assert dag.add(early.raw, 7) == "accepted"
    assert dag.add(early.raw, 7) == "known"
    closed = Dag(Rules("s", authors=frozenset({other.public})))
    assert closed.add(first.raw, 6) == "author may not write"
    with pytest.raises(UsageError, match="another author"):
        signed(other, good)


def test_pending_is_bounded_for_each_author_alone() -> None:
    me, other, dag = *AUTHORS[:2], Dag(Rules("s", pending=4))
    writer = Dag(Rules("s"))
    first = written(other, writer)
    second = written(other, writer, now_ns=2)
    for number in range(10):
        bogus = Content("s", me.public, 1, (bytes([number]) * 32,), (), 3, 0, b"")
        outcome = dag.add(signed(me, bogus).raw, 3)
        assert outcome == ("pending" if number < 4 else "full")
    assert dag.add(second.raw, 3) == "pending"
    assert dag.add(first.raw, 3) == "accepted"
    assert [node.id for node in dag.log] == [first.id, second.id]
    assert dag.pending == 4


# Values over nodes.


def change(store: CrdtStore, me: Identity, key: str, kind: Any, delta: Any, now_ns: int) -> Node:
    node = signed(me, store.change(me.public, key, kind, delta, now_ns))
    assert store.dag.add(node.raw, now_ns) == "accepted"
    return node


def test_a_set_in_the_store_and_a_removal_that_has_seen_nothing() -> None:
    a, b, store = *AUTHORS[:2], CrdtStore(rules("s"))
    change(store, a, "set", OrSet, lambda v, s: v.added(a.public, "x"), 1)
    change(store, b, "set", OrSet, lambda v, s: v.removed("x"), 2)
    change(store, b, "set", OrSet, lambda v, s: v.added(b.public, "y"), 3)
    assert store.value("set", OrSet).value == {"y"}
    # The author b cannot take away a tag that a has yet to make.
    payload = msgspec.msgpack.encode(("set", "OrSet", OrSet({}, {}, ((a.public, 2),))))
    node = signed(b, store.dag.next(b.public, payload, now_ns=4))
    assert store.dag.add(node.raw, 4) == "a removal of tags that it has not seen"
    change(store, a, "set", OrSet, lambda v, s: v.added(a.public, "z"), 5)
    assert store.value("set", OrSet).value == {"y", "z"}


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_in_anothers_name_are_refused(kind: Any) -> None:
    a, b, store = *AUTHORS[:2], CrdtStore(rules("s"))
    content = store.change(
        a.public, "k", kind, lambda v, s: delta_of(kind, v, b.public, 1, False, s[0]), 1
    )
    assert "another author's name" in store.dag.add(signed(a, content).raw, 1)


def test_an_equivocator_is_left_out_from_its_first_double_on() -> None:
    a, b, store = *AUTHORS[:2], CrdtStore(rules("s"))
    change(store, a, "n", GCounter, lambda v, s: v.added(a.public, 1), 1)
    double = store.change(a.public, "n", GCounter, lambda v, s: v.added(a.public, 10), 2)
    twin = store.change(a.public, "n", GCounter, lambda v, s: v.added(a.public, 20), 3)
    store.dag.add(signed(a, double).raw, 3)
    change(store, b, "n", GCounter, lambda v, s: v.added(b.public, 100), 4)
    assert store.value("n", GCounter).value == 111
    assert store.dag.add(signed(a, twin).raw, 4) == "accepted"
    # What b built on the double counts; what a wrote before it counts, too.
    assert store.value("n", GCounter).value == 101
    other = CrdtStore(rules("s"))
    for node in reversed(store.dag.log):
        other.dag.add(node.raw, 4)
    assert other.value("n", GCounter) == store.value("n", GCounter)
    assert other.dag.digest == store.dag.digest
