"""The Markdown pages of the project, and what is in them: code blocks, command lines, links."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    sorted(
        page.relative_to(ROOT).as_posix()
        for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
    )
)
_FENCE = re.compile(r"^(?P<mark>```+)[ \t]*(?P<language>\w*)[^\n]*$")
# Text, and an optional picture inside it; inline code is taken out before.
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. line: the page's line on which its first line of code stands, from 1."""

    language: str
    code: str
    line: int


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    out: list[Block] = []
    inside: list[str] | None = None
    mark = language = ""
    start = 0
    for number, line in enumerate(text_of(page).split("\n"), 1):
        if inside is None:
            fence = _FENCE.match(line)
            if fence:
                inside, mark, language, start = [], fence["mark"], fence["language"], number + 1
        elif line.rstrip() == mark:
            out.append(Block(language, "\n".join(inside), start))
            inside = None
        else:
            inside.append(line)
    assert inside is None, f"{page}:{start}: this block is never closed"
    return out


def script(page: str, first: int = 0, last: int | None = None) -> str:
    """The page's ```python blocks as one text whose line numbers are those of the page."""
    lines: list[str] = []
    for block in [b for b in blocks(page) if b.language == "python"][first:last]:
        lines += [""] * (block.line - 1 - len(lines)) + block.code.split("\n")
    return "\n".join(lines) + "\n"


def module_of(text: str, name: str, folder: Path) -> ModuleType:
    """Run a text as a module of its own, which can then be imported by that name."""
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def commands(page: str) -> Iterator[tuple[int, list[str], bool]]:
    """(line, words, run) of each command line of a page's ```sh and ```console blocks.

    In a `console` block, lines that begin with `$ ` are commands, and they are run.
    """
    for block in blocks(page):
        if block.language not in ("sh", "console"):
            continue
        for offset, line in enumerate(block.code.split("\n")):
            if block.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            # What follows a pipe or a redirection is not ours.
            words = shlex.split(re.split(r"\s(?:\||>>?|&&)\s", line)[0], comments=True)
            if words:
                yield block.line + offset, words, block.language == "console"


def links(page: str) -> list[str]:
    """Targets of a page's links and pictures, those in code left out."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return _LINK.findall(re.sub(r"`[^`\n]*`", "code", text))


def anchors(page: str) -> set[str]:
    """The names that a link may give after `#`, as GitHub makes them from headings."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    out = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        out.add(plain.replace(" ", "-"))
    return out
