"""Who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import shoal

ROOT = Path(shoal.__file__).parent
LAYERS = (
    "base", "tensor", "wire", "kernel", "world", "rounds", "parts", "engine", "testing", "lab",
    "systems", "cli",
)  # fmt: skip
STRANGERS = {
    ("engine", "parts"), ("systems", "engine"), ("systems", "testing"), ("cli", "systems"),
}  # fmt: skip
"""Pairs of layers that the order would allow and the design does not."""

OUTSIDE_WORLD = {"asyncio", "random", "secrets", "selectors", "socket", "time"}
ENGINES = ("event", "lockstep", "live")
MAY_TOUCH_IT = (
    "engine.live", "cli", "base.stopwatch", "lab.bench.live", "lab.bench._bare",
    "lab.bench._delayed", "lab.bench._flood", "lab.bench._others",
    "lab.bench._kademlia",
)  # fmt: skip
"""The benches of `live` time round trips where they are made, beside a protocol without Shoal or
another package."""

MAY_TELL_THE_DATE = ("lab.report",)
"""A report shows when it was made, and nothing else looks at that."""

MAY_DRAW_SECRETS = ("parts.privacy.secret_keys",)
"""Noise that protects somebody cannot follow from a seed; only where a setting asks for that."""

WITHOUT_TORCH = ("base", "wire", "kernel", "world")
"""Layers whose modules import torch inside functions only, if at all."""
TORCH_ANYWAY = {"wire.tensors": "turns tensors into bytes; loaded with the first of them"}

PARTS_EDGES = {
    ("strategy", "optimise"): "a strategy's default optimiser is SGD",
    ("strategy", "privacy"): "private momentum draws records as its accountant assumes",
    ("transform", "privacy"): "discrete noise comes from the exact sampler",
    ("strategy", "aggregate"): "one of private momentum's rules adds its noise to a median",
    ("asynchronous", "optimise"): "clients of asynchronous servers make steps of SGD",
    ("tasks", "models"): "a data set builds its model, and the task compiles it",
    ("tasks", "flow"): "a flow task lays samples on the path, and is judged by exact flows",
    ("privacy", "transform"): "masked codes are packed as the codes of transforms are",
    ("attack", "aggregate"): "the attack on Krum scores vectors as Krum does",
}
"""What a subpackage of parts may import of another, and why; all else goes through rounds."""


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, both without the leading `shoal.` if they are Shoal's own."""

    module: str
    target: str
    names: tuple[str, ...]
    at_top: bool
    for_types: bool
    own: bool


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_in(tree: ast.AST, module: str, package: str) -> Iterator[Import]:
    def walk(node: ast.AST, top: bool, types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            found: list[tuple[str, tuple[str, ...]]] = []
            if isinstance(child, ast.Import):
                found = [(alias.name, ()) for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                target = child.module or ""
                if child.level:
                    parents = f"shoal.{package}".rstrip(".").split(".")
                    parents = parents[: len(parents) - child.level + 1]
                    target = ".".join([*parents, *filter(None, [child.module])])
                found = [(target, tuple(alias.name for alias in child.names))]
            for target, names in found:
                own = target == "shoal" or target.startswith("shoal.")
                short = target.removeprefix("shoal").lstrip(".") if own else target
                yield Import(module, short, names, top, types, own)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, top and not inside, types or is_for_types(child))

    yield from walk(tree, True, False)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its name without `shoal.`, parsed; a package by the package's name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports() -> tuple[Import, ...]:
    found: list[Import] = []
    for name, tree in modules().items():
        is_package = (ROOT / name.replace(".", "/")).is_dir()
        package = name if is_package else name.rpartition(".")[0]
        found += imports_in(tree, name, package)
    # `from shoal.parts import aggregate` imports a module, too.
    for each in list(found):
        if each.own:
            for name in each.names:
                inner = f"{each.target}.{name}".lstrip(".")
                if inner in modules():
                    found.append(Import(each.module, inner, (), each.at_top, each.for_types, True))
    return tuple(found)


def layer(module: str) -> str:
    """`python -m shoal` is the command."""
    return "cli" if module == "__main__" else module.partition(".")[0]


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_every_module_belongs_to_a_layer_and_every_layer_has_modules() -> None:
    assert {layer(name) for name in modules() if name} == set(LAYERS)


def part_of(module: str, number: int) -> str:
    """The name's word at this place, or nothing."""
    return "".join(module.split(".")[number : number + 1])


def of_one_system(module: str, target: str) -> bool:
    """A private module beside a system (`_modest_node` of `modest`) is a part of it."""
    family, _, name = module.rpartition(".")
    other, _, beside = target.rpartition(".")
    if family != other or not (name.startswith("_") or beside.startswith("_")):
        return False
    first, second = (text.lstrip("_").split("_")[0] for text in (name, beside))
    return first == second


def fault(each: Import) -> str:
    """The rule that an import breaks, or nothing."""
    if not (each.own and each.module and each.target):
        return ""
    here, there = layer(each.module), layer(each.target)
    if here != there:
        higher = LAYERS.index(there) > LAYERS.index(here)
        return "layers" if higher or (here, there) in STRANGERS else ""
    ours, theirs = part_of(each.module, 1), part_of(each.target, 1)
    if here == "engine" and ours != theirs and {ours, theirs} <= set(ENGINES):
        return "engines"
    if here == "parts" and ours and theirs and ours != theirs:
        return "" if (ours, theirs) in PARTS_EDGES else "parts"
    if here == "systems" and part_of(each.target, 2):
        return "" if of_one_system(each.module, each.target) else "systems"
    return ""


def test_imports_keep_to_the_rules() -> None:
    """Lower layers only; engines, roles and systems know nothing of each other."""
    found = [(fault(each), each.module, each.target) for each in imports()]
    assert [each for each in found if each[0]] == []


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("kernel.peer", "from shoal.world.links import Links", "layers"),
        ("base.units", "def f():\n    import shoal.tensor.tree", "layers"),
        ("parts.aggregate.mean", "from shoal.engine.event import simulation", "layers"),
        ("engine.event.simulation", "from shoal.parts import find", "layers"),
        ("systems.baselines.dpsgd", "from shoal.engine.lockstep import lockstep", "layers"),
        ("lab.run", "from ..systems.baselines import dpsgd", "layers"),
        ("engine.live.driver", "def f():\n    from shoal.engine.event import x", "engines"),
        ("parts.aggregate.mean", "from shoal.parts.tasks.base import ModuleTask", "parts"),
        ("systems.baselines.dpsgd", "from shoal.systems.baselines.fedavg import S", "systems"),
        (
            "systems.training.dfedsam",
            "from shoal.systems.training._modest_node import N",
            "systems",
        ),
        ("systems.training.modest", "from shoal.systems.training._modest_node import N", ""),
        ("parts.aggregate.mean", "from shoal.parts.aggregate.base import same_for_all", ""),
    ],
)
def test_what_breaks_a_rule_is_seen(module: str, source: str, rule: str) -> None:
    package = module.rpartition(".")[0]
    found = {fault(each) for each in imports_in(ast.parse(source), module, package)}
    assert found == {rule}


def test_what_the_public_face_offers_is_no_way_around_the_layers() -> None:
    """Below the lab, `import shoal` is for the version and the package's place only."""
    low = LAYERS[: LAYERS.index("lab")]
    wrong = [
        f"{each.module} imports {name} from shoal"
        for each in imports()
        if each.own and not each.target and layer(each.module) in low
        for name in each.names
        if name not in LAYERS
    ]
    for name, tree in modules().items():
        if name and layer(name) in low:
            wrong += [
                f"{name} uses shoal.{node.attr}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "shoal"
                and node.attr in shoal.__all__
                and node.attr != "__version__"
            ]
    assert not wrong


def test_only_named_places_touch_clocks_sockets_and_global_randomness() -> None:
    wrong = [
        f"{each.module} imports {each.target}"
        for each in imports()
        if not each.own
        and each.target.partition(".")[0] in OUTSIDE_WORLD
        and not within(each.module, MAY_TOUCH_IT)
    ]
    for name, tree in modules().items():
        for node in ast.walk(tree):
            written = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            dated = written.startswith("datetime.") and written.endswith((".now", ".today"))
            if (written in ("os.urandom", "os.getrandom") or dated) and not within(
                name, MAY_TOUCH_IT + (MAY_TELL_THE_DATE if dated else MAY_DRAW_SECRETS)
            ):
                wrong.append(f"{name} uses {written}")
    assert not wrong


def test_low_layers_import_no_torch_at_module_level() -> None:
    wrong = [
        each.module
        for each in imports()
        if each.target.partition(".")[0] == "torch" and not each.own
        and layer(each.module) in WITHOUT_TORCH
        and each.at_top and not each.for_types
        and each.module not in TORCH_ANYWAY
    ]  # fmt: skip
    assert not wrong


def test_base_imports_the_standard_library_only() -> None:
    wrong = [
        f"{each.module} imports {each.target}"
        for each in imports()
        if layer(each.module) == "base"
        and not each.own
        and each.target.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert not wrong


def test_every_named_edge_between_roles_is_in_use() -> None:
    used = {
        (part_of(each.module, 1), part_of(each.target, 1))
        for each in imports()
        if each.own and layer(each.module) == layer(each.target) == "parts"
    }
    assert set(PARTS_EDGES) <= used


def test_the_tables_name_what_exists() -> None:
    for place in (*MAY_TOUCH_IT, *TORCH_ANYWAY):
        assert place in modules(), place


def test_a_live_peer_starts_without_torch_and_numpy() -> None:
    script = (
        "import sys, shoal.engine.live.join; "
        "print([m for m in sys.modules if m in ('torch', 'numpy', 'scipy')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=50
    )
    assert done.stdout.strip() == "[]"


def test_importing_shoal_leaves_torch_and_the_lab_alone() -> None:
    script = (
        "import sys, shoal; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'scipy') "
        "or m.startswith('shoal.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


MAKERS = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
DEVICE_CODE = ("tensor", "parts", "rounds", "engine.lockstep")
"""Numeric code that runs wherever its arguments lie."""
MADE_ON_THE_CPU = {
    "engine.lockstep.lockstep": "the books of a run (who hears whom, since when) are on the CPU",
    "engine.lockstep.timeline": "times and presence of peers: books, too",
    "engine.lockstep.traffic": "times of messages: books, too",
    "engine.lockstep.world": "numbers of peers: books, too",
    "parts.models.transformer": "a module's own buffers: `task.setup` moves the module as a whole",
}


def test_numeric_code_makes_tensors_where_its_arguments_lie() -> None:
    """Every creation says `device=`, is a `_like` or `new_`, or stands in the table above."""
    wrong, used = [], set()
    for name, tree in modules().items():
        if not within(name, DEVICE_CODE):
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in MAKERS
                and not any(keyword.arg in ("device", None) for keyword in node.keywords)
            ):
                if name in MADE_ON_THE_CPU:
                    used.add(name)
                else:
                    wrong.append(f"{name}:{node.lineno} torch.{node.func.attr}")
    assert not wrong
    assert used == set(MADE_ON_THE_CPU)
