"""Who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import shoal

ROOT = Path(shoal.__file__).parent
LAYERS = (
    "base", "tensor", "wire", "kernel", "world", "rounds", "parts", "engine", "testing", "lab",
    "systems", "cli",
)  # fmt: skip
STRANGERS = {("parts", "engine"), ("engine", "parts"), ("wire", "tensor")}
"""Pairs of layers that the order would allow and the design does not."""

OUTSIDE_WORLD = {"asyncio", "socket", "time", "random"}
MAY_TOUCH_IT = ("engine.live", "cli", "base.stopwatch")
MAY_TELL_THE_DATE = ("lab.report",)
"""A report shows when it was made, and nothing else looks at that."""

WITHOUT_TORCH = ("base", "wire", "kernel", "world")
"""Layers whose modules import torch inside functions only, if at all."""
TORCH_ANYWAY = {"wire.codec": "turns tensors into bytes"}

PARTS_EDGES = {
    ("strategy", "optimise"): "a strategy's default optimiser is SGD",
    ("tasks", "models"): "a data set builds its model, and the task compiles it",
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


def test_layers_import_lower_layers_only() -> None:
    rank = {name: place for place, name in enumerate(LAYERS)}
    wrong = [
        f"{each.module} imports {each.target}"
        for each in imports()
        if each.own and each.module and each.target
        and layer(each.module) != layer(each.target)
        and (
            rank[layer(each.target)] > rank[layer(each.module)]
            or (layer(each.module), layer(each.target)) in STRANGERS
        )
    ]  # fmt: skip
    assert not wrong


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


def test_engines_do_not_import_each_other() -> None:
    engines = ("event", "lockstep", "live")

    def engine(module: str) -> str:
        place = module.split(".")[1:2]
        return place[0] if layer(module) == "engine" and place and place[0] in engines else ""

    wrong = [
        f"{each.module} imports {each.target}"
        for each in imports()
        if each.own and engine(each.module) and engine(each.target)
        and engine(each.module) != engine(each.target)
    ]  # fmt: skip
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
            if (written == "os.urandom" or dated) and not within(
                name, MAY_TOUCH_IT + (MAY_TELL_THE_DATE if dated else ())
            ):
                wrong.append(f"{name} uses {written}")
    assert not wrong


def test_systems_import_neither_systems_nor_engines() -> None:
    """A private module beside a system (`_modest_node` of `modest`) is a part of it."""

    def ally(module: str, target: str) -> bool:
        family, _, name = module.rpartition(".")
        other, _, private = target.rpartition(".")
        if not name or family != other:
            return False
        first, second = sorted((name, private), key=lambda text: not text.startswith("_"))
        # One private module may use another of the same system.
        words = first.lstrip("_").split("_")
        return first.startswith("_") and words[0] in second.lstrip("_").split("_")

    wrong = [
        f"{each.module} imports {each.target}"
        for each in imports()
        if each.own and layer(each.module) == "systems"
        and (
            layer(each.target) == "engine"
            or (layer(each.target) == "systems" and each.target.count(".") > 1
                and not ally(each.module, each.target))
        )
    ]  # fmt: skip
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


def test_parts_import_other_roles_along_named_edges_only() -> None:
    edges: dict[tuple[str, str], str] = {}
    for each in imports():
        if not (each.own and layer(each.module) == layer(each.target) == "parts"):
            continue
        roles = [name.split(".")[1:2] for name in (each.module, each.target)]
        if roles[0] and roles[1] and roles[0] != roles[1]:
            edges[roles[0][0], roles[1][0]] = f"{each.module} imports {each.target}"
    wrong = [text for edge, text in edges.items() if edge not in PARTS_EDGES]
    assert not wrong
    assert set(PARTS_EDGES) == set(edges), "an edge that nobody uses any more"


def test_the_tables_name_what_exists() -> None:
    for place in (*MAY_TOUCH_IT, *TORCH_ANYWAY):
        assert place in modules(), place


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
