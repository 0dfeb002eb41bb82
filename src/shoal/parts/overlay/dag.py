"""Signed deltas that name their predecessors by hash: a Merkle-DAG that any two replicas can unite.

A node is {store, author, seq, parents, links, stamp, payload} and its author's Ed25519 signature;
its id is the SHA-256 of all but the signature. Ids of parents are part of it, so the ids of the
heads (nodes without children) commit to the whole set of nodes: replicas with the same `digest`
hold the same nodes.

A replica accepts a node only when everything holds that follows from the node and its ancestors
alone: the signature, an author who may write, its predecessor by the same author as first parent
(so that `seq` is consecutive), a stamp above those of its parents, sizes, and what `Rules.check`
says of the payload. All replicas therefore agree on which nodes are good, in whatever order they
come. Only "early" (a stamp too far ahead of this peer's clock) and "store full" depend on the
moment or the replica; such a node is not kept, and is taken when it is offered again later.

Equivocation. Two nodes with one (author, seq) are proof that the author wrote two histories. Both
are kept, since others may have built on either, and the author is marked: `excluded` names its
nodes from the first double `seq` on. What a replica makes of its nodes must leave those out; that
is a function of the set of nodes, so replicas with the same digest agree on it as well.

Growth: nodes are never dropped, since any replica may come back and ask for any of them; a replica
keeps size + about 1 kB per delta ever written, and refuses what goes beyond `Rules.store_bytes`.
Whoever gets there writes what is current into a store of another name, and leaves the old one.

Sources: Kleppmann and Howard 2020, Byzantine eventual consistency (arXiv 2012.00472), sections 3
and 4; Kleppmann 2022, Making CRDTs Byzantine fault tolerant (PaPoC 2022); Yang et al. 2025, Lattica
(arXiv 2510.00183).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from shoal.base.errors import UsageError
from shoal.parts.overlay.hybrid_clock import MOST_COUNT, HybridClock, Stamp
from shoal.wire.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, verify

ID_BYTES = 32
_DOMAIN = b"shoal signed delta 1\0"
_REMEMBERED = 1 << 15


class Content(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is signed. store: the name of the replicated store, so that a delta of one cannot be
    replayed in another; seq: from 0; parents: the author's own last node first (none for seq 0),
    then other heads; links: nodes that the payload speaks of; payload: opaque here."""

    store: str
    author: bytes
    seq: int
    parents: tuple[bytes, ...]
    links: tuple[bytes, ...]
    time_ns: int
    count: int
    payload: bytes

    @property
    def stamp(self) -> Stamp:
        """The hybrid logical time of writing."""
        return self.time_ns, self.count

    @property
    def needed(self) -> tuple[bytes, ...]:
        """What must have been accepted before."""
        return (*self.parents, *self.links)


@dataclass(frozen=True, eq=False)
class Node:
    """A content with its id and the bytes that travel: content, then signature."""

    id: bytes
    content: Content
    raw: bytes


def signed(identity: Identity, content: Content) -> Node:
    """The node of a content. UsageError for a content in another author's name.

    >>> me = Identity.from_seed(bytes(32))
    >>> node = signed(me, Content("votes", me.public, 0, (), (), 1, 0, b"yes"))
    >>> read(node.raw).id == node.id, read(node.raw[:-1] + b"!")
    (True, 'wrong signature')
    """
    if content.author != identity.public:
        raise UsageError("signed: a content of another author (its author must be the signer)")
    body = msgspec.msgpack.encode(content)
    raw = body + identity.sign(_DOMAIN + body)
    return Node(hashlib.sha256(body).digest(), content, raw)


# A pure function of its argument, so that replicas in one process may share the work of checking a
# signature (0.1 ms) without learning anything from each other.
@lru_cache(_REMEMBERED)
def read(raw: bytes) -> Node | str:
    """The node in these bytes, or what is wrong: malformed, or not signed by its author."""
    body, signature = raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:]
    try:
        content = msgspec.msgpack.decode(body, type=Content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
        return "malformed"
    if len(content.author) != KEY_BYTES or any(len(id) != ID_BYTES for id in content.needed):
        return "malformed"
    if not verify(content.author, _DOMAIN + body, signature):
        return "wrong signature"
    return Node(hashlib.sha256(body).digest(), content, raw)


Find = Callable[[bytes], Node | None]


def _anything(node: Node, find: Find) -> str | None:
    return None


@dataclass(frozen=True)
class Rules:
    """What a replica accepts.

    store: whose nodes; authors: public keys that may write, None for all; check: what is wrong
    with a node's payload, given a look-up of accepted ancestors, or None: it must be a function of
    these alone; ahead_s: how far a stamp may lie ahead of this peer's clock, more than any two
    honest clocks differ; node_bytes: largest node; parents: most parents and most links of a node;
    pending: most nodes of one author that wait for ancestors (each author has its own, so that one
    who floods hurts only itself); store_bytes: of all accepted nodes together, the same on all
    replicas, or those with less room fall behind.
    """

    store: str
    authors: frozenset[bytes] | None = None
    check: Callable[[Node, Find], str | None] = _anything
    ahead_s: float = 10.0
    node_bytes: int = 1 << 16
    parents: int = 16
    pending: int = 64
    store_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.ahead_s < 0 or min(self.node_bytes, self.parents, self.pending) < 1:
            raise UsageError(
                f"Rules: ahead_s={self.ahead_s}, node_bytes={self.node_bytes}, parents="
                f"{self.parents}, pending={self.pending}; need no negative time and at least 1"
            )
        if self.store_bytes < self.node_bytes:
            raise UsageError(
                f"Rules: store_bytes={self.store_bytes} has no room for one node of "
                f"{self.node_bytes} bytes (raise it)"
            )


class Dag:
    """The nodes that one replica has accepted, in order of acceptance: ancestors come first.

    >>> me = Identity.from_seed(bytes(32))
    >>> a, b = Dag(Rules("votes")), Dag(Rules("votes"))
    >>> first = signed(me, a.next(me.public, b"yes", now_ns=5))
    >>> a.add(first.raw, now_ns=5)
    'accepted'
    >>> second = signed(me, a.next(me.public, b"no", now_ns=6))
    >>> b.add(second.raw, 7), b.add(first.raw, 7), len(b.log)
    ('pending', 'accepted', 2)
    >>> a.add(second.raw, 8), a.digest == b.digest
    ('accepted', True)
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.log: list[Node] = []
        self.forked: dict[bytes, int] = {}
        """by marked author: the first seq of which there are two nodes"""
        self.clock = HybridClock()
        self.refused: dict[str, int] = {}
        """how many nodes were turned away, by reason"""
        self.held_bytes = 0
        """of all accepted nodes"""
        self._nodes: dict[bytes, Node] = {}
        self._heads: dict[bytes, None] = {}
        self._chains: dict[bytes, list[Node]] = {}
        self._tips: dict[bytes, Node] = {}
        self._at: dict[tuple[bytes, int], bytes] = {}
        self._places: dict[bytes, int] = {}
        self._pending: dict[bytes, Node] = {}
        self._waiting: dict[bytes, list[bytes]] = {}
        self._held: dict[bytes, int] = {}
        self._digest: bytes | None = None

    # What is there.

    def find(self, id: bytes) -> Node | None:
        """The accepted node of that id."""
        return self._nodes.get(id)

    @property
    def heads(self) -> list[bytes]:
        """Ids of nodes without children, ascending."""
        return sorted(self._heads)

    @property
    def digest(self) -> bytes:
        """32 bytes that are equal exactly when the sets of nodes are."""
        if self._digest is None:
            self._digest = hashlib.sha256(b"".join(self.heads)).digest()
        return self._digest

    @property
    def frontier(self) -> dict[bytes, int]:
        """The largest seq of every author."""
        return {author: node.content.seq for author, node in self._tips.items()}

    @property
    def pending(self) -> int:
        """How many nodes wait for ancestors."""
        return len(self._pending)

    def missing(self) -> list[bytes]:
        """Ids that pending nodes need and that have not come, in the order of asking."""
        return [id for id in self._waiting if id not in self._pending]

    def excluded(self, node: Node) -> bool:
        """Whether a node counts for nothing, since its author wrote two histories."""
        first = self.forked.get(node.content.author)
        return first is not None and node.content.seq >= first

    def newer(self, frontier: Mapping[bytes, int], *, unknown: bool = True) -> list[Node]:
        """Nodes beyond that frontier, ancestors first; with `unknown` also those of authors that it
        does not name. Branches of a fork that are shorter than the frontier are not among them."""
        found: list[Node] = []
        for author, chain in self._chains.items():
            if author not in frontier and not unknown:
                continue
            known = frontier.get(author, -1)
            if author in self.forked:
                found += [node for node in chain if node.content.seq > known]
            else:
                found += chain[max(0, known + 1) :]
        found.sort(key=lambda node: self._places[node.id])
        return found

    # What comes in.

    def next(
        self, author: bytes, payload: bytes, *, now_ns: int, links: Iterable[bytes] = ()
    ) -> Content:
        """The content that this author would sign next, on top of all heads (of `Rules.parents` at
        most). Sign each `seq` once and make it durable before anybody else sees it: a second
        node of a `seq` marks its author for good."""
        own = self._tips.get(author)
        others = [id for id in self.heads if own is None or id != own.id]
        parents = [*([] if own is None else [own.id]), *others][: self.rules.parents]
        if own is None:
            # A first node has no ancestor among its parents that its author wrote.
            parents = [id for id in parents if self._nodes[id].content.author != author]
        time_ns, count = self.clock.tick(now_ns).stamp
        seq = 0 if own is None else own.content.seq + 1
        return Content(
            self.rules.store, author, seq, tuple(parents), tuple(links), time_ns, count, payload
        )

    def add(self, raw: bytes, now_ns: int | None) -> str:
        """Take a node in: "accepted", "known", "pending" (ancestors are missing), "early", "full"
        (too many nodes of its author are pending), or the reason for which it never can be taken.

        now_ns: this peer's clock; None for nodes from its own disk, which it has judged before.
        """
        if len(raw) > self.rules.node_bytes:
            return self._refuse("too large")
        node = read(bytes(raw))
        if isinstance(node, str):
            return self._refuse(node)
        if node.id in self._nodes:
            return "known"
        content, rules = node.content, self.rules
        if content.store != rules.store:
            return self._refuse("of another store")
        if rules.authors is not None and content.author not in rules.authors:
            return self._refuse("author may not write")
        if len(content.parents) > rules.parents or len(content.links) > rules.parents:
            return self._refuse("too many parents")
        if content.seq < 0 or not 0 <= content.count <= MOST_COUNT:
            return self._refuse("malformed")
        if now_ns is not None and HybridClock.too_far(
            content.stamp, now_ns, round(rules.ahead_s * 1e9)
        ):
            return self._refuse("early")
        if any(id not in self._nodes for id in content.needed):
            return self._wait(node)
        if self.held_bytes + len(node.raw) > rules.store_bytes:
            return self._refuse("store full")
        wrong = self._wrong(node)
        if wrong is not None:
            return self._refuse(wrong)
        self._accept(node)
        self._release(node.id)
        return "accepted"

    def _wrong(self, node: Node) -> str | None:
        """What is wrong with a node whose ancestors are here."""
        content = node.content
        parents = [self._nodes[id].content for id in content.parents]
        if content.seq == 0:
            # Not even as a later parent: a second first node would hide behind the chain.
            if any(parent.author == content.author for parent in parents):
                return "wrong seq"
        elif not parents or (parents[0].author, parents[0].seq + 1) != (
            content.author,
            content.seq,
        ):
            return "wrong seq"
        linked = (self._nodes[id].content for id in content.links)
        if any(each.stamp >= content.stamp for each in (*parents, *linked)):
            return "stamp not above its parents'"
        return self.rules.check(node, self.find)

    def _wait(self, node: Node) -> str:
        if node.id in self._pending:
            return "pending"
        author = node.content.author
        if self._held.get(author, 0) >= self.rules.pending:
            return self._refuse("full")
        self._held[author] = self._held.get(author, 0) + 1
        self._pending[node.id] = node
        for id in dict.fromkeys(node.content.needed):
            if id not in self._nodes:
                self._waiting.setdefault(id, []).append(node.id)
        return "pending"

    def _release(self, id: bytes) -> None:
        """Take in what waited for a node, and what waited for that."""
        ready = [id]
        while ready:
            for child in self._waiting.pop(ready.pop(), ()):
                node = self._pending.get(child)
                if node is None or any(need not in self._nodes for need in node.content.needed):
                    continue
                del self._pending[child]
                self._held[node.content.author] -= 1
                if self.held_bytes + len(node.raw) > self.rules.store_bytes:
                    self._refuse("store full")
                    continue
                wrong = self._wrong(node)
                if wrong is not None:
                    self._refuse(wrong)
                    continue
                self._accept(node)
                ready.append(child)

    def _accept(self, node: Node) -> None:
        content = node.content
        self._nodes[node.id] = node
        self._places[node.id] = len(self.log)
        self.held_bytes += len(node.raw)
        self.log.append(node)
        for parent in content.parents:
            self._heads.pop(parent, None)
        self._heads[node.id] = None
        self._digest = None
        self._chains.setdefault(content.author, []).append(node)
        tip = self._tips.get(content.author)
        if tip is None or content.seq > tip.content.seq:
            self._tips[content.author] = node
        twin = self._at.setdefault((content.author, content.seq), node.id)
        if twin != node.id:
            first = self.forked.get(content.author, content.seq)
            self.forked[content.author] = min(first, content.seq)
        self.clock = self.clock.seen(content.stamp)

    def _refuse(self, reason: str) -> str:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        return reason


def chosen(dag: Dag, ids: Collection[bytes], frontier: Mapping[bytes, int], *, most_bytes: int,
           unknown: bool = True) -> list[bytes]:  # fmt: skip
    """What to send to a replica that asks for these ids and has that frontier, raw: the ids first,
    then what is newer, ancestors first, of `most_bytes` at most."""
    asked = [node for id in ids if (node := dag.find(id)) is not None]
    out: dict[bytes, bytes] = {}
    size = 0
    for node in (*asked, *dag.newer(frontier, unknown=unknown)):
        if node.id not in out:
            size += len(node.raw)
            if size > most_bytes:
                break
            out[node.id] = node.raw
    return list(out.values())
