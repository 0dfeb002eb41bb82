"""TOML with places: the data of a file, and the line on which each key was written."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.values import Path

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_HEADER = re.compile(rf"^\s*(\[\[?)\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*\]\]?")
_ENTRY = re.compile(rf"^\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=(.*)$")
_INLINE = re.compile(rf"(?:^|[{{,\[])\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=")
# Strings and comments hold no keys and no brackets; multi-line strings are matched first.
_OPAQUE = re.compile(
    r'"""(?:\\.|[^\\])*?"""|' r"'''[\s\S]*?'''|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'|#[^\n]*"
)


@dataclass(frozen=True)
class TomlFile:
    """A parsed file. `where(path)` is "name:line" of a key, or of the nearest key around it."""

    name: str
    data: dict[str, Any]
    lines: dict[Path, int]

    def where(self, path: Path) -> str:
        for length in range(len(path), 0, -1):
            line = self.lines.get(path[:length])
            if line is not None:
                return f"{self.name}:{line}"
        return self.name


def load_toml(path: str | FilePath) -> TomlFile:
    """Read a file; a missing file or broken TOML is a UsageError with the line."""
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"{path}: cannot be read: {reason} (check the path)") from None
    return parse_toml(text, str(path))


def parse_toml(text: str, name: str) -> TomlFile:
    """TOML text with the line of each key.

    >>> parse_toml("a = 1\\n[b]\\nc = 2\\n", "x.toml").where(("b", "c"))
    'x.toml:3'
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = re.search(r"\(at line (\d+)", message)
        line = int(found[1]) if found else text.count("\n") + 1
        reason = re.sub(r"\s*\(at .*\)$", "", message)
        raise UsageError(f"{name}:{line}: this is not TOML: {reason} (mend the line)") from None
    return TomlFile(name, data, _find_lines(text))


def _find_lines(text: str) -> dict[Path, int]:
    plain = _OPAQUE.sub(_blank, text)
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    entry: Path = ()
    depth = 0
    for number, line in enumerate(plain.split("\n"), 1):
        if depth == 0 and (header := _HEADER.match(line)):
            table = _resolve(_split(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            for length in range(1, len(table) + 1):
                lines.setdefault(table[:length], number)
            continue
        value = line
        if depth == 0:
            match = _ENTRY.match(line)
            if not match:
                continue
            entry = table + _split(match[1])
            for length in range(len(table) + 1, len(entry) + 1):
                lines.setdefault(entry[:length], number)
            value = match[2]
        # Keys of inline tables get the line, too; places inside arrays of them share the entry's.
        for inner in _INLINE.finditer(value):
            lines.setdefault(entry + _split(inner[1]), number)
        depth += sum(value.count(c) for c in "[{") - sum(value.count(c) for c in "]}")
    return lines


def _resolve(path: Path, counts: dict[Path, int]) -> Path:
    """A header's path with the index of the newest element after each array of tables before it."""
    out: Path = ()
    for position, part in enumerate(path):
        out = (*out, part)
        if position < len(path) - 1 and out in counts:
            out = (*out, counts[out])
    return out


def _split(dotted: str) -> Path:
    return tuple(part.strip().strip("\"'") for part in re.findall(_KEY, dotted))


def _blank(match: re.Match[str]) -> str:
    """Keep quoted keys readable and newlines in place; hide what a string or comment holds."""
    found = match[0]
    if re.fullmatch(r"\"[A-Za-z0-9_. -]+\"|'[A-Za-z0-9_. -]+'", found):
        return found
    return re.sub(r"[^\n]", " ", found)
