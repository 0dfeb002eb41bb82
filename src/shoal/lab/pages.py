"""Generated documentation: a page for each system, the README's table, contracts and parts.

    python -m shoal.lab.pages                  write everything anew, from the repository's root
    python -m shoal.lab.pages --check          write nothing; exit code 1 when a file is out of date
    python -m shoal.lab.pages --keep REPORT    before that, keep a full reproduction's report, in
                                               brief, as docs/reports/<system>.json

A page is the system's card, its module's docstring, the signature of what it makes, and the last
committed report (docs/reports/<name>.json) if there is one. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.card import Arm, Claim, System
from shoal.lab.card_text import CardText
from shoal.lab.reference import contracts, parts_page, plain, signature
from shoal.lab.report import Report
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Part, Scenario
from shoal.lab.text import interval_text, label, number, table
from shoal.lab.values import thaw

_BEGIN, _END = "<!-- systems: generated -->", "<!-- systems: end -->"
_SHOWN = ("shoal", "python", "torch", "numpy", "processor")


def system_page(card: CardText, system: System, report: Report | None) -> str:
    """The Markdown page of one system."""
    source = system.source
    lines = [f"# {card.name}: {card.title}", "", f"A {card.kind} of the family `{card.family}`."]
    if source is not None:
        lines += ["", f"Published in: {source.authors}, *{source.title}*{_reference(source)}."]
    lines += ["", card.doc, "", "## What it is made of", ""]
    lines += _signature(card, system)
    lines += ["## Scenario", "", *_scenario(card, system), *_arms(system)]
    if system.claims:
        lines += ["## Claims", "", *_claims(system)]
    if system.deviations:
        lines += ["## Where it differs from the paper", ""]
        lines += [f"- {each}" for each in system.deviations] + [""]
    if system.claims or report is not None:
        lines += ["## Last committed report", "", *_report(card, report)]
    lines += ["## Try it", "", "```sh", f"shoal show {card.name}", f"shoal run {card.name}"]
    if system.claims:
        lines += [f"shoal reproduce {card.name} --budget small"]
    lines += [
        "```",
        "",
        f"Source: `{_file(card)}`. All systems: [the table](../../README.md#systems).",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def systems_table(root: Path) -> str:
    """The README's table of systems, a row each, sorted by family and name."""
    rows = []
    for card in _own_cards():
        link = f"[{card.name}](docs/systems/{card.name}.md)"
        system, report = discover.load(card.name), committed(root, card.name)
        rows.append([link, card.kind, card.family, card.title, verdicts(system, report)])
    return "\n".join(_table(["system", "kind", "family", "what it is", "claims"], rows))


def verdicts(system: System, report: Report | None) -> str:
    """What became of a system's claims, in a few words.

    >>> verdicts(System("mine", "study", "Mine"), None)
    'none: a baseline'
    """
    if not system.claims:
        return "none: a baseline" if system.source is None else "none"
    if report is None:
        return f"{len(system.claims)}, not measured yet"
    out = []
    for word in ("holds", "fails", "inconclusive", "out of scale"):
        found = [v for v in report.verdicts if v.verdict == word]
        if not found:
            continue
        surprise = sum(not v.as_expected for v in found)
        text = f"{len(found)} {word}"
        if word != "holds" and word != "out of scale" and not surprise:
            text += " (as the card says)"
        elif surprise:
            text += f" ({surprise} not as the card says)"
        out.append(text)
    return ", ".join(out)


def committed(root: Path, name: str) -> Report | None:
    """The last committed report of a system."""
    path = root / "docs" / "reports" / f"{name}.json"
    return Report.load(path) if path.exists() else None


def keep(root: Path, report: Report) -> Path:
    """Put a reproduction's report, in brief, where pages and table find it."""
    if report.system is None or report.budget != "full":
        raise UsageError(
            f"report {report.title!r}: budget {report.budget}; need a reproduction in full "
            "(shoal reproduce NAME --budget full)"
        )
    path = root / "docs" / "reports" / f"{report.system}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (line.strip() for line in report.brief().to_json().split("\n"))
    path.write_text("".join(lines) + "\n", encoding="utf-8")
    return path


def generated(root: Path) -> dict[Path, str]:
    """Every generated file below a repository's root, with what it must contain."""
    out = {}
    for card in _own_cards():
        path = root / "docs" / "systems" / f"{card.name}.md"
        report = committed(root, card.name)
        out[path] = system_page(discover.find(card.name), discover.load(card.name), report)
    out[root / "docs" / "contracts.md"] = contracts()
    out[root / "docs" / "parts.md"] = parts_page()
    readme = root / "README.md"
    out[readme] = _with_table(readme.read_text(encoding="utf-8"), systems_table(root))
    return out


def stale(root: Path, wanted: Mapping[Path, str] | None = None) -> list[Path]:
    """Generated files that are missing, out of date, or left over from a system that is gone."""
    wanted = generated(root) if wanted is None else wanted
    wrong = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    pages = (root / "docs" / "systems").glob("*.md")
    return sorted(wrong + [page for page in pages if page not in wanted])


def main(arguments: list[str] | None = None) -> int:
    """Write what is out of date, or only say so."""
    parser = argparse.ArgumentParser(prog="python -m shoal.lab.pages", description=__doc__)
    parser.add_argument("root", nargs="?", default=".", help="root of the repository")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--keep", nargs="+", default=[], help="reports to keep", metavar="REPORT")
    chosen = parser.parse_args(arguments)
    root = Path(chosen.root)
    if not (root / "docs").is_dir() or not (root / "README.md").is_file():
        raise UsageError(f"{root}: no docs folder and README.md here (name the repository's root)")
    for path in chosen.keep:
        sys.stdout.write(f"kept: {keep(root, Report.load(path))}\n")
    wanted = generated(root)
    wrong = stale(root, wanted)
    for path in wrong:
        if not chosen.check:
            if path in wanted:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(wanted[path], encoding="utf-8")
            else:
                path.unlink()
        sys.stdout.write(f"{'out of date' if chosen.check else 'written'}: {path}\n")
    return int(chosen.check and bool(wrong))


def _own_cards() -> list[CardText]:
    """The package's own systems; those of SHOAL_SYSTEMS have their documentation elsewhere."""
    return [card for card in discover.cards() if card.root == discover.roots()[0]]


def _file(card: CardText) -> str:
    return "src/shoal/systems/" + Path(card.file).relative_to(card.root).as_posix()


def _reference(source: Any) -> str:
    parts = [source.venue] if source.venue else []
    if source.arxiv:
        parts.append(f"[arXiv {source.arxiv}](https://arxiv.org/abs/{source.arxiv})")
    if source.doi:
        parts.append(f"[doi {source.doi}](https://doi.org/{source.doi})")
    return f" ({', '.join(parts)})" if parts else ""


def _signature(card: CardText, system: System) -> list[str]:
    if system.make is None:
        return ["Nothing of its own: its arms are other systems with other settings.", ""]
    made = sys.modules[system.make.__module__]
    text = Path(made.__file__ or "").read_text(encoding="utf-8")
    lines = ["```pyi", *signature(text, system.make.__name__, methods=False), "```", ""]
    if system.kind == "part":
        lines += [
            f"It fills the scenario's `{system.role}` and is carried by `{system.host}`; settings "
            f"of the host are written `host.key`.",
            "",
        ]
    return lines


def _scenario(card: CardText, system: System) -> list[str]:
    scenario = scenario_of(card.name)
    name = scenario.name or "its own"
    lines = [f"`{name}`:", "", *_settings(scenario.to_json()), ""]
    if system.uses:
        lines += ["What belongs to the method, whatever the scenario:", ""]
        lines += [*_settings(dict(system.uses)), ""]
    budgets = []
    for word in ("small", "full"):
        budget = system.budget(word)
        text = f"{budget.seeds} seed{'s' if budget.seeds != 1 else ''}"
        if budget.scenario:
            text += f", {_plain(budget.scenario)}"
        if budget.arms is not None:
            text += f", arms {', '.join(budget.arms)}"
        budgets.append(f"{word}: {text}")
    return (
        [*lines, f"Budgets of `shoal reproduce`: {'; '.join(budgets)}.", ""]
        if system.claims
        else lines
    )


def _settings(data: Mapping[str, Any]) -> list[str]:
    """A list of settings, those that are empty left out."""
    return [
        f"- {key}: {_plain(value)}"
        for key, value in data.items()
        if key != "name" and value not in ((), [])
    ]


def _plain(value: Any) -> str:
    """A setting for people: code, with parts as calls."""
    if isinstance(value, Part):
        return f"`{value.describe()}`"
    if isinstance(value, Scenario):
        return f"`{value.name}`"
    if isinstance(value, Mapping):
        if isinstance(value.get("name"), str):
            inside = {key: each for key, each in value.items() if key != "name"}
            return f"`{Part(value['name'], inside).describe()}`"
        return "`" + ", ".join(f"{key}={_word(each)}" for key, each in value.items()) + "`"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return "; ".join(_plain(each) for each in value)
    return f"`{_word(value)}`"


def _word(value: Any) -> str:
    if dataclasses.is_dataclass(value) and hasattr(value, "describe"):
        return str(value.describe())  # type: ignore[union-attr]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_word(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_word(each) for each in thaw(value)) + "]"
    return plain(value) if isinstance(value, float) else str(value)


def _arms(system: System) -> list[str]:
    if not system.arms:
        return []
    rows = []
    for name, arm in system.arms.items():
        rows.append([name, f"`{arm.system or system.name}`", _changes(arm)])
    return ["## Arms", "", *_table(["arm", "system", "what differs"], rows), ""]


def _changes(arm: Arm) -> str:
    parts = [f"`{key}={_word(value)}`" for key, value in arm.set.items()]
    parts += [f"`host.{key}={_word(value)}`" for key, value in arm.host.items()]
    parts += [f"{key}: {_plain(value)}" for key, value in arm.scenario.items()]
    if arm.engine:
        parts.append(f"on `{arm.engine}`")
    if arm.prepare is not None:
        parts.append(f"world from `{arm.prepare.__name__}`: {_first(arm.prepare.__doc__)}")
    return ", ".join(parts) or "-"


def _claims(system: System) -> list[str]:
    rows = []
    for claim in system.claims:
        statement = f"**{claim.name}**: {claim.statement}" + (f" ({claim.at})" if claim.at else "")
        rows.append([statement, _measured(claim), str(claim.holds), claim.expected])
    lines = [*_table(["claim", "what is measured", "bound", "expected"], rows), ""]
    for claim in system.claims:
        if claim.reason:
            lines += [
                f'Why *{claim.name}* is expected to be "{claim.expected}": {claim.reason}',
                "",
            ]
    return lines


def _measured(claim: Claim) -> str:
    if claim.measure is not None:
        what = f"`{claim.measure.__name__}`: {_first(claim.measure.__doc__)}"
        return f"{what}, {claim.statistic} over seeds"
    if claim.compare is None:
        return "cannot be measured here"
    return f"{label(claim.metric)} ({claim.take}), {claim.compare}, {claim.statistic} over seeds"


def _first(doc: str | None) -> str:
    """The first sentence of a docstring, without its full stop."""
    text = " ".join((doc or "").split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", text)[0] or "no description"


def _report(card: CardText, report: Report | None) -> list[str]:
    if report is None:
        command = f"shoal reproduce {card.name} --budget full"
        return [f"None yet. `{command}` makes one.", ""]
    seeds = ", ".join(map(str, report.seeds))
    lines = [f"{report.created}, budget {report.budget}, seeds {seeds}.", ""]
    if report.verdicts:
        rows = [
            [
                v.name, number(v.measured), interval_text(v.interval), v.bound, v.verdict,
                "yes" if v.clear else "no",
            ]
            for v in report.verdicts
        ]  # fmt: skip
        heads = ["claim", "measured", "interval", "bound", "verdict", "clear"]
        lines += [*_table(heads, rows), ""]
    metrics, rows = table(report)
    # CPU time says more about the machine than about the system.
    keep = [i for i, metric in enumerate(metrics) if metric != "cpu_s"]
    rows = [[row[0], *(row[i + 1] for i in keep)] for row in rows]
    lines += ["Medians over the seeds:", ""]
    lines += [*_table(["arm", *(label(metrics[i]) for i in keep)], rows), ""]
    shown = [f"{key} {report.environment[key]}" for key in _SHOWN if key in report.environment]
    return [*lines, *textwrap.wrap(f"Made with {', '.join(shown)}.", 100), ""]


def _with_table(readme: str, table: str) -> str:
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UsageError(f"README.md: need the lines {_BEGIN} and {_END} around the table")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows)]


if __name__ == "__main__":
    raise SystemExit(main())
