"""Everything that a run depends on, as data: task, peers, network, adversary, faults, horizon."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from shoal.base import keyed
from shoal.base.digest import bytes_digest
from shoal.base.errors import UsageError
from shoal.lab.faults import FaultSetting, read_fault
from shoal.lab.values import Path, Unfit, Where, fit, freeze, from_text, literal, near, refuse, thaw
from shoal.world.nat import CLASSIC, PUBLIC, SETTINGS, NatBox, split

# Scenario field -> role of the part that it takes (see `shoal.parts`); links and device are worlds.
ROLES: Mapping[str, str] = {
    "task": "tasks", "topology": "topology", "exchange": "exchange", "aggregator": "aggregate",
    "transform": "transform", "attack": "attack", "links": "links", "device": "device",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part by name, with its settings; its role is that of the field which holds it.

    >>> Part("trimmed_mean", {"trim": 2}).to_json()
    {'name': 'trimmed_mean', 'trim': 2}
    """

    name: str
    settings: Any = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", freeze(dict(self.settings)))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name} | {key: thaw(value) for key, value in self.settings}

    def describe(self) -> str:
        """One line for people, such as `dirichlet(alpha=0.3)`."""
        inside = ", ".join(f"{key}={thaw(value)}" for key, value in self.settings)
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class EngineSettings:
    """How a run is computed, not what: batching of local work, strict wire, torch device.

    processes: over how many the peers of a run on `live` are spread;
    device: where models live, such as "cpu" or "cuda:0"; "auto" is a GPU if there is one. What is
    stored of a run names the device that it ran on, so that a replay uses the same.
    """

    batching: Literal["lazy", "off"] = "lazy"
    strict: bool = False
    device: str = "auto"
    processes: int = 1


_HINTS: Mapping[str, Any] = {
    "name": str, "peers": int, "rounds": int | None, "seconds": float | None, "seed": int,
    "round_s": float | None, "eval_every": int, "eval_every_s": float | None,
    "eval_peers": int | None, "measures": tuple[str, ...], "byzantine": int | tuple[int, ...],
    "initial": Literal["common", "independent"],
}  # fmt: skip
_ENGINE_HINTS: Mapping[str, Any] = {
    "batching": Literal["lazy", "off"], "strict": bool, "device": str, "processes": int,
}  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A world to run in. Hashable; `from_json(to_json())` is the same scenario.

    peers: how many; rounds, seconds: the horizon, whichever comes first (a run needs one);
    round_s: length of a round, None = the engine derives it from links, device and sizes;
    eval_every: rounds between evaluations (0 = only at the end), eval_every_s: the same in seconds
    for programs without rounds; eval_peers: how many peers are evaluated, None = all; measures:
    what else is measured of the last mean model, such as "flatness" (parts of the role `measure`);
    byzantine: ids, or a count that is placed by key;
    initial: whether peers begin with common parameters, or each with its own random ones;
    nats: how many peers are behind a NAT box of each kind, the first ones, shuffled by key; the
    others are public; settings of all boxes, such as `messages`, stand beside the kinds (see
    `shoal.world.nat`);
    task ... device: `Part(name, settings)`, a name, or a live object from Python. With a live
    object the scenario works but is no data any more: it has no JSON form and cannot be replayed.

    >>> s = Scenario("demo", peers=8, rounds=3, topology=Part("ring"), byzantine=2)
    >>> Scenario.from_json(s.to_json()) == s, len(s.byzantine_peers())
    (True, 2)
    """

    name: str = ""
    peers: int = 16
    rounds: int | None = None
    seconds: float | None = None
    seed: int = 0
    round_s: float | None = None
    eval_every: int = 1
    eval_every_s: float | None = None
    eval_peers: int | None = None
    measures: tuple[str, ...] = ()
    task: Any = None
    topology: Any = None
    exchange: Any = None
    aggregator: Any = None
    transform: Any = None
    attack: Any = None
    byzantine: int | tuple[int, ...] = 0
    initial: Literal["common", "independent"] = "common"
    links: Any = None
    device: Any = None
    nats: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    faults: tuple[FaultSetting, ...] = ()
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        for name, role in ROLES.items():
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Part(value))
            elif isinstance(value, Mapping):
                settings = {key: v for key, v in value.items() if key != "name"}
                object.__setattr__(self, name, Part(value.get("name", role), settings))
        engine = self.engine
        if isinstance(engine, Mapping):
            object.__setattr__(self, "engine", EngineSettings())
            object.__setattr__(self, "engine", self._read("engine", engine, _owner))
        if not isinstance(self.byzantine, int):
            object.__setattr__(self, "byzantine", tuple(sorted(set(self.byzantine))))
        object.__setattr__(self, "nats", freeze(dict(self.nats)))
        faults = tuple(read_fault(f, _owner, ("faults", i)) for i, f in enumerate(self.faults))
        object.__setattr__(self, "faults", faults)
        for name, hint in _HINTS.items():
            try:
                fit(_plain(getattr(self, name)), hint)
            except Unfit as error:
                refuse(_owner, (name,), getattr(self, name), str(error), "change the value")
        problem = _problem(vars(self))
        if problem:
            refuse(_owner, *problem)

    def byzantine_peers(self) -> tuple[int, ...]:
        """Who is Byzantine; a count is placed by key: the same seed means the same peers."""
        if not isinstance(self.byzantine, int):
            return self.byzantine
        order = sorted(
            range(self.peers), key=lambda p: (keyed.uniform(self.seed, "byzantine", p), p)
        )
        return tuple(sorted(order[: self.byzantine]))

    def explicit_faults(self) -> tuple[FaultSetting, ...]:
        """The fault list with explicit ids, for this seed."""
        return tuple(f.resolved(self.peers, self.seed, i) for i, f in enumerate(self.faults))

    @property
    def live(self) -> tuple[str, ...]:
        """Fields that hold live objects, for which there is no JSON form."""
        return tuple(
            name for name in ROLES if not isinstance(getattr(self, name), (Part, type(None)))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: fields that differ from their defaults, parts as tables."""
        if self.live:
            raise UsageError(
                f"Scenario {self.name!r}: {self.live[0]} is a live object, which has no JSON form "
                f"(give Part(name, settings) to save, resume or replay it)"
            )
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ROLES:
                if value is not None:
                    out[f.name] = value.to_json()
            elif f.name == "faults":
                if value:
                    out["faults"] = [fault.to_json() for fault in value]
            elif f.name == "nats":
                if value:
                    out["nats"] = dict(value)
            elif f.name == "engine":
                if value != EngineSettings():
                    out["engine"] = dict(vars(value))
            elif value != f.default:
                out[f.name] = thaw(value)
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: Where | None = None) -> Scenario:
        """Inverse of `to_json`; a wrong key or value is a UsageError that names its place."""
        return cls().with_settings(data, where)

    def with_settings(self, changes: Mapping[str, Any], where: Where | None = None) -> Scenario:
        """A scenario with some settings changed.

        Keys are fields, or dotted: `task.alpha`, `engine.batching`. Values are plain data; a part
        is a name (its settings start afresh), a table with `name`, or a table without (which
        changes settings of the part that is there).
        """
        where = where or _owner
        merged: dict[str, Any] = {}
        for key, value in changes.items():
            head, _, rest = key.partition(".")
            if rest:
                before = merged.get(head, {})
                if isinstance(before, str):
                    before = {"name": before}
                merged[head] = {**before, rest: value}
            else:
                merged[head] = value
        new: dict[str, Any] = {}
        for key, value in merged.items():
            new[key] = self._read(key, value, where)
        problem = _problem({**vars(self), **new})
        if problem:
            refuse(where, *problem)
        return replace(self, **new)

    def _read(self, key: str, value: Any, where: Where) -> Any:
        path: Path = (key,)
        if key in ROLES:
            return read_part(value, getattr(self, key), ROLES[key], where, path)
        if key == "faults":
            if not isinstance(value, (list, tuple)):
                refuse(where, path, value, "need a list of tables", "write [[faults]]")
            return tuple(read_fault(f, where, (*path, i)) for i, f in enumerate(value))
        if key == "nats":
            if not isinstance(value, (Mapping, tuple)):
                refuse(where, path, value, "need a table", "write nats = { symmetric = 3 }")
            return freeze(dict(value))
        if key == "engine":
            if isinstance(value, EngineSettings):
                return value
            if not isinstance(value, Mapping):
                refuse(where, path, value, "need a table", 'write engine = { batching = "off" }')
            settings = {k: _fit(v, _ENGINE_HINTS, k, where, (*path, k)) for k, v in value.items()}
            return replace(self.engine, **settings)
        return _fit(value, _HINTS, key, where, path)

    def digest(self) -> str:
        """A name for the content, equal in every process."""
        return bytes_digest(json.dumps(self.to_json(), sort_keys=True).encode())


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python."""
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def _owner(path: Path) -> str:
    return "Scenario"


def _fit(value: Any, hints: Mapping[str, Any], key: str, where: Where, path: Path) -> Any:
    if key not in hints:
        known = [*hints, *(() if hints is _ENGINE_HINTS else (*ROLES, "nats", "faults", "engine"))]
        refuse(where, path, value, "there is no such setting", near(key, known))
    try:
        return fit(value, hints[key])
    except Unfit as error:
        refuse(where, path, value, str(error), "change the value")


def read_part(value: Any, before: Any, role: str, where: Where, path: Path) -> Any:
    """A part from a name, a table, or a live object (which passes through)."""
    if value is None or isinstance(value, Part):
        return value
    if isinstance(value, str):
        return Part(value)
    if not isinstance(value, Mapping):
        if isinstance(value, (int, float, list, tuple)):
            refuse(where, path, value, "need the name of a part or a table", 'write name = "..."')
        return value
    settings = {key: v for key, v in value.items() if key != "name"}
    if "name" in value:
        if not isinstance(value["name"], str):
            refuse(where, (*path, "name"), value["name"], "need a text", "give the part's name")
        return Part(value["name"], settings)
    if isinstance(before, Part):
        return Part(before.name, {**dict(before.settings), **settings})
    if before is None and role in ("links", "device"):
        return Part(role, settings)
    if before is None:
        refuse(where, path, dict(value), f"a {role} part needs a name", 'add name = "..."')
    refuse(where, path, dict(value), "the part is a live object", "make a new one in Python")


def _problem(values: Mapping[str, Any]) -> tuple[Path, Any, str, str] | None:
    """The first broken rule as (path, value, rule, repair)."""
    peers, rounds = values["peers"], values["rounds"]
    if peers < 1:
        return (("peers",), peers, "need at least 1", "raise peers")
    if rounds is not None and rounds < 1:
        return (("rounds",), rounds, "need at least 1", "raise rounds, or leave it out")
    for name in ("seconds", "round_s", "eval_every_s"):
        value = values[name]
        if value is not None and not value > 0:
            return ((name,), value, "need more than 0 seconds", f"raise {name}, or leave it out")
    if values["eval_every"] < 0:
        return (("eval_every",), values["eval_every"], "need 0 or more", "0 = only at the end")
    if problem := _nat_problem(dict(values["nats"]), peers):
        return problem
    count = values["eval_peers"]
    if count is not None and count < 1:
        return (("eval_peers",), count, "need at least 1", "leave it out to evaluate all")
    byzantine = values["byzantine"]
    if isinstance(byzantine, int):
        if not 0 <= byzantine <= peers:
            return (("byzantine",), byzantine, f"need 0 to {peers} peers", "lower byzantine")
    elif any(not 0 <= peer < peers for peer in byzantine):
        return (("byzantine",), byzantine, f"need ids from 0 to {peers - 1}", "name other peers")
    for index, fault in enumerate(values["faults"]):
        if any(not 0 <= peer < peers for peer in fault.who or ()):
            rule = f"need ids from 0 to {peers - 1}"
            return (("faults", index, "who"), fault.who, rule, "name other peers, or raise peers")
    return None


def _nat_problem(nats: dict[str, Any], peers: int) -> tuple[Path, Any, str, str] | None:
    counts, settings = split(nats)
    for name, value in settings.items():
        try:
            NatBox((0,), **{name: fit(value, SETTINGS[name])})
        except (Unfit, UsageError) as error:
            return (("nats", name), value, str(error), "change the value")
    for kind, count in counts.items():
        if kind not in (PUBLIC, *CLASSIC):
            repair = near(kind, [PUBLIC, *CLASSIC, *SETTINGS])
            return (("nats", kind), count, "there is no such NAT", repair)
        if isinstance(count, bool) or not (isinstance(count, int) and 0 <= count <= peers):
            return (("nats", kind), count, f"need 0 to {peers} peers", "lower it")
    if sum(counts.values()) > peers:
        return (("nats",), nats, f"there are {peers} peers", "raise peers")
    return None


def parse_settings(
    pairs: tuple[str, ...] | list[str], option: str = "--set", example: str = "task.alpha=0.1"
) -> dict[str, str]:
    """`["task.alpha=0.1"]` as a mapping of texts; each needs a key, an `=` and a value."""
    out: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {pair!r}; need key=value (such as {option} {example})")
        out[key.strip()] = text
    return out


def is_scenario_key(key: str) -> bool:
    """Whether a `--set` key belongs to the scenario (rather than to a system's settings)."""
    head = key.partition(".")[0]
    return (
        head in _HINTS
        or head in ROLES
        or head in ("engine", "faults", "nats")
        or key in _ENGINE_HINTS
    )


def typed(key: str, text: str) -> tuple[str, Any]:
    """A `--set` pair for a scenario: the full key, and the text read as the field's type."""
    if key in _ENGINE_HINTS and key not in ROLES:
        key = f"engine.{key}"
    head, _, rest = key.partition(".")
    if head in ROLES or head in ("faults", "nats"):
        return key, literal(text)  # typed by the part's own fields when it is built
    hint = _ENGINE_HINTS.get(rest, Any) if head == "engine" else _HINTS.get(head, Any)
    try:
        return key, from_text(text, hint)
    except Unfit as error:
        raise UsageError(f"--set {key}={text}; {error} (change the value)") from None
