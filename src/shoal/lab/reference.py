"""Reference pages from the source text: every public signature, and every part by name.

A signature keeps what a reader needs (docstrings, fields, defaults, comments that state optional
promises) and drops the bodies. Doctests stay in the code, where they are run.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.scenario import ROLES

_PACKAGE = Path(__file__).parents[1]
# (heading, introduction, ((module, names), ...)); the order is that of the layers.
_CONTRACTS: tuple[tuple[str, str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    (
        "Peer programs",
        "What a program may touch. Engines differ in how time passes, not in any of this.",
        (
            ("base/ids.py", ("PeerId", "Tag", "ANY")),
            ("kernel/peer.py", ("Program", "Peer", "Envelope", "Cost", "Store")),
            ("kernel/tasks.py", ("TaskGroup", "TaskHandle")),
            ("kernel/datagrams.py", ("Datagrams", "Socket", "Endpoint")),
            ("kernel/paths.py", ("Paths", "RelayLimits")),
            ("base/limits.py", ("Limits",)),
        ),
    ),
    (
        "Messages",
        "What may be sent, and how big it is. Bytes are made in `shoal.wire.codec`.",
        (("wire/message.py", ("message", "Message", "Packed", "Segment")),),
    ),
    (
        "The seam to an engine",
        "What an engine offers to the kernel. Only a new engine needs it.",
        (("kernel/host.py", ("Host",)),),
    ),
    (
        "The world",
        "What surrounds the peers: data and formulas. What a run leaves behind.",
        (
            ("world/network.py", ("Network",)),
            ("world/topology.py", ("Topology",)),
            ("world/links.py", ("LinkModel", "Links", "lan", "wan", "home", "Measured")),
            ("world/device.py", ("DeviceModel", "Device")),
            (
                "world/faults.py",
                (
                    "Round", "_Fault", "Crash", "Join", "Leave", "Partition", "Slow", "Loss",
                    "Hold", "Skew", "Corrupt", "churn",
                ),
            ),
            ("world/record.py", ("Run", "Row", "Happening")),
        ),
    ),
    (
        "Tensors",
        "Shapes, flat parameters and keyed randomness.",
        (
            ("tensor/types.py", ("Vector", "Stack", "Mask", "Weight", "Scalar", "Key", "Index")),
            ("tensor/flat.py", ("FlatSpec",)),
            ("tensor/keyed.py", ("key_of", "fold", "uniform", "normal", "grid")),
        ),
    ),
    (
        "Rounds",
        "A round is `local -> encode -> exchange -> decode -> aggregate -> apply`. Each word is "
        "one axis and knows no other's class.",
        (
            ("rounds/strategy.py", ("Strategy", "Step", "Parcel", "Heard")),
            ("rounds/local.py", ("descend", "gradients", "Optimizer")),
            ("rounds/task.py", ("Task", "Shard", "Batch")),
            ("rounds/exchange.py", ("Exchange", "Hop")),
            ("rounds/aggregator.py", ("Aggregator",)),
            ("rounds/transform.py", ("Transform", "Payload")),
            ("rounds/attack.py", ("Attack", "View", "Knowledge")),
            ("rounds/method.py", ("Method",)),
            ("rounds/adapter.py", ("Rounds",)),
            ("rounds/workload.py", ("Workload",)),
        ),
    ),
    (
        "Engines",
        "`shoal.run` picks one; these are the direct calls.",
        (
            ("engine/event/simulation.py", ("simulate", "EventSettings")),
            ("engine/lockstep/lockstep.py", ("run_lockstep", "LockstepSettings")),
            ("engine/lockstep/checkpoint.py", ("Checkpoint",)),
            ("engine/live/launch.py", ("run_live",)),
            ("engine/live/settings.py", ("LiveSettings",)),
            ("engine/live/join.py", ("join_live",)),
            ("engine/live/joining.py", ("Joining", "Status")),
            ("engine/live/fleet.py", ("FleetSettings",)),
            ("engine/executor.py", ("Executor",)),
        ),
    ),
    (
        "Parts",
        "Found by name; see [the list](parts.md).",
        (
            ("parts/__init__.py", ("roles", "names", "find")),
            ("parts/tasks/base.py", ("task_of",)),
            ("parts/tasks/_splits.py", ("Split", "shards_of")),
        ),
    ),
    (
        "The lab",
        "Scenarios, experiments, claims, reports.",
        (
            ("lab/scenario.py", ("Scenario", "Part", "EngineSettings")),
            ("lab/faults.py", ("FaultSetting",)),
            ("lab/run.py", ("run",)),
            ("lab/up.py", ("Up", "Upped")),
            ("lab/experiment.py", ("Experiment",)),
            ("lab/report.py", ("Report", "Summary")),
            ("lab/rows.py", ("Rows", "Moment")),
            ("lab/store.py", ("Store",)),
            (
                "lab/card.py",
                (
                    "System", "Source", "Arm", "Claim", "Plot", "Budget", "Bound", "at_most",
                    "at_least", "between", "Compare", "value", "difference", "ratio",
                ),
            ),
            ("lab/judge.py", ("Verdict",)),
            ("lab/discover.py", ("cards", "names", "find", "load", "scenario")),
        ),
    ),
    (
        "Contract suites",
        "Run them on your own implementations; each raises AssertionError that says what broke.",
        (
            ("testing/aggregate.py", ("check_aggregator",)),
            ("testing/transform.py", ("check_transform",)),
            ("testing/attack.py", ("check_attack",)),
            ("testing/topology.py", ("check_topology",)),
            ("testing/pretend_device.py", ("PretendDevice", "check_device")),
            ("testing/ladder.py", ("check_strategy", "check_program", "check_live")),
        ),
    ),
)  # fmt: skip


def contracts() -> str:
    """The page with every public signature."""
    lines = [
        "# Contracts",
        "",
        "Every public signature as built. Generated from the source by",
        "`python -m shoal.lab.pages`. A change here is a change for everybody who builds on Shoal:",
        "it needs an entry in the [changelog](../CHANGELOG.md).",
        "",
        "Shapes are written `[peers, dim]`; `[...]` means any leading axes. Units are the last",
        "part of a name: `_s` is seconds, `_bytes` is bytes.",
        "",
        "## Errors",
        "",
        "```text",
        *_error_tree(),
        "```",
        "",
    ]
    for heading, introduction, modules in _CONTRACTS:
        lines += [f"## {heading}", "", introduction, ""]
        for file, names in modules:
            text = (_PACKAGE / file).read_text(encoding="utf-8")
            dotted = "shoal." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            lines += [f"### `{dotted}`", "", "```pyi"]
            for place, name in enumerate(names):
                lines += ([""] if place else []) + signature(text, name)
            lines += ["```", ""]
    return "\n".join(lines).rstrip() + "\n"


def public_names() -> set[str]:
    """Every name that the page of contracts explains."""
    return {name for _, _, modules in _CONTRACTS for _, names in modules for name in names}


def _error_tree() -> list[str]:
    text = (_PACKAGE / "base/errors.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    return textwrap.dedent(re.split(r"\n\n", doc, maxsplit=2)[1]).split("\n")


def signature(text: str, name: str, *, methods: bool = True) -> list[str]:
    """The lines of a class, function or constant of a module's text, without bodies."""
    lines, found = text.split("\n"), None
    for node in _parsed(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            found = node  # of several overloads the last one is the implementation
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return lines[node.lineno - 1 : node.end_lineno] + _note_after(text, node)
    if found is None:
        raise UsageError(f"reference: no {name!r} at the top of its module (mend the list)")
    if isinstance(found, ast.FunctionDef):
        return _function(found, lines)
    return _class(found, lines, methods)


@lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _note_after(text: str, node: ast.stmt) -> list[str]:
    """The string below a constant that says what it is."""
    body = _parsed(text).body
    place = next(i for i, each in enumerate(body) if each.lineno == node.lineno)
    following = body[place + 1] if place + 1 < len(body) else None
    return _lines_of(following, text.split("\n")) if _is_text(following) else []


def _is_text(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _lines_of(node: ast.stmt | None, lines: list[str]) -> list[str]:
    assert node is not None
    return lines[node.lineno - 1 : node.end_lineno]


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> list[str]:
    first = node.body[0]
    if lines[first.lineno - 1][: first.col_offset].strip():
        # The body stands on the header's last line: `def f(self) -> None: ...`.
        whole = lines[_start(node) - 1 : node.end_lineno]
        return [line.replace("  # fmt: skip", "") for line in whole]
    head = lines[_start(node) - 1 : first.lineno - 1]
    head = [line.replace("  # fmt: skip", "") for line in head]
    # A comment above the first statement belongs to the body.
    while head[-1].lstrip().startswith("#"):
        head.pop()
    if _is_text(first):
        return head + _doc(first, lines)
    return [*head[:-1], f"{head[-1]} ..."]


def _doc(node: ast.stmt, lines: list[str]) -> list[str]:
    """A docstring without its doctests."""
    doc = _lines_of(node, lines)
    cut = next((i for i, line in enumerate(doc) if line.lstrip().startswith(">>>")), None)
    if cut is None:
        return doc
    kept = doc[:cut]
    while kept and not kept[-1].strip():
        kept.pop()
    if len(kept) == 1:
        return [kept[0] + '"""']
    return [*kept, " " * (len(doc[-1]) - len(doc[-1].lstrip())) + '"""']


def _class(node: ast.ClassDef, lines: list[str], methods: bool) -> list[str]:
    out = lines[_start(node) - 1 : _start(node.body[0]) - 1]
    last = _start(node.body[0]) - 1
    # A text below a field is a note on it, and goes where the field goes.
    shown, spaced = True, False
    for statement in node.body:
        comments = [line for line in lines[last : _start(statement) - 1] if _is_comment(line)]
        last = statement.end_lineno or statement.lineno
        if _is_text(statement):
            piece = _doc(statement, lines) if shown else []
        else:
            piece = _member(statement, lines, methods)
            shown = bool(piece)
        if piece:
            long = len(piece) > 1 and isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))
            out += [""] if (long or spaced) and out else []
            out += [*comments, *piece]
            spaced = long or statement is node.body[0]
    # Comments after the last statement state optional promises.
    inside = itertools.takewhile(lambda line: not line.strip() or line[0] == " ", lines[last:])
    promises = [line for line in inside if _is_comment(line)]
    return out + ([""] if promises else []) + promises


def _start(node: ast.stmt) -> int:
    """The line on which a statement begins, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _is_comment(line: str) -> bool:
    return line.startswith("    #") and "fmt:" not in line


def _member(statement: ast.stmt, lines: list[str], methods: bool) -> list[str]:
    """What a reader sees of a field or method; nothing when it is private."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        private = statement.name.startswith("_") and statement.name != "__call__"
        return [] if private or not methods else _function(statement, lines)
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        name = statement.target.id
        constant = not methods and "ClassVar" in ast.unparse(statement.annotation)
        hidden = constant or name.startswith("_") or name == "examples"
        return [] if hidden else _lines_of(statement, lines)
    if isinstance(statement, ast.Assign):
        target = statement.targets[0]
        named = isinstance(target, ast.Name) and not target.id.startswith("_")
        return _lines_of(statement, lines) if named else []
    return []


def parts_page() -> str:
    """The page that names every part and its settings."""
    lines = [
        "# Parts by name",
        "",
        "What a scenario may name, in Python or in a file, with the settings of each and their",
        "defaults. Generated by `python -m shoal.lab.pages`. From Python you can also pass an",
        "object of your own; it then needs no name.",
        "",
    ]
    # What else is measured is a list of names, not a part with settings in the scenario.
    for field, role in {**ROLES, "measures": "measure"}.items():
        lines += [f"## {field}", ""]
        rows = [_part_row(name, thing) for name, thing in _parts(field, role)]
        lines += ["| name | what it is | settings |", "|---|---|---|", *rows, ""]
    lines += [
        "## faults",
        "",
        "Each also takes `who`, `count` or `fraction`, and `at`, `until`.",
        "",
    ]
    lines += ["| kind | what it is | settings |", "|---|---|---|"]
    from shoal.world.faults import KINDS

    shared = ("who", "at", "until")
    lines += [_part_row(kind, cls, shared) for kind, cls in KINDS.items()]
    lines += ["", "## Building blocks", ""]
    lines += [
        "Not named in scenarios; systems and your own code import them from `shoal.parts`.",
        "",
    ]
    lines += ["| module | what it is |", "|---|---|", *_blocks()]
    return "\n".join(lines) + "\n"


def _blocks() -> Iterator[str]:
    """A row for each module of the roles that no scenario field holds."""
    from shoal import parts

    for role in parts.roles():
        if role in (*ROLES.values(), "measure"):
            continue
        for name in parts.names(role):
            text = (_PACKAGE / "parts" / role / f"{name}.py").read_text(encoding="utf-8")
            doc = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
            yield f"| `{role}.{name}` | {doc} |"


def _parts(field: str, role: str) -> Iterator[tuple[str, Any]]:
    from shoal import parts
    from shoal.lab.build import world_parts

    if field in ("links", "device"):
        yield from sorted(world_parts(role).items())
        return
    for name in parts.names(role):
        yield name, parts.find(role, name)


def _part_row(name: str, thing: Any, hidden: tuple[str, ...] = ()) -> str:
    doc = " ".join((thing.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
    fields = dataclasses.fields(thing) if isinstance(thing, type) else ()
    settings = [
        f"`{each.name}{_default(each)}`"
        for each in fields
        if each.init and not each.name.startswith("_") and each.name not in hidden
    ]
    return f"| `{name}` | {doc} | {', '.join(settings) or '-'} |"


def _default(each: dataclasses.Field[Any]) -> str:
    if each.default is not dataclasses.MISSING:
        return f"={plain(each.default)}"
    if each.default_factory is not dataclasses.MISSING:
        return f"={plain(each.default_factory())}"
    return ""


def plain(value: Any) -> str:
    """A value as Python writes it, large and small numbers in short form.

    >>> plain(1e10), plain(0.1 * (1 - 0.9)), plain("iid")
    ('1e+10', '0.01', "'iid'")
    """
    if isinstance(value, float) and math.isclose(float(f"{value:g}"), value, rel_tol=1e-12):
        return f"{value:g}"
    return repr(value)
