"""The import rules: layers, and where clocks, sockets and randomness may be touched."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "shoal"

# What each package may import besides itself. `world` and `rounds` stand on the kernel; `engine`
# and `parts` beside each other; `testing` may use both, since it checks one with the other.
LOWER = {
    "base": "",
    "tensor": "base",
    "wire": "base tensor",
    "kernel": "base tensor wire",
    "world": "base tensor wire kernel",
    "rounds": "base tensor wire kernel world",
    "parts": "base tensor wire kernel world rounds",
    "engine": "base tensor wire kernel world rounds",
    "testing": "base tensor wire kernel world rounds parts engine",
    "lab": "base tensor wire kernel world rounds parts engine testing",
    "systems": "base tensor wire kernel world rounds parts lab",
    "cli": "base tensor wire kernel world rounds parts engine testing lab",
}

# Inside parts: which roles build on which others.
PARTS = {
    "aggregate": "",
    "attack": "aggregate",
    "exchange": "topology",
    "optimise": "",
    "overlay": "",
    "strategy": "optimise",
    "tasks": "models",
    "transform": "",
}

# Names of the outside world, and the only places that may know them.
OUTSIDE = {"asyncio", "socket", "time", "random", "secrets", "selectors"}
LIVE = ("engine/live/", "cli/")
MAY_TOUCH = {
    "base/stopwatch.py": {"time"},
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, *, deep: bool) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of what is imported when running; deep: inside functions, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: import by full name"
            for alias in child.names:
                yield f"{child.module}.{alias.name}", child.lineno
        elif for_types_only(child):
            yield from imports(ast.Module(child.orelse, []), deep=deep)
        elif deep or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(child, deep=deep)


def broken(path: Path) -> list[str]:
    """The layer rules that a module breaks."""
    name = name_of(path)
    package, _, rest = name.partition("/")
    if not rest:
        return []
    faults = []
    for target, line in imports(tree(path), deep=True):
        words = target.split(".")
        if words[0] != "shoal" or len(words) < 2:
            continue
        to = words[1]
        where = f"{name}:{line} imports {target}"
        if to in LOWER and to != package and to not in LOWER[package].split():
            faults.append(f"{where}: {package} may import {LOWER[package] or 'nothing'}")
        here = rest.split("/")[0]
        if package == to == "engine" and here != words[2] and {here, words[2]} <= ENGINES:
            faults.append(f"{where}: engines do not know each other")
        if package == to == "parts" and "/" in rest and len(words) > 2:
            role = rest.split("/")[0]
            allowed = PARTS.get(role, "").split()
            if (SOURCE / "parts" / words[2]).is_dir() and words[2] not in (role, *allowed):
                faults.append(f"{where}: parts/{role} may import {allowed or 'no other role'}")
        if package == "systems" and to == "systems":
            family, module = rest.split("/")[0], Path(rest).stem
            # Private modules beside a system are its own; scenarios.py is the family's.
            own = words[2] == family and len(words) > 3 and words[3].startswith("_")
            shared = words[-1] == "SCENARIOS" or module == "scenarios"
            if not own and not shared:
                faults.append(f"{where}: systems do not know each other")
    return faults


ENGINES = {"event", "lockstep", "live"}


def test_layers() -> None:
    faults = [fault for path in modules() for fault in broken(path)]
    assert faults == []


def test_the_rules_cover_every_package_and_role() -> None:
    packages = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages == set(LOWER)
    assert {p.name for p in (SOURCE / "engine").iterdir() if p.is_dir()} - {
        "__pycache__"
    } == ENGINES


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("kernel/peer.py", "from shoal.world.links import Links"),
        ("parts/aggregate/mean.py", "from shoal.engine.event import simulate"),
        ("parts/aggregate/mean.py", "from shoal.parts.tasks.base import Task"),
        ("engine/live/driver.py", "def f():\n    from shoal.engine.event import simulate"),
        ("systems/baselines/dpsgd.py", "from shoal.engine.lockstep import run_lockstep"),
        ("systems/baselines/dpsgd.py", "from shoal.systems.baselines.fedavg import SYSTEM"),
    ],
)
def test_what_breaks_a_rule_is_seen(place: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "tree", lambda path: ast.parse(text))
    assert len(broken(SOURCE / place)) == 1


def test_clocks_sockets_and_chance_stay_in_their_places() -> None:
    faults = []
    for path in modules():
        name = name_of(path)
        if name.startswith(LIVE):
            continue
        for target, line in imports(tree(path), deep=True):
            top = target.split(".")[0]
            if top in OUTSIDE - MAY_TOUCH.get(name, set()):
                faults.append(f"{name}:{line} imports {target}")
        faults += [
            f"{name}:{node.lineno} uses {ast.unparse(node)}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("os.urandom", "os.getrandom")
        ]
    assert faults == []


def test_the_foundation_loads_without_torch() -> None:
    faults = []
    for path in modules():
        name = name_of(path)
        if name.split("/")[0] in ("base", "wire", "kernel", "world") and name != "wire/codec.py":
            found = [t for t, _ in imports(tree(path), deep=False) if t.split(".")[0] == "torch"]
            faults += [f"{name}: {target}" for target in found]
    assert faults == []


def test_import_is_light() -> None:
    """Torch takes seconds; this takes a few hundredths of one (the bench has the exact figure)."""
    code = (
        "import sys, time; begin = time.process_time(); import shoal; "
        "print(time.process_time() - begin, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(told[0]) < 0.3
    assert told[1:] == ["False", "False"]


# Makers of tensors that take a device; without one they ignore where a run's tensors live.
MAKERS = {"zeros", "ones", "empty", "full", "arange", "tensor", "linspace", "eye", "rand", "randn"}


def undeviced(path: Path) -> list[str]:
    return [
        f"{name_of(path)}:{node.lineno}: torch.{node.func.attr} without device="
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in MAKERS
        and not any(word.arg in ("device", None) for word in node.keywords)
    ]


def test_numeric_parts_say_where_tensors_live() -> None:
    """Rules and transforms get tensors on any device and must stay on it."""
    folders = ("parts/aggregate", "parts/transform", "parts/attack", "parts/optimise", "tensor")
    found = [f for path in modules() if name_of(path).startswith(folders) for f in undeviced(path)]
    assert found == []
