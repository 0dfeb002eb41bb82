"""A card read from source text, without running it: what `list`, `show` and completion need."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.card import Source

# From `SYSTEM =` at the margin to the parenthesis that closes it at the margin.
_CARD = re.compile(r"^SYSTEM\b[^\n]*=[^\n]*\n(?:[^\n)][^\n]*\n|\n)*\)", re.MULTILINE)
_BOUNDS = {"at_most": "<= {}", "at_least": ">= {}", "between": "{} to {}"}
_COMPARE = {"ratio": "{} / {}", "difference": "{} - {}", "value": "{}"}


@dataclass(frozen=True)
class ClaimText:
    """A claim for people; `bound` and `compare` are formulas in words."""

    name: str
    statement: str
    at: str
    compare: str
    bound: str
    expected: str


@dataclass(frozen=True)
class CardText:
    """The literal part of a card. settings: (name, default) of what the system makes."""

    name: str
    family: str
    kind: str
    title: str
    file: str
    root: Path
    doc: str
    source: Source | None
    scenario: str
    arms: tuple[str, ...]
    claims: tuple[ClaimText, ...]
    deviations: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]

    def summary(self) -> dict[str, str | None]:
        """The object that `shoal list --json` prints."""
        paper = f"{self.source.authors}: {self.source.title}" if self.source else None
        return {
            "name": self.name,
            "family": self.family,
            "kind": self.kind,
            "title": self.title,
            "paper": paper,
        }


# A text read again gives the same card: a process that asks by name asks often.
@lru_cache(maxsize=1024)
def read_card(
    text: str, file: str, family: str, root: Path, *, whole: bool = True
) -> CardText | None:
    """The card in a module's text; None when the module assigns no `SYSTEM`.

    whole: also the module's docstring and the settings of what it makes, which takes parsing all of
    the text instead of the card alone (six times as long; there may be a hundred systems).
    """
    found = None if whole else _CARD.search(text)
    try:
        tree = ast.parse(found[0] if found else text)
    except SyntaxError as error:
        if found:
            return read_card(text, file, family, root)
        raise UsageError(f"{file}:{error.lineno}: this is not Python: {error.msg}") from None
    call = _assigned(tree, "SYSTEM")
    if call is None:
        return None
    if not isinstance(call, ast.Call) or _callee(call) != "System":
        line = call.lineno + (text.count("\n", 0, found.start()) if found else 0)
        raise UsageError(f"{file}:{line}: SYSTEM must be a literal System(...)")
    values = _arguments(call, ("name", "kind", "title"))
    for key in ("name", "kind", "title"):
        if not isinstance(_value(values.get(key)), str):
            raise UsageError(f"{file}: SYSTEM has no literal {key} (write a string)")
    arms = values.get("arms")
    names = [_value(key) for key in arms.keys] if isinstance(arms, ast.Dict) else []
    return CardText(
        name=_value(values["name"]),
        family=family,
        kind=_value(values["kind"]),
        title=_value(values["title"]),
        file=file,
        root=root,
        doc=ast.get_docstring(tree) or "",
        source=_source(values.get("source")),
        scenario=_words(values.get("scenario")),
        arms=tuple(str(name) for name in names),
        claims=tuple(_claim(node) for node in _items(values.get("claims"))),
        deviations=tuple(_words(node) for node in _items(values.get("deviations"))),
        settings=_settings(tree, values.get("make")),
    )


def _assigned(tree: ast.Module, name: str) -> ast.expr | None:
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else ([node.target] if isinstance(node, ast.AnnAssign) else [])
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value  # type: ignore[union-attr]
    return None


def _callee(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _arguments(call: ast.Call, order: tuple[str, ...]) -> dict[str, ast.expr]:
    values = dict(zip(order, call.args, strict=False))
    return values | {word.arg: word.value for word in call.keywords if word.arg}


def _value(node: ast.expr | None) -> Any:
    """The literal's value, or None when the node is no literal."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _words(node: ast.expr | None) -> str:
    """A string literal (also one joined with +) as it is, anything else as source text."""
    if node is None:
        return ""
    value = _value(node)
    return value if isinstance(value, str) else ast.unparse(node)


def _items(node: ast.expr | None) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, (ast.Tuple, ast.List)) else []


def _source(node: ast.expr | None) -> Source | None:
    if not isinstance(node, ast.Call):
        return None
    values = _arguments(node, ("authors", "title", "arxiv", "doi", "venue"))
    known = {key: _words(value) for key, value in values.items()}
    return Source(known.pop("authors", ""), known.pop("title", ""), **known)


def _claim(node: ast.expr) -> ClaimText:
    if not isinstance(node, ast.Call):
        return ClaimText(ast.unparse(node), "", "", "", "", "")
    values = _arguments(node, ("name", "statement", "holds"))
    compare = _formula(values.get("compare"), _COMPARE)
    metric = _words(values.get("metric"))
    if "measure" in values:
        compare = ast.unparse(values["measure"])
    elif metric:
        compare = f"{metric}: {compare}"
    return ClaimText(
        name=_words(values.get("name")),
        statement=_words(values.get("statement")),
        at=_words(values.get("at")),
        compare=compare,
        bound=_formula(values.get("holds"), _BOUNDS),
        expected=_words(values.get("expected")) or "holds",
    )


def _formula(node: ast.expr | None, forms: dict[str, str]) -> str:
    if isinstance(node, ast.Call) and _callee(node) in forms:
        inside = [_words(argument) for argument in node.args]
        try:
            return forms[_callee(node)].format(*inside)
        except IndexError:
            pass
    return _words(node)


def _settings(tree: ast.Module, make: ast.expr | None) -> tuple[tuple[str, str], ...]:
    """What can be set: fields of the dataclass or arguments of the function that `make` names.

    Empty if this module defines neither; inherited fields come last.
    """
    if not isinstance(make, ast.Name):
        return ()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == make.id:
            return tuple(_defaults(node.args).items())
    return tuple(_fields(tree, make.id).items())


def _defaults(arguments: ast.arguments) -> dict[str, str]:
    """Name -> default of a function's arguments."""
    plain = [*arguments.posonlyargs, *arguments.args]
    given = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(plain, given, strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {arg.arg: "required" if value is None else ast.unparse(value) for arg, value in pairs}


def _fields(tree: ast.Module, name: str) -> dict[str, str]:
    """Name -> default of a class that this module defines."""
    found: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if "ClassVar" not in ast.unparse(item.annotation):
                found[item.target.id] = ast.unparse(item.value) if item.value else "required"
        for base in node.bases:
            if isinstance(base, ast.Name):
                for key, default in _inherited(tree, base.id).items():
                    found.setdefault(key, default)
    return found


def _inherited(tree: ast.Module, name: str) -> dict[str, str]:
    """Fields of a base class, here or in the module that it is imported from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                spec = find_spec(node.module) if (alias.asname or alias.name) == name else None
                if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
                    text = Path(spec.origin).read_text(encoding="utf-8")
                    return _fields(ast.parse(text), alias.name)
    return _fields(tree, name)
