"""Faults as data: explicit, serialisable, sortable; every engine means the same by them.

A fault begins at `at` and ends at `until`, each in seconds since the start of the run (a number)
or at a round (`Round(12)`: the moment the first peer enters it). `who` names peers by id; empty
means everybody. Generators such as `churn` return explicit lists, so that a report can store, a
replay can repeat and an exploration can shrink them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from shoal.base import keyed
from shoal.base.errors import UsageError


@dataclass(frozen=True, order=True)
class Round:
    """The moment at which the first peer enters this round."""

    round: int


Moment = float | Round


@dataclass(frozen=True, kw_only=True)
class _Fault:
    who: tuple[int, ...] = ()
    at: Moment = 0.0
    until: Moment | None = None
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "who", tuple(dict.fromkeys(int(peer) for peer in self.who)))
        for name in ("at", "until"):
            value = getattr(self, name)
            if value is None:
                continue
            number = value.round if isinstance(value, Round) else value
            if not number >= 0 or math.isinf(number):
                raise UsageError(f"{self.kind}: {name}={value!r}; need a finite moment >= 0")
        if (
            self.until is not None
            and isinstance(self.until, Round) == isinstance(self.at, Round)
            and not self.until > self.at  # type: ignore[operator]
        ):
            raise UsageError(
                f"{self.kind}: until={self.until!r} is not after at={self.at!r} (swap them)"
            )


@dataclass(frozen=True, kw_only=True)
class Crash(_Fault):
    """Peers stop at once; messages in flight from and to them are lost. At `until` they restart,
    with their store ("kept") or without it ("lost")."""

    store: str = "kept"
    kind: ClassVar[str] = "crash"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store not in ("kept", "lost"):
            raise UsageError(f"crash: store={self.store!r}; need 'kept' or 'lost'")


@dataclass(frozen=True, kw_only=True)
class Join(_Fault):
    """Peers that are absent from the start until `at`; they are in everybody's roster."""

    kind: ClassVar[str] = "join"

    def __post_init__(self) -> None:
        super().__post_init__()
        _for_good(self)


@dataclass(frozen=True, kw_only=True)
class Leave(_Fault):
    """Peers are told to go: `Leaving` is thrown into their program; then they have `grace_s`."""

    grace_s: float = 1.0
    kind: ClassVar[str] = "leave"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.grace_s < math.inf:
            raise UsageError(f"leave: grace_s={self.grace_s}; need a finite number >= 0")
        _for_good(self)


def _for_good(fault: _Fault) -> None:
    if fault.until is not None:
        raise UsageError(
            f"{fault.kind}: until={fault.until!r}; it has no end (use crash for peers that go and "
            "come back)"
        )


@dataclass(frozen=True, kw_only=True)
class Partition(_Fault):
    """Nothing passes between `who` and the others; with `one_way`, nothing passes out of `who`."""

    one_way: bool = False
    kind: ClassVar[str] = "partition"


@dataclass(frozen=True, kw_only=True)
class Slow(_Fault):
    """Computations of these peers take `factor` times as long."""

    factor: float = 10.0
    kind: ClassVar[str] = "slow"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < math.inf:
            raise UsageError(f"slow: factor={self.factor}; need a positive number")


@dataclass(frozen=True, kw_only=True)
class Loss(_Fault):
    """Each message from or to these peers is lost with this extra probability."""

    probability: float = 0.1
    kind: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.probability <= 1:
            raise UsageError(f"loss: probability={self.probability}; need a number in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Hold(_Fault):
    """Messages from or to these peers are kept back and arrive at `until` at the earliest."""

    kind: ClassVar[str] = "hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until is None:
            raise UsageError("hold: no until; held messages need a moment of release (give one)")


@dataclass(frozen=True, kw_only=True)
class Skew(_Fault):
    """The clocks of these peers show `offset_s` more and run `drift` faster (1e-4 = 100 ppm).

    At `until` they are set right again.
    """

    offset_s: float = 0.0
    drift: float = 0.0
    kind: ClassVar[str] = "skew"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -math.inf < self.offset_s < math.inf:
            raise UsageError(f"skew: offset_s={self.offset_s}; need a finite number")
        if not -0.5 <= self.drift <= 0.5:
            raise UsageError(f"skew: drift={self.drift}; need a number in [-0.5, 0.5]")


@dataclass(frozen=True, kw_only=True)
class Corrupt(_Fault):
    """Each message from these peers has one bit flipped on the wire with this probability.

    What no longer decodes is dropped and counted; what still does arrives changed.
    """

    probability: float = 0.1
    kind: ClassVar[str] = "corrupt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.probability <= 1:
            raise UsageError(f"corrupt: probability={self.probability}; need a number in [0, 1]")


Fault = Crash | Join | Leave | Partition | Slow | Loss | Hold | Skew | Corrupt
KINDS: dict[str, type[Any]] = {
    cls.kind: cls for cls in (Crash, Join, Leave, Partition, Slow, Loss, Hold, Skew, Corrupt)
}


def to_data(fault: Fault) -> dict[str, Any]:
    """A fault as plain data, defaults left out; `from_data` is the inverse.

    >>> to_data(Crash(who=(1,), at=Round(3)))
    {'kind': 'crash', 'who': [1], 'at': {'round': 3}}
    """
    data: dict[str, Any] = {"kind": fault.kind}
    for each in fields(fault):
        value = getattr(fault, each.name)
        if each.default is not MISSING and value == each.default and each.name != "at":
            continue
        if isinstance(value, Round):
            value = {"round": value.round}
        elif isinstance(value, tuple):
            value = list(value)
        data[each.name] = value
    return data


def from_data(data: Mapping[str, Any]) -> Fault:
    """Plain data to a fault; UsageError names the key that is wrong."""
    kind = data.get("kind")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise UsageError(f"fault: kind={kind!r}; need one of {', '.join(KINDS)}")
    known = {each.name for each in fields(cls)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "kind":
            continue
        if name not in known:
            raise UsageError(f"{kind}: unknown setting {name!r}; it has {', '.join(sorted(known))}")
        if isinstance(value, Mapping):
            if set(value) != {"round"} or not isinstance(value["round"], int):
                raise UsageError(f"{kind}: {name}={dict(value)!r}; need seconds or {{round = n}}")
            value = Round(value["round"])
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)


def check(faults: Iterable[Fault], peers: int) -> tuple[Fault, ...]:
    """The list, checked against the number of peers; `who=()` becomes everybody."""
    checked = []
    for fault in faults:
        wrong = [peer for peer in fault.who if not 0 <= peer < peers]
        if wrong:
            raise UsageError(f"{fault.kind}: no peer {wrong[0]}; there are 0..{peers - 1}")
        if not fault.who:
            fault = type(fault)(**{**vars(fault), "who": tuple(range(peers))})
        checked.append(fault)
    return tuple(checked)


def churn(rate_per_s: float, peers: int, horizon_s: float, seed: int, *,
          down_s: float = 30.0) -> tuple[Crash, ...]:  # fmt: skip
    """Crashes as a Poisson process of `rate_per_s` over all peers, each down for an exponential
    time of mean `down_s`.

    >>> churn(0.1, 10, 100.0, seed=1) == churn(0.1, 10, 100.0, seed=1)
    True
    """
    if not (rate_per_s > 0 and down_s > 0):
        raise UsageError(f"churn: rate_per_s={rate_per_s}, down_s={down_s}; need positive numbers")
    made: list[Crash] = []
    up_again = [0.0] * peers
    now, step = 0.0, 0
    while True:
        now -= math.log1p(-keyed.uniform(seed, "churn", step, 0)) / rate_per_s
        if now >= horizon_s:
            return tuple(made)
        peer = int(keyed.uniform(seed, "churn", step, 1) * peers)
        down = -math.log1p(-keyed.uniform(seed, "churn", step, 2)) * down_s
        if now >= up_again[peer]:
            up_again[peer] = now + max(down, 1e-3)
            made.append(Crash(who=(peer,), at=now, until=up_again[peer]))
        step += 1
