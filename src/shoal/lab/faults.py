"""Faults as data: who, what, from when until when; the form in which files and reports keep them.

The engines' own fault classes are in `shoal.world.faults`; `launch` makes them of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.lab.values import Path, Unfit, Where, fit, freeze, near, refuse, thaw


@dataclass(frozen=True, order=True)
class Round:
    """A moment: when the first peer enters this round (0 is the first one)."""

    round: int


Moment = float | Round

# kind -> its own settings and their types.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "crash": {"store": Literal["kept", "lost"]},
    "join": {},
    "leave": {"grace_s": float},
    "partition": {"groups": tuple[tuple[int, ...], ...]},
    "slow": {"factor": float},
    "loss": {"probability": float},
    "hold": {},
    "skew": {"offset_s": float, "drift": float},
    "corrupt": {"probability": float},
}
_COMMON = ("kind", "who", "count", "fraction", "by", "spare", "at", "until")


@dataclass(frozen=True)
class FaultSetting:
    """One fault. Whom it meets is given as ids, as a count, or as a fraction of the peers.

    who: ids; count, fraction: that many peers drawn by key, `spare` excluded; by: the word of that
    draw, so that two faults with one word meet the same peers (crash some, later let them join).
    at, until: seconds since the start, or `Round(n)`; until None = for good.
    settings: what the kind needs, see `KINDS`.

    >>> FaultSetting("crash", fraction=0.5, at=Round(3)).resolved(4, seed=1).who
    (0, 2)
    """

    kind: str
    who: tuple[int, ...] | None = None
    count: int | None = None
    fraction: float | None = None
    by: str = ""
    spare: tuple[int, ...] = ()
    at: Moment = 0.0
    until: Moment | None = None
    settings: Any = ()

    def __post_init__(self) -> None:
        if isinstance(self.settings, Mapping):
            object.__setattr__(self, "settings", freeze(self.settings))
        if self.who is not None:
            object.__setattr__(self, "who", tuple(sorted(set(self.who))))
        problem = _problem(vars(self))
        if problem:
            raise UsageError("fault {}: {} = {!r}; {} ({})".format(self.kind, *problem))

    def resolved(self, peers: int, seed: int, index: int = 0) -> FaultSetting:
        """The same fault with explicit ids, for this many peers and this seed."""
        if self.who is not None:
            beyond = [peer for peer in self.who if not 0 <= peer < peers]
            if beyond:
                raise UsageError(
                    f"fault {self.kind}: who holds {beyond[0]}; there are {peers} peers, "
                    f"0 to {peers - 1} (raise peers, or name another one)"
                )
            return self
        if self.kind == "partition" and self.count is None and self.fraction is None:
            groups = dict(self.settings)["groups"]
            return replace(self, who=tuple(peer for group in groups for peer in group))
        pool = [peer for peer in range(peers) if peer not in self.spare]
        count = self.count
        if count is None:
            assert self.fraction is not None
            count = min(len(pool), math.floor(self.fraction * peers + 0.5))
        if count > len(pool):
            raise UsageError(
                f"fault {self.kind}: count={count}; only {len(pool)} of {peers} peers may be met "
                "(lower count, or spare fewer)"
            )
        word = self.by or f"fault {index}"
        pool.sort(key=lambda peer: (keyed.uniform(seed, "who", word, peer), peer))
        who = tuple(sorted(pool[:count]))
        return replace(self, who=who, count=None, fraction=None, by="", spare=())

    def to_json(self) -> dict[str, Any]:
        """Plain data; `read_fault` is the inverse."""
        out: dict[str, Any] = {"kind": self.kind}
        for name in ("who", "count", "fraction"):
            if getattr(self, name) is not None:
                out[name] = thaw(getattr(self, name))
        if self.by:
            out["by"] = self.by
        if self.spare:
            out["spare"] = list(self.spare)
        for name in ("at", "until"):
            moment = getattr(self, name)
            if moment is not None:
                out[name] = {"round": moment.round} if isinstance(moment, Round) else moment
        return out | {key: thaw(value) for key, value in self.settings}

    def describe(self) -> str:
        """One line for people, such as `crash of 33% of the peers at round 30`."""
        if self.who is not None:
            whom = f"peers {', '.join(map(str, self.who))}" if len(self.who) <= 6 else (
                f"{len(self.who)} peers"
            )
        elif self.count is not None:
            whom = f"{self.count} peers"
        else:
            whom = f"{100 * (self.fraction or 0):g}% of the peers"
        text = f"{self.kind} of {whom} at {_moment(self.at)}"
        if self.until is not None:
            text += f" until {_moment(self.until)}"
        extra = ", ".join(f"{k}={thaw(v)}" for k, v in self.settings)
        return f"{text} ({extra})" if extra else text


def _moment(moment: Moment) -> str:
    return f"round {moment.round}" if isinstance(moment, Round) else f"{moment:g} s"


def _problem(fault: Mapping[str, Any]) -> tuple[str, Any, str, str] | None:
    """The first broken rule as (key, value, rule, repair)."""
    kind, settings = fault["kind"], dict(fault["settings"])
    if kind not in KINDS:
        return ("kind", kind, f"need one of {', '.join(KINDS)}", near(kind, KINDS))
    given = [n for n in ("who", "count", "fraction") if fault.get(n) is not None]
    if len(given) > 1 or (not given and "groups" not in settings):
        return ("who", given, "need exactly one of who, count, fraction", "give one of them")
    if (count := fault.get("count")) is not None and count < 0:
        return ("count", count, "need 0 or more", "count peers from 0")
    if (fraction := fault.get("fraction")) is not None and not 0.0 <= fraction <= 1.0:
        return ("fraction", fraction, "need a number from 0 to 1", "0.3 is 30%")
    at, until = fault.get("at", 0.0), fault.get("until")
    for name, moment in (("at", at), ("until", until)):
        if moment is not None and not _number(moment) >= 0:
            return (name, _number(moment), "need a time that is not negative", "0 is the start")
    if until is not None and type(until) is type(at) and not _number(until) >= _number(at):
        return ("until", _number(until), f"need a moment after at = {_number(at)}", "swap them")
    for key, value in settings.items():
        if key not in KINDS[kind]:
            return (key, value, f"a {kind} has no such setting", near(key, KINDS[kind]))
        if key == "probability" and not 0 <= value <= 1:
            return (key, value, "need a number from 0 to 1", "0.3 is 30%")
        if key == "factor" and not value > 0:
            return (key, value, "need a positive number", "2 is twice as slow")
    return None


def _number(moment: Moment) -> float:
    return moment.round if isinstance(moment, Round) else moment


def read_fault(data: Any, where: Where, path: Path) -> FaultSetting:
    """A fault from a TOML or JSON table; errors name the place."""
    if isinstance(data, FaultSetting):
        return data
    if not isinstance(data, Mapping):
        refuse(where, path, data, "need a table", 'such as { kind = "crash", count = 1, at = 5 }')
    kind = data.get("kind")
    if kind not in KINDS:
        repair = near(kind, KINDS) if isinstance(kind, str) else "set kind"
        refuse(where, (*path, "kind"), kind, f"need one of {', '.join(KINDS)}", repair)
    hints = {
        "who": tuple[int, ...], "count": int, "fraction": float, "by": str,
        "spare": tuple[int, ...],
    }  # fmt: skip
    fields: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for key, value in data.items():
        here = (*path, key)
        known = {**hints, **KINDS[kind]}
        if key == "kind":
            continue
        if key in ("at", "until"):
            fields[key] = _read_moment(value, where, here)
        elif key in known:
            try:
                target = settings if key in KINDS[kind] else fields
                target[key] = fit(value, known[key])
            except Unfit as error:
                refuse(where, here, value, str(error), "change the value")
        else:
            repair = near(key, [*_COMMON, *KINDS[kind]])
            refuse(where, here, value, f"a {kind} has no such setting", repair)
    problem = _problem({"kind": kind, "settings": settings, **fields})
    if problem:
        refuse(where, (*path, problem[0]), *problem[1:])
    return FaultSetting(kind, **fields, settings=freeze(settings))


def _read_moment(value: Any, where: Where, path: Path) -> Moment | None:
    if value is None or isinstance(value, Round):
        return value
    if isinstance(value, Mapping) and set(value) == {"round"}:
        try:
            return Round(fit(value["round"], int))
        except Unfit as error:
            refuse(where, path, value["round"], str(error), "count rounds from 0")
    try:
        return fit(value, float)
    except Unfit:
        refuse(where, path, value, "need seconds or { round = n }", "write at = 12.5")
