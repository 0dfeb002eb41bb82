"""Faults as people write them: kind, whom it meets, from when until when.

`shoal.world.faults` holds the explicit faults that engines take, with ids. A `FaultSetting` may say
"a third of the peers" if it likes; `resolved` draws the ids, `explicit` makes the engines' fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.lab.values import Path, Unfit, Where, fit, freeze, near, refuse, thaw
from shoal.world.faults import KINDS, Fault, Moment, Round

# Keys of every fault's table; a kind's own settings are the further fields of its class.
_COMMON: Mapping[str, Any] = {
    "who": tuple[int, ...], "count": int, "fraction": float, "by": str, "spare": tuple[int, ...],
}  # fmt: skip


def settings_of(kind: str) -> dict[str, Any]:
    """A kind's own settings and their types."""
    hints = get_type_hints(KINDS[kind])
    return {f.name: hints[f.name] for f in fields(KINDS[kind]) if f.name not in _SHARED}


_SHARED = ("who", "at", "until")


@dataclass(frozen=True)
class FaultSetting:
    """One fault. Whom it meets is given as ids, as a count, or as a fraction of the peers.

    who: ids; count, fraction: that many peers drawn by key, `spare` excluded; by: the word of that
    draw, so that two faults with one word meet the same peers (crash some, later let them join).
    at, until: seconds since the start, or `Round(n)`; until None = for good.
    settings: what the kind has besides, see `shoal.world.faults`.

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
            key, value, rule, repair = problem
            raise UsageError(f"fault {self.kind}: {key} = {value!r}; {rule} ({repair})")

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

    def explicit(self) -> Fault:
        """The fault that engines take; the ids must be explicit (see `resolved`)."""
        if self.who is None:
            raise UsageError(f"fault {self.kind}: whom it meets is not drawn yet (call resolved)")
        return KINDS[self.kind](who=self.who, at=self.at, until=self.until, **dict(self.settings))

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
            whom = (
                f"peers {', '.join(map(str, self.who))}"
                if len(self.who) <= 6
                else (f"{len(self.who)} peers")
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
    if len(given) != 1:
        return ("who", given, "need exactly one of who, count, fraction", "1.0 is everybody")
    if (count := fault.get("count")) is not None and count < 0:
        return ("count", count, "need 0 or more", "count peers from 0")
    if (fraction := fault.get("fraction")) is not None and not 0.0 <= fraction <= 1.0:
        return ("fraction", fraction, "need a number from 0 to 1", "0.3 is 30%")
    if any(peer < 0 for peer in fault.get("who") or ()):
        return ("who", fault["who"], "need ids from 0", "name other peers")
    for key, value in settings.items():
        if key not in settings_of(kind):
            return (key, value, f"a {kind} has no such setting", near(key, settings_of(kind)))
    moments = {"at": fault.get("at", 0.0), "until": fault.get("until")}
    try:
        # The kind's own class knows its rules.
        KINDS[kind](who=(0,), **moments, **settings)
    except UsageError as error:
        text = str(error).removeprefix(f"{kind}: ")
        named = [k for k in (*settings, "until", "at") if text.startswith((f"{k}=", f"no {k}"))]
        key = named[0] if named else "kind"
        value = {**settings, **moments, "kind": kind}[key]
        found = re.fullmatch(r"(?:[^;]*; )?(.*?)(?: \(([^()]*)\))?", text)
        assert found is not None
        return (key, value, found[1], found[2] or "change the value")
    return None


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
    own = settings_of(kind)
    values: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for key, value in data.items():
        here = (*path, key)
        if key == "kind":
            continue
        if key in ("at", "until"):
            values[key] = _read_moment(value, where, here)
        elif key in own or key in _COMMON:
            try:
                hint = own[key] if key in own else _COMMON[key]
                (settings if key in own else values)[key] = fit(value, hint)
            except Unfit as error:
                refuse(where, here, value, str(error), "change the value")
        else:
            repair = near(key, ["kind", "at", "until", *_COMMON, *own])
            refuse(where, here, value, f"a {kind} has no such setting", repair)
    problem = _problem({"kind": kind, "settings": settings, **values})
    if problem:
        refuse(where, (*path, problem[0]), *problem[1:])
    return FaultSetting(kind, **values, settings=freeze(settings))


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
