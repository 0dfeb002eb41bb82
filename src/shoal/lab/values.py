"""Plain setting values: read from text, checked against a type, frozen so that they hash."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from shoal.base.errors import UsageError

Path = tuple[str | int, ...]
Where = Callable[[Path], str]
"""Where a setting was written: path -> "file.toml:12", or just the name of its owner."""


class Unfit(ValueError):
    """A value breaks a rule; the text is the rule. Callers add the place and the repair."""


def refuse(where: Where, path: Path, value: Any, rule: str, repair: str) -> NoReturn:
    """Raise the UsageError that names place, value, rule and repair."""
    key = ".".join(str(part) for part in path)
    raise UsageError(f"{where(path)}: {key} = {value!r}; {rule} ({repair})")


def near(word: str, known: Iterable[str]) -> str:
    """A repair for a misspelt name: the nearest known one, or the whole list when none is near.

    >>> near("peeers", ["peers", "rounds"])
    "did you mean 'peers'?"
    """
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, 1, 0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "there are " + ", ".join(choices) if choices else "there are none"


def freeze(value: Any) -> Any:
    """The hashable form: lists become tuples, tables become sorted tuples of pairs."""
    if isinstance(value, Mapping):
        return tuple((str(k), freeze(value[k])) for k in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    return value


def thaw(value: Any) -> Any:
    """The JSON form: tuples become lists. `freeze(thaw(x)) == x` for frozen x."""
    if isinstance(value, (list, tuple)):
        return [thaw(v) for v in value]
    return value


def literal(text: str) -> Any:
    """A TOML value (tables stay tables), `none`, a comma-separated list, or the text itself.

    >>> literal("0.5"), literal("none"), literal("a"), literal("1,2")
    (0.5, None, 'a', (1, 2))
    """
    stripped = text.strip()
    if stripped.lower() in {"none", "null"}:
        return None
    try:
        return tomllib.loads(f"value = {stripped}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    if "," in stripped:
        return tuple(literal(part) for part in stripped.split(",") if part.strip())
    return stripped


def from_text(text: str, hint: Any) -> Any:
    """The value of `key=text` on a command line for a setting of type `hint`."""
    if hint is str:
        return text
    value = literal(text)
    if _accepts_tuple(hint) and not isinstance(value, (tuple, list)) and value is not None:
        value = (value,)
    try:
        return fit(value, hint)
    except Unfit:
        # `--set name=123` for a field `str | None` means the text.
        return fit(text, hint)


def _accepts_tuple(hint: Any) -> bool:
    options = _options(hint)
    kinds = {typing.get_origin(o) or o for o in options if o is not type(None)}
    return kinds == {tuple}


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def fit(value: Any, hint: Any) -> Any:
    """The value in the form that `hint` asks for, or Unfit with the rule.

    >>> fit(3, float), fit(2.0, int), fit([1, 2], tuple[int, ...])
    (3.0, 2, (1, 2))
    """
    rules = []
    for option in _options(hint):
        try:
            return _fit_one(value, option)
        except Unfit as error:
            rules.append(str(error).removeprefix("need "))
    raise Unfit("need " + " or ".join(dict.fromkeys(rules)))


def _fit_one(value: Any, option: Any) -> Any:
    origin = typing.get_origin(option)
    if option is type(None) or option is None:
        if value is None:
            return None
        raise Unfit("need none")
    if origin is typing.Literal:
        choices = typing.get_args(option)
        if value in choices:
            return value
        raise Unfit("need one of " + ", ".join(map(repr, choices)))
    if option is bool:
        good = isinstance(value, bool)
    elif option is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        good = isinstance(value, int) and not isinstance(value, bool)
    elif option is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if good else value
    elif option is str:
        good = isinstance(value, str)
    elif origin is tuple or option is tuple:
        return _fit_tuple(value, typing.get_args(option))
    else:
        return freeze(value)
    if not good:
        raise Unfit(f"need {_NOUNS[option]}")
    return value


def _fit_tuple(value: Any, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise Unfit("need a list")
    if not parts:
        return freeze(value)
    if len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(fit(v, parts[0]) for v in value)
    if len(parts) != len(value):
        raise Unfit(f"need a list of {len(parts)} values")
    return tuple(fit(v, p) for v, p in zip(value, parts, strict=True))
