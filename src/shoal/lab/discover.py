"""Finding systems: a walk over `systems/<family>/*.py`, by source text or by import.

`names`, `find` and `cards` parse the files, so that `shoal list` needs no torch; `load` imports.
Further folders of the same shape may be named in the environment variable SHOAL_SYSTEMS (separated
like PATH): a user's own systems, enrolled without touching the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.card import System
from shoal.lab.card_text import CardText, read_card
from shoal.lab.scenario import Scenario
from shoal.lab.values import near

_OWN = Path(__file__).parents[1] / "systems"


def roots() -> tuple[Path, ...]:
    """The folders that hold families: the package's own, then those of SHOAL_SYSTEMS."""
    extra = [Path(p) for p in os.environ.get("SHOAL_SYSTEMS", "").split(os.pathsep) if p]
    for folder in extra:
        if not folder.is_dir():
            raise UsageError(f"SHOAL_SYSTEMS: {folder} is no folder (mend or unset the variable)")
    return (_OWN, *extra)


def files() -> Iterator[tuple[Path, str, Path]]:
    """(root, family, file) of every file that may hold a system, in a fixed order."""
    for root in roots():
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            if folder.name.startswith(("_", ".")):
                continue
            for file in sorted(folder.glob("*.py")):
                if not file.name.startswith("_") and file.name != "scenarios.py":
                    yield root, folder.name, file


def cards(family: str | None = None) -> tuple[CardText, ...]:
    """Every card as text, sorted by family and name; files without a `SYSTEM` are passed over."""
    out: dict[str, CardText] = {}
    for root, name, file in files():
        # The cheap test spares parsing files without a card.
        text = file.read_text(encoding="utf-8")
        card = read_card(text, str(file), name, root, whole=False) if "SYSTEM" in text else None
        if card is None:
            continue
        if card.name in out:
            raise UsageError(
                f"{file}: the system {card.name!r} exists already in {out[card.name].file} "
                "(rename one)"
            )
        out[card.name] = card
    families = sorted({card.family for card in out.values()})
    if family is not None and family not in families:
        raise UsageError(f"no family {family!r}; {near(family, families)}")
    chosen = [card for card in out.values() if family in (None, card.family)]
    return tuple(sorted(chosen, key=lambda card: (card.family, card.name)))


def names() -> tuple[str, ...]:
    """Every system by name."""
    return tuple(sorted(card.name for card in cards()))


def find(name: str) -> CardText:
    """The card of a system as text, without importing it."""
    known = {card.name: card for card in cards()}
    if name not in known:
        raise UsageError(
            f"no system {name!r}; {near(name, known)} (`shoal list` names all of them)"
        )
    card = known[name]
    text = Path(card.file).read_text(encoding="utf-8")
    whole = read_card(text, card.file, card.family, card.root)
    assert whole is not None
    return whole


def load(name: str) -> System:
    """The card of a system, its module imported (once per process)."""
    key = (name, os.environ.get("SHOAL_SYSTEMS", ""))
    if key not in _loaded:
        card = find(name)
        system = getattr(module_of(card), "SYSTEM", None)
        if not isinstance(system, System):
            raise UsageError(f"{card.file}: SYSTEM is no System (make it with System(...))")
        _loaded[key] = system
    return _loaded[key]


def module_of(card: CardText) -> ModuleType:
    """The module that holds a card, imported."""
    return _module(Path(card.file), card.family, card.root)


_loaded: dict[tuple[str, str], System] = {}


def scenario(name: str) -> Scenario:
    """A family's scenario, `family.name`, from the `SCENARIOS` of its `scenarios.py`."""
    family, dot, rest = name.partition(".")
    places = [(root, root / family / "scenarios.py") for root in roots()]
    found: dict[str, Any] = {}
    for root, file in places:
        if dot and file.exists():
            found |= getattr(_module(file, family, root), "SCENARIOS", {})
    if rest not in found:
        known = [f"{family}.{key}" for key in found] or sorted(
            folder.parent.name + ".*" for root in roots() for folder in root.glob("*/scenarios.py")
        )
        raise UsageError(f"no scenario {name!r}; {near(name, known)} (give family.name)")
    return found[rest]


def _module(file: Path, family: str, root: Path) -> ModuleType:
    if root == _OWN:
        return importlib.import_module(f"shoal.systems.{family}.{file.stem}")
    # Outside the package a module gets a name made of its place, so that it is imported once and
    # two folders may hold families of one name.
    name = f"shoal_systems_{_stable(root)}_{family}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _stable(root: Path) -> int:
    from shoal.base.keyed import fold, word

    return fold(0, word(str(root.resolve()))) % 10**8
