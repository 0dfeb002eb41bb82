"""Parts from their settings: what a scenario names becomes the objects that an engine takes."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.scenario import ROLES, Part, Scenario
from shoal.lab.torch_device import resolved
from shoal.lab.values import Unfit, Where, fit, near, refuse
from shoal.world.faults import Fault


@dataclass(frozen=True)
class Pieces:
    """A scenario's live objects. None = not given; the engine has a default or needs none."""

    task: Any
    topology: Any
    exchange: Any
    aggregator: Any
    transform: Any
    attack: Any
    byzantine: tuple[int, ...]
    links: Any
    device: Any
    faults: tuple[Fault, ...]


def build(scenario: Scenario) -> Pieces:
    """Make every part of a scenario.

    Settings that a part has but the scenario left out are filled in from the scenario where the
    meaning is the same (see `surroundings`), and the topology.
    """
    if scenario.rounds is None and scenario.seconds is None:
        raise UsageError(
            f"Scenario {scenario.name!r}: neither rounds nor seconds is set; a run needs a horizon "
            "(set rounds = 50, or seconds = 600)"
        )
    made: dict[str, Any] = {}
    byzantine = scenario.byzantine_peers()
    around = surroundings(scenario)
    for field in ROLES:
        value = getattr(scenario, field)
        if isinstance(value, Part):
            value = make(field, value, around)
        made[field] = value
        if field == "topology" and value is not None:
            around["topology"] = value
    faults = tuple(fault.explicit() for fault in scenario.explicit_faults())
    return Pieces(**made, byzantine=byzantine, faults=faults)


def surroundings(scenario: Scenario) -> dict[str, Any]:
    """What parts may take from their scenario: `peers`, `seed`, `device`, how many peers are
    Byzantine (`byzantine`) and which (`faulty`), and `rounds` if it has a number of them."""
    faulty = scenario.byzantine_peers()
    horizon = {} if scenario.rounds is None else {"rounds": scenario.rounds}
    return horizon | {
        "peers": scenario.peers, "seed": scenario.seed,
        "device": resolved(scenario.engine.device),
        "byzantine": len(faulty), "faulty": faulty,
    }  # fmt: skip


def topology_of(scenario: Scenario) -> Any:
    """The topology that a scenario describes, for its seed; UsageError when it names none."""
    if scenario.topology is None:
        raise UsageError(f"Scenario {scenario.name!r}: no topology (set topology = 'ring')")
    if not isinstance(scenario.topology, Part):
        return scenario.topology
    return make("topology", scenario.topology, surroundings(scenario))


def make(field: str, part: Part, around: Mapping[str, Any], where: Where | None = None) -> Any:
    """The object that a part describes; `around` fills settings that it leaves out."""
    base, cls = _find(field, part.name, where)
    settings = check_part(field, part, where)
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    for name, value in around.items():
        if name in known and name not in settings and (base is None or name == "seed"):
            settings[name] = value
    try:
        return dataclasses.replace(base, **settings) if base is not None else cls(**settings)
    except UsageError as error:
        place = f"{where((field,))}: " if where else ""
        raise UsageError(f"{place}{field}: {error}") from error
    except TypeError as error:
        place = where((field,)) if where else "Scenario"
        raise UsageError(f"{place}: {field} = {part.describe()}; {error} (add it)") from error


def check_part(field: str, part: Part, where: Where | None = None) -> dict[str, Any]:
    """The settings of a part in the types of its class; a wrong name or type is a UsageError."""
    place = where or (lambda path: "Scenario")
    _, cls = _find(field, part.name, where)
    hints = _hints(cls)
    settings: dict[str, Any] = {}
    for key, value in part.settings:
        if key not in hints:
            rule = f"{field} {part.name} has no such setting"
            refuse(place, (field, key), value, rule, near(key, hints))
        try:
            settings[key] = fit(value, hints[key])
        except Unfit as error:
            refuse(place, (field, key), value, str(error), "change the value")
    return settings


def _find(field: str, name: str, where: Where | None) -> tuple[Any, type[Any]]:
    """(preset to start from or None, class) of a part of a scenario field."""
    role = ROLES[field]
    try:
        if role in ("links", "device"):
            return _find_world(role, name)
        from shoal import parts

        return None, parts.find(role, name)
    except UsageError as error:
        place = where((field, "name")) if where else "Scenario"
        raise UsageError(f"{place}: {field}: {error}") from None


def world_parts(role: str) -> dict[str, Any]:
    """Links and devices: dataclasses by class name, presets by the name of their function."""
    module = importlib.import_module(f"shoal.world.{role}")
    known: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if isinstance(value, type) and dataclasses.is_dataclass(value):
            known[key.lower()] = value
        elif callable(value) and not isinstance(value, type) and _is_preset(value):
            known[key] = value
    return known


def _find_world(role: str, name: str) -> tuple[Any, type[Any]]:
    known = world_parts(role)
    found = known.get(name)
    if found is None:
        raise UsageError(f"no {role} named {name!r} ({near(name, known)})")
    if isinstance(found, type):
        return None, found
    base = found()
    return base, type(base)


def _is_preset(function: Any) -> bool:
    import inspect

    return not [
        p for p in inspect.signature(function).parameters.values() if p.default is p.empty
    ] and str(function.__annotations__.get("return", "")) in ("Links", "Device")


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Settings of a part's class with their types (Any where a type cannot be resolved)."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:
        # The class names a type that it imports for type checkers only.
        hints = {}
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}


def check_apart(scenario: Scenario) -> None:
    """Raise UsageError for what peers in processes of their own cannot do.

    An attack that sees all honest vectors would find its own alone there, and send honest work.
    """
    attack = scenario.attack
    if not scenario.byzantine or not isinstance(attack, Part):
        return
    from shoal.rounds.attack import Knowledge

    _, cls = _find("attack", attack.name, None)
    if cls.knowledge is Knowledge.ALL:
        raise UsageError(
            f"attack {attack.name}: it sees the vectors of all honest peers, and a process has "
            "only its own (take one that needs no more, such as sign_flip, or another engine)"
        )


def check(scenario: Scenario, where: Where | None = None) -> None:
    """Check every part of a scenario, with places: names, settings, types and values.

    The task is checked but not made, since that may load a data set.
    """
    around = surroundings(scenario)
    for field in ROLES:
        part = getattr(scenario, field)
        if not isinstance(part, Part):
            continue
        check_part(field, part, where)
        if field != "task":
            value = make(field, part, around, where)
            if field == "topology":
                around["topology"] = value


def edges(scenario: Scenario) -> tuple[list[tuple[int, int]], int | None]:
    """Who is linked with whom in round 0 (each pair once), and the hub if there is one."""
    pieces = build(dataclasses.replace(scenario, task=None))
    pairs: set[tuple[int, int]] = set()
    hub = getattr(pieces.exchange, "hub", None)
    if pieces.exchange is not None:
        for hop in pieces.exchange.hops(0, scenario.seed):
            for target, row in enumerate(hop.sources.tolist()):
                pairs.update(
                    (min(source, target), max(source, target)) for source in row if source >= 0
                )
    elif pieces.topology is not None:
        for peer in range(scenario.peers):
            pairs.update(
                (min(peer, other), max(peer, other)) for other in pieces.topology.neighbors(peer)
            )
    return sorted(pairs), hub
