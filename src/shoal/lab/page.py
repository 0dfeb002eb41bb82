"""A report as one HTML page that loads nothing: styles, pictures and data are inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from shoal.lab import chart_picture, plot
from shoal.lab.faults import read_fault
from shoal.lab.page_parts import document, figure, header, section, table
from shoal.lab.picture import picture
from shoal.lab.scenario import Scenario
from shoal.lab.text import columns, interval_text, label, level_text, number

if TYPE_CHECKING:
    from shoal.lab.report import Report
    from shoal.lab.report_data import CellResult

# Pictures per metric beyond these would bury the page; the JSON has them all.
METRICS_MAX = 4


def page(report: Report, replay: str = "") -> str:
    """The whole page."""
    sections = [
        _head(report),
        _claims(report),
        _summary(report),
        _errors(report),
        _plots(report),
        _charts(report),
        _progress(report),
        _peers(report),
        _network(report),
        _faults(report),
        _setting(report),
        _again(report, replay),
    ]
    return document(report.title, sections)


def _head(report: Report) -> str:
    first = report.cells[0] if report.cells else None
    engines = sorted({cell.engine for cell in report.cells if cell.engine})
    facts = [
        f"{first.peers:,} peers" if first else "",
        f"{len(report.arms)} arm{'s' if len(report.arms) != 1 else ''}",
        f"{len(report.seeds)} seed{'s' if len(report.seeds) != 1 else ''}",
        f"engine {', '.join(engines)}" if engines else "",
        f"{report.budget} budget" if report.system and report.budget else "",
        report.created,
    ]
    what = "Reproduction" if report.budget else "Run"
    over = f"{what} of {report.system}" if report.system else "Comparison"
    return header(over, report.title, facts)


_BADGES = {"holds": "good", "fails": "bad", "inconclusive": "open", "out of scale": "quiet"}


def _claims(report: Report) -> str:
    rows = []
    for v in report.verdicts:
        badge = f'<span class="badge {_BADGES[v.verdict]}">{v.verdict}</span>'
        if not v.as_expected:
            badge += f'<span class="small">expected: {escape(v.expected)}</span>'
        elif v.verdict in ("holds", "fails"):
            badge += f'<span class="small">{"clear" if v.clear else "not clear"}</span>'
        interval = f"{interval_text(v.interval)}<span class='small'>{level_text(v.interval)}</span>"
        where = f"<span class='small'>{escape(v.at)}</span>" if v.at else ""
        rows.append(
            [
                badge,
                f"<b>{escape(v.name)}</b><span class='small'>{escape(v.statement)}</span>{where}",
                f"{number(v.measured)}<span class='small'>{escape(v.statistic)} of "
                f"{escape(v.comparison)}</span>",
                interval,
                escape(v.bound),
                plot.dots(v.values, (v.low, v.high)),
            ]
        )
    if not rows:
        return ""
    heads = ["verdict", "claim", "measured", "interval", "bound", "seeds"]
    note = (
        "A claim holds when the statistic over the paired seeds lies within its bound. "
        "Clear: the whole interval does."
    )
    return section("Claims", table(heads, rows, "claims"), note=note)


def _summary(report: Report) -> str:
    summary = report.summary()
    common, single = columns(report)
    level = next((row.interval for row in summary if row.interval is not None), None)
    note = "Last value of each metric"
    if level is not None:
        note += (
            f": median over {len(report.seeds)} seeds, below it the {level_text(level)} interval"
        )
    tables = _numbers(report, common, report.arms)
    if single:
        having = [
            arm for arm in report.arms if any(r.arm == arm and r.metric in single for r in summary)
        ]
        tables += '<p class="note more">Of single arms</p>' + _numbers(report, single, having)
    return section("Results", tables, note=note + ".")


def _numbers(report: Report, metrics: list[str], arms: Sequence[str]) -> str:
    """A row per arm, a column per metric."""
    rows = []
    for arm in arms:
        values = {row.metric: row for row in report.summary() if row.arm == arm}
        line = [_chip(report, arm)]
        for metric in metrics:
            row = values.get(metric)
            if row is None:
                line.append('<span class="small">missing</span>')
                continue
            text = number(row.value, metric)
            if row.interval is not None and row.interval.low != row.interval.high:
                text += f"<span class='small'>{interval_text(row.interval, metric)}</span>"
            if row.seeds < len(report.seeds):
                text += f"<span class='small'>{row.seeds} of {len(report.seeds)} seeds</span>"
            line.append(text)
        rows.append(line)
    return table(["", *map(escape, map(label, metrics))], rows, "numbers")


def _chip(report: Report, arm: str) -> str:
    color = plot.looks(report.arms)[arm].color
    return f'<span class="chip" style="--c:{color}"></span>{escape(arm)}'


def _legend(report: Report) -> str:
    chips = "".join(f"<span>{_chip(report, arm)}</span>" for arm in report.arms)
    return f'<p class="legend">{chips}</p>'


def _errors(report: Report) -> str:
    rows = [
        [escape(cell.arm), str(cell.seed), f"<code>{escape(cell.error)}</code>"]
        for cell in report.cells
        if cell.error
    ]
    return section(
        "Runs that ended in an error", table(["arm", "seed", "error"], rows) if rows else ""
    )


def _plots(report: Report) -> str:
    """The pictures that the card asks for."""
    figures = [figure(plot.against(report, each), each.title) for each in report.plots]
    note = "Points are medians over the seeds, bands reach from the lowest to the highest seed."
    return section("Arm against arm", *figures, note=note)


def _charts(report: Report) -> str:
    """Pictures of what the card's own functions make of the runs."""
    figures = [figure(chart_picture.svg(each), each.title) for each in report.charts]
    return section("Findings", *figures)


def _progress(report: Report) -> str:
    figures = [figure(plot.progress(report, name)) for name in report.metrics()[:METRICS_MAX]]
    if not any(figures):
        return ""
    note = "Lines are medians over the seeds, bands reach from the lowest to the highest seed"
    if any(cell.happenings for cell in report.cells):
        note += ", dashed marks are faults"
    return section("Progress", _legend(report), *figures, note=note + ".")


def _peers(report: Report) -> str:
    figures = [figure(plot.spread(report, name)) for name in report.metrics()[:2]]
    if not any(figures):
        return ""
    note = f"How single peers fare, with seed {report.seeds[0]}."
    return section("Spread over the peers", _legend(report), *figures, note=note)


def _network(report: Report) -> str:
    figures = []
    for graph in report.graphs:
        cell = _first(report, graph.arms)
        byzantine = cell.byzantine if cell else ()
        struck = {p: f["kind"] for f in (cell.faults if cell else []) for p in f.get("who", ())}
        edges = sum(graph.degrees) // 2
        caption = f"{', '.join(graph.arms)}: {graph.peers:,} peers, {edges:,} links in round 0"
        figures.append(figure(picture(graph, byzantine, struck), caption))
    load = figure(plot.traffic(report), "Who carries the load")
    if not figures and not load:
        return ""
    return section("Network", f'<div class="pair">{"".join(figures)}{load}</div>')


def _first(report: Report, arms: tuple[str, ...]) -> CellResult | None:
    return next((cell for cell in report.cells if cell.arm in arms), None)


def _faults(report: Report) -> str:
    """The explicit faults of the first seed, each once with the arms that had it."""
    found: dict[str, tuple[list[str], str]] = {}
    for cell in report.cells:
        if cell.seed != report.seeds[0]:
            continue
        for fault in cell.faults:
            text = read_fault(fault, lambda path: "report", ()).describe()
            who = ", ".join(map(str, fault.get("who", ())))
            arms = found.setdefault(text + who, ([], ""))[0]
            more = f"<span class='small'>peers {who}</span>" if who not in text else ""
            found[text + who] = (arms, escape(text) + more)
            if cell.arm not in arms:
                arms.append(cell.arm)
    rows = []
    for arms, text in list(found.values())[:60]:
        everybody = len(arms) == len(report.arms)
        rows.append([text, "all arms" if everybody else escape(", ".join(arms))])
    note = f"The explicit list of seed {report.seeds[0]}"
    if len(found) > 60:
        note += f"; the first 60 of {len(found):,}, the others are in the JSON file"
    return section(
        "Faults", table(["fault", "arms"], rows, "plain") if rows else "", note=note + "."
    )


def _setting(report: Report) -> str:
    """The first arm's scenario in full, and in the other arms what differs from it."""
    cells = [c for c in (_first(report, (arm,)) for arm in report.arms) if c is not None]
    plain = {cell.arm: _lines(cell) for cell in cells}
    if not plain:
        return ""
    shared = set.intersection(*(set(lines.items()) for lines in plain.values()))
    first = next(iter(plain.values()))
    rows = _group("all arms", {k: v for k, v in first.items() if (k, v) in shared})
    for arm, lines in plain.items():
        own = {k: v for k, v in lines.items() if (k, v) not in shared}
        rows += _group(_chip(report, arm), own)
    return section("Scenario and settings", table(["", "setting", "value"], rows, "plain dense"))


def _group(name: str, lines: dict[str, str]) -> list[list[str]]:
    """Rows of a group; its name stands in the first one only."""
    return [
        ["" if index else name, escape(key), escape(value)]
        for index, (key, value) in enumerate(lines.items())
    ]


def _lines(cell: CellResult) -> dict[str, str]:
    if cell.cell is None:
        return {"live objects": ", ".join(cell.live)}
    scenario = Scenario.from_json(cell.cell["scenario"])
    out = {"system": str(cell.cell["system"])}
    out |= {f"setting {key}": str(value) for key, value in cell.cell["settings"].items()}
    out |= {f"host {key}": str(value) for key, value in cell.cell["host"].items()}
    for key, value in scenario.to_json().items():
        if key in ("seed", "faults"):
            continue
        part = getattr(scenario, key)
        out[key] = part.describe() if hasattr(part, "describe") else str(value)
    out |= {f"engine {key}": str(value) for key, value in cell.settings.items()}
    return out


def _again(report: Report, replay: str) -> str:
    command = f'<pre class="command">{escape(replay)}</pre>' if replay else ""
    live = [cell for cell in report.cells if cell.live]
    if live:
        names = ", ".join(dict.fromkeys(name for cell in live for name in cell.live))
        command = (
            f"<p>Runs with live Python objects ({escape(names)}) cannot be replayed from "
            "a report: run the script again.</p>"
        )
    facts = [
        f"<b>{escape(key.replace('_', ' '))}</b> {escape(str(value))}"
        for key, value in report.environment.items()
        if value is not None
    ]
    environment = f'<p class="environment">{" ".join(f"<span>{f}</span>" for f in facts)}</p>'
    digests = [
        [_chip(report, c.arm), str(c.seed), f"<code>{c.state_digest[:16]}</code>",
         f"<code>{c.trace_digest[:16]}</code>", number(c.totals.get("cpu_s", math.nan), "cpu_s")]
        for c in report.cells if not c.error
    ]  # fmt: skip
    heads = ["arm", "seed", "state digest", "trace digest", "CPU time"]
    more = f"<details><summary>Digests of the {len(digests)} runs</summary>{table(heads, digests)}"
    return section(
        "Run it again", command, environment, more + "</details>",
        note="The same code and seeds give the same numbers and digests.",
    )  # fmt: skip
