"""NAT boxes as tables: which external endpoint a sender gets, and who may answer to it.

The behaviours are those of RFC 4787 (Audet and Jennings 2007), sections 4 and 5. A box maps an
internal endpoint to an external one, and lets a packet in by what went out before; nothing here is
a probability. The classic names are those of RFC 3489, section 5:

    name              mapping                       filtering
    full cone         endpoint-independent          endpoint-independent
    restricted        endpoint-independent          address-dependent
    port-restricted   endpoint-independent          address-and-port-dependent
    symmetric         address-and-port-dependent    address-and-port-dependent
    public            no box

NAT boxes concern datagrams (`peer.datagrams`). `peer.send` stands for a transport that is connected
already, and passes them, unless a box says `messages=True`: then whoever is behind it can call
others, and needs a path to be called (`peer.paths`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from shoal.base import keyed
from shoal.base.errors import LimitReached, UsageError
from shoal.base.units import FOREVER, to_ns
from shoal.kernel.datagrams import Endpoint

INDEPENDENT = "endpoint-independent"
ADDRESS = "address-dependent"
PORT = "address-and-port-dependent"
BEHAVIOURS = (INDEPENDENT, ADDRESS, PORT)

CLASSIC: Mapping[str, tuple[str, str]] = {
    "full cone": (INDEPENDENT, INDEPENDENT),
    "restricted": (INDEPENDENT, ADDRESS),
    "port-restricted": (INDEPENDENT, PORT),
    "symmetric": (PORT, PORT),
}
"""name: (mapping, filtering)"""
PUBLIC = "public"

_FIRST_PORT = 1024
_PORTS = 65536 - _FIRST_PORT


@dataclass(frozen=True)
class NatBox:
    """A NAT box with the peers `who` behind it, as data.

    mapping: when two packets of one internal endpoint share an external one: always, when they go
    to one host, or only when they go to one endpoint. filtering: who may send in through a mapping:
    anybody, hosts or endpoints that it was used towards. lifetime_s: how long a mapping, and what
    it lets in, lasts after the last packet OUT (RFC 4787 REQ-5 demands 120 s or more; inbound
    traffic refreshes nothing, REQ-6). hairpin: whether peers behind the box reach each other by
    external endpoints. upnp: whether it gives a port that lets everybody in to who asks
    (`Socket.map_port`). messages: whether it holds up `peer.send`, too.

    >>> NatBox.classic("symmetric", who=(3,)).name
    'symmetric'
    """

    who: tuple[int, ...]
    mapping: str = INDEPENDENT
    filtering: str = PORT
    lifetime_s: float = 120.0
    hairpin: bool = False
    upnp: bool = False
    messages: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "who", tuple(dict.fromkeys(int(peer) for peer in self.who)))
        if not self.who:
            raise UsageError("NatBox: who=(); need at least one peer behind it")
        for name in ("mapping", "filtering"):
            if getattr(self, name) not in BEHAVIOURS:
                raise UsageError(
                    f"NatBox: {name}={getattr(self, name)!r}; need one of {', '.join(BEHAVIOURS)}"
                )
        if not 0 < self.lifetime_s < math.inf:
            raise UsageError(f"NatBox: lifetime_s={self.lifetime_s}; need a positive number")

    @classmethod
    def classic(cls, name: str, who: tuple[int, ...], **more: Any) -> NatBox:
        """A box of one of the classic kinds; "public" is no box."""
        if name not in CLASSIC:
            raise UsageError(f"NatBox: no kind {name!r}; there are {', '.join(CLASSIC)}")
        mapping, filtering = CLASSIC[name]
        return cls(who, mapping, filtering, **more)

    @property
    def name(self) -> str:
        """The classic name, or mapping and filtering."""
        both = (self.mapping, self.filtering)
        known = [name for name, kind in CLASSIC.items() if kind == both]
        return known[0] if known else " / ".join(both)


def to_data(box: NatBox) -> dict[str, Any]:
    """A box as plain data, defaults left out; `from_data` is the inverse.

    >>> to_data(NatBox((1,), hairpin=True))
    {'who': [1], 'hairpin': True}
    """
    data = {f.name: getattr(box, f.name) for f in fields(box) if getattr(box, f.name) != f.default}
    return data | {"who": list(box.who)}


def from_data(data: Mapping[str, Any]) -> NatBox:
    """Plain data to a box; UsageError names the key that is wrong."""
    known = [f.name for f in fields(NatBox)]
    for name in data:
        if name not in known:
            raise UsageError(f"NatBox: unknown setting {name!r}; it has {', '.join(known)}")
    if "who" not in data:
        raise UsageError("NatBox: no who (name the peers behind it)")
    return NatBox(**{**data, "who": tuple(data["who"])})


def check(boxes: Iterable[NatBox], peers: int) -> tuple[NatBox, ...]:
    """The boxes, checked against the number of peers; each peer is behind one box at most."""
    boxes = tuple(boxes)
    behind: set[int] = set()
    for box in boxes:
        for peer in box.who:
            if not 0 <= peer < peers:
                raise UsageError(f"NatBox: no peer {peer}; there are 0..{peers - 1}")
            if peer in behind:
                raise UsageError(f"NatBox: peer {peer} is behind two boxes (leave it in one)")
            behind.add(peer)
    return boxes


def placed(quotas: Mapping[str, Any], seed: int = 0, **more: Any) -> tuple[NatBox, ...]:
    """One box per peer, of exactly these numbers of each kind, placed by key.

    The quotas cover the peers 0, 1, ... as many as they add up to; "public" ones get no box. What
    is no kind is a setting of all boxes, such as `lifetime_s`, and so is `more`.

    >>> boxes = placed({"public": 1, "symmetric": 2, "full cone": 1}, seed=4)
    >>> sorted(box.name for box in boxes)
    ['full cone', 'symmetric', 'symmetric']
    """
    counts, settings = split(quotas)
    kinds = [kind for kind, number in counts.items() for _ in range(number)]
    order = sorted(range(len(kinds)), key=lambda peer: (keyed.uniform(seed, "nat", peer), peer))
    given = sorted(zip(order, kinds, strict=True))
    more = settings | more
    return tuple(NatBox.classic(k, who=(peer,), **more) for peer, k in given if k != PUBLIC)


SETTINGS: Mapping[str, type] = {
    "lifetime_s": float, "hairpin": bool, "upnp": bool, "messages": bool
}  # fmt: skip
"""What a box of a classic kind can be told, and its type."""


def split(quotas: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """Numbers by kind, and settings of the boxes.

    >>> split({"symmetric": 2, "messages": True})
    ({'symmetric': 2}, {'messages': True})
    """
    settings = {name: value for name, value in quotas.items() if name in SETTINGS}
    return {k: v for k, v in quotas.items() if k not in SETTINGS}, settings


class _Mapping:
    """An external port of one internal endpoint, and towards whom it was used until when."""

    __slots__ = ("ends_ns", "given", "internal", "key", "permits")

    def __init__(self, key: tuple[Any, ...], internal: Endpoint) -> None:
        self.key = key
        self.internal = internal
        self.ends_ns = 0
        self.given = False
        self.permits: dict[Any, int] = {}


class NatTable:
    """What one box remembers; times are integer nanoseconds that never go back.

    host: its external address. Ports are drawn by key, so that they are the same in every run and
    tell nothing about each other; a port that is taken is passed over. Permission to come in
    belongs to the mapping that was used on the way out, as in boxes that track connections; for
    endpoint-independent mapping that is the rule of RFC 4787 section 5.

    >>> table = NatTable(NatBox.classic("port-restricted", who=(0,)), "198.18.0.9")
    >>> inside, outside = Endpoint("10.0.0.1", 5000), Endpoint("198.18.0.1", 53)
    >>> mapped = table.outbound(inside, outside, 0)
    >>> table.inbound(mapped, outside, 1) == inside
    True
    >>> table.inbound(mapped, Endpoint("198.18.0.1", 54), 2) is None
    True
    """

    def __init__(self, box: NatBox, host: str, seed: int = 0) -> None:
        self.box = box
        self.host = host
        self._lifetime_ns = to_ns(box.lifetime_s)
        self._draws = keyed.fold(0, seed, "nat port", host)
        self._allocated = 0
        self._sweep_at = _PORTS // 2
        self._mappings: dict[tuple[Any, ...], tuple[int, _Mapping]] = {}
        self._given: dict[Endpoint, tuple[int, _Mapping]] = {}
        self._ports: dict[int, _Mapping] = {}

    def outbound(self, internal: Endpoint, remote: Endpoint, now_ns: int) -> Endpoint:
        """The external endpoint from which a packet to `remote` leaves; refreshes its mapping."""
        if self._given and (given := self._given.get(internal)) is not None:
            return Endpoint(self.host, given[0])
        mapping_kind = self.box.mapping
        if mapping_kind == INDEPENDENT:
            key: tuple[Any, ...] = (internal,)
        else:
            key = (internal, remote.host if mapping_kind == ADDRESS else remote)
        entry = self._mappings.get(key)
        if entry is None or entry[1].ends_ns <= now_ns:
            entry = self._fresh(key, internal, now_ns)
        port, mapping = entry
        mapping.ends_ns = ends = now_ns + self._lifetime_ns
        permit = self._permit(remote)
        # Taken out first: the oldest permission stands in front, so that expired ones can go.
        mapping.permits.pop(permit, None)
        while mapping.permits:
            oldest = next(iter(mapping.permits))
            if mapping.permits[oldest] > now_ns:
                break
            del mapping.permits[oldest]
        mapping.permits[permit] = ends
        return Endpoint(self.host, port)

    def inbound(self, external: Endpoint, remote: Endpoint, now_ns: int) -> Endpoint | None:
        """Where a packet from `remote` to one of the box's endpoints goes; None = dropped."""
        mapping = self._ports.get(external.port)
        if external.host != self.host or mapping is None or mapping.ends_ns <= now_ns:
            return None
        if mapping.permits.get(self._permit(remote), 0) <= now_ns and not mapping.given:
            return None
        return mapping.internal

    def owner(self, external: Endpoint, now_ns: int) -> Endpoint | None:
        """The internal endpoint that holds an external one now, whoever may send to it."""
        mapping = self._ports.get(external.port)
        return mapping.internal if mapping is not None and mapping.ends_ns > now_ns else None

    def map_port(self, internal: Endpoint) -> Endpoint | None:
        """A port that lets everybody in, until `unmap_port`; None without `upnp`.

        What leaves from the inner endpoint then leaves from that port, whatever the mapping.
        """
        if not self.box.upnp:
            return None
        entry = self._given.get(internal)
        if entry is None:
            key = ("given", internal)
            entry = self._given[internal] = self._fresh(key, internal, 0)
            entry[1].given, entry[1].ends_ns = True, FOREVER
        return Endpoint(self.host, entry[0])

    def unmap_port(self, internal: Endpoint) -> None:
        """Take back what `map_port` gave."""
        if (entry := self._given.pop(internal, None)) is not None:
            del self._ports[entry[0]], self._mappings[entry[1].key]

    def _permit(self, remote: Endpoint) -> Any:
        kind = self.box.filtering
        return None if kind == INDEPENDENT else remote.host if kind == ADDRESS else remote

    def _fresh(self, key: tuple[Any, ...], internal: Endpoint, now_ns: int) -> tuple[int, _Mapping]:
        expired = self._mappings.pop(key, None)
        if expired is not None:
            self._ports.pop(expired[0], None)
        if len(self._ports) >= self._sweep_at:
            self._sweep(now_ns)
        port = _FIRST_PORT + keyed.fold(self._draws, self._allocated) % _PORTS
        self._allocated += 1
        while port in self._ports:
            port = port + 1 if port < 65535 else _FIRST_PORT
        mapping = self._ports[port] = _Mapping(key, internal)
        self._mappings[key] = entry = (port, mapping)
        return entry

    def _sweep(self, now_ns: int) -> None:
        """Forget what has expired; a box out of ports is an error of the scenario."""
        for port, mapping in list(self._ports.items()):
            if mapping.ends_ns <= now_ns:
                del self._ports[port], self._mappings[mapping.key]
        taken = len(self._ports)
        if taken >= _PORTS - 1:
            raise LimitReached(
                f"NAT box {self.host}: {taken} mappings are in use and no port is left (put fewer "
                "peers behind it, or shorten lifetime_s)"
            )
        # Far enough from now, so that a port costs constant time on average.
        self._sweep_at = max(_PORTS // 2, min(_PORTS - 1, taken + (_PORTS - taken) // 4 + 1))
