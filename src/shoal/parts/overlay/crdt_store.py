"""Named CRDT values over a signed Merkle-DAG: what a replica holds, reads and writes.

Every write is a signed node whose payload is (key, delta). A value is the join of the deltas of all
accepted nodes, but for those of authors who wrote two histories, so it is a function of the set of
nodes: equal `Dag.digest`, equal values. Two authors that use one key for different kinds of values
have two values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from shoal.base.errors import UsageError
from shoal.parts.overlay.crdt import (
    Dot,
    ExpiringMap,
    GCounter,
    LwwMap,
    LwwRegister,
    OrSet,
    PNCounter,
    Value,
)
from shoal.parts.overlay.dag import Content, Dag, Find, Node, Rules
from shoal.parts.overlay.hybrid_clock import Stamp

V = TypeVar("V", bound=Value)

_KINDS: dict[str, Any] = {
    kind.__name__: kind  # type: ignore[attr-defined]
    for kind in (GCounter, PNCounter, LwwRegister, LwwMap, OrSet, ExpiringMap)
}
_KEY_BYTES = 256


class _Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    key: str
    kind: str
    delta: msgspec.Raw


@lru_cache(1 << 15)
def _payload(payload: bytes) -> tuple[str, Any] | None:
    """(key, delta) of a node; None for anything else. Pure, so replicas may share it."""
    try:
        read = msgspec.msgpack.decode(payload, type=_Payload)
        if read.kind not in _KINDS or len(read.key.encode()) > _KEY_BYTES:
            return None
        return read.key, msgspec.msgpack.decode(read.delta, type=_KINDS[read.kind])
    except (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError):
        return None


def check(node: Node, find: Find) -> str | None:
    """What is wrong with a node's payload: unreadable, a delta that its author may not make, or a
    removal of tags that it has not seen. Who has seen a tag can name the node that added it, whose
    hash nobody can know before; so each tag of others must be among those that the links added."""
    read = _payload(node.content.payload)
    if read is None:
        return "unreadable payload"
    key, delta = read
    wrong = delta.fault(node.content.author, node.content.stamp)
    if wrong is not None or not isinstance(delta, OrSet):
        return wrong
    foreign = {dot for dot in delta.removes() if dot[0] != node.content.author}
    for id in node.content.links:
        linked = find(id)
        adding = None if linked is None else _payload(linked.content.payload)
        if adding is not None and adding[0] == key and isinstance(adding[1], OrSet):
            foreign.difference_update(adding[1].adds())
    return "a removal of tags that it has not seen" if foreign else None


def rules(store: str, **settings: Any) -> Rules:
    """The `Rules` of a store of CRDT values."""
    return Rules(store, check=check, **settings)


class CrdtStore:
    """The values of one replica. Not durable and not connected by itself, see `AntiEntropy`.

    >>> from shoal.parts.overlay.dag import signed
    >>> from shoal.wire.identity import Identity
    >>> me = Identity.from_seed(bytes(32))
    >>> store = CrdtStore(rules("registry"))
    >>> node = signed(me, store.change(
    ...     me.public, "models", OrSet, lambda models, stamp: models.added(me.public, "v1"), 7))
    >>> store.dag.add(node.raw, now_ns=7), sorted(store.value("models", OrSet).value)
    ('accepted', ['v1'])
    """

    def __init__(self, rules: Rules) -> None:
        self.dag = Dag(rules)
        self._values: dict[tuple[str, str], Any] = {}
        self._adders: dict[tuple[str, Dot], bytes] = {}
        self._applied = 0
        self._forked: dict[bytes, int] = {}

    def value(self, key: str, kind: type[V]) -> V:
        """The value under a key, the empty one if nobody wrote any."""
        self._apply()
        found = self._values.get((key, kind.__name__))
        return kind() if found is None else found

    def values(self) -> Mapping[tuple[str, str], Value]:
        """All values by (key, name of the kind)."""
        self._apply()
        return self._values

    def change(
        self, author: bytes, key: str, kind: type[V], delta: Callable[[V, Stamp], V], now_ns: int
    ) -> Content:
        """What to sign for a change: `delta(value, stamp)` of the present value."""
        if not 0 < len(key.encode()) <= _KEY_BYTES:
            raise UsageError(f"key {key!r}: {len(key.encode())} bytes; need 1 to {_KEY_BYTES}")
        value = self.value(key, kind)
        made = delta(value, self.dag.clock.tick(now_ns).stamp)
        links: list[bytes] = []
        if isinstance(made, OrSet):
            foreign = [dot for dot in made.removes() if dot[0] != author]
            links = sorted({self._adders[key, dot] for dot in foreign})
        if len(links) > self.dag.rules.parents:
            raise UsageError(
                f"removal in {key!r}: {len(links)} authors added the element; a node takes "
                f"{self.dag.rules.parents} links (raise Rules.parents on all replicas)"
            )
        payload = msgspec.msgpack.encode((key, kind.__name__, made))
        return self.dag.next(author, payload, now_ns=now_ns, links=links)

    def _apply(self) -> None:
        """Join in what was accepted since the last look; from the start if an author was marked,
        since a join cannot be undone (once per author and first double seq)."""
        dag = self.dag
        if self._forked != dag.forked:
            self._forked = dict(dag.forked)
            self._values, self._adders, self._applied = {}, {}, 0
        for node in dag.log[self._applied :]:
            if not dag.excluded(node):
                self._join(node)
        self._applied = len(dag.log)

    def _join(self, node: Node) -> None:
        read = _payload(node.content.payload)
        assert read is not None, "an accepted node has a readable payload"
        key, delta = read
        place = (key, type(delta).__name__)
        known = self._values.get(place)
        self._values[place] = delta if known is None else known.merge(delta)
        if isinstance(delta, OrSet):
            for dot in delta.removes():
                self._adders.pop((key, dot), None)
            for dot in delta.adds():
                self._adders[key, dot] = node.id
