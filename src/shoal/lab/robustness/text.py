"""A robustness matrix as tables: for pages, Markdown, CSV and the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.lab.robustness.matrix import Matrix, Summary

Table = tuple[str, list[str], list[list[str]]]
"""Title, heads, rows."""


def percent(value: float) -> str:
    """An accuracy in percent, without the sign.

    >>> percent(0.8766), percent(0.2), percent(float("nan"))
    ('87.7', '20.0', '-')
    """
    return "-" if not math.isfinite(value) else f"{100 * value:.1f}"


def share_text(share: float) -> str:
    """A share of the peers.

    >>> share_text(0.3), share_text(5 / 12)
    ('30%', '41.7%')
    """
    return f"{round(100 * share, 1):g}%"


def points(value: float) -> str:
    """A difference of shares in points, with its sign.

    >>> points(-0.0213), points(-0.0001)
    ('-2.1', '+0.0')
    """
    # What rounds to zero has no sign of its own.
    return "-" if not math.isfinite(value) else f"{round(100 * value, 1) + 0.0:+.1f}"


def summary_table(matrix: Matrix, world: str) -> Table:
    """A row for each rule: clean accuracy and cost, worst case, average, breakdown."""
    looked = bool(matrix.breakdowns)
    heads = ["rule", "clean", "clean cost", "worst", "under", "average"]
    rows = []
    for row in matrix.summary():
        if row.world == world:
            end = matrix.breakdown(world, row.rule)
            ran = "" if row.ran == row.fields else f" ({row.ran} of {row.fields})"
            rows.append(
                [row.rule, percent(row.clean), points(row.clean_cost), percent(row.worst),
                 _where(row), percent(row.average) + ran,
                 *([end.text if end else "-"] if looked else [])]
            )  # fmt: skip
    return "Summary", [*heads, *(["breakdown"] if looked else [])], rows


def worst_table(matrix: Matrix, world: str) -> Table:
    """Rule x share: the worst case over the attacks; the first column has no liars."""
    shares = [0.0, *(share for share in matrix.shares if share)]
    rows = [
        [rule, *(matrix.at_worst(world, rule, share)[1] for share in shares)]
        for rule in matrix.rules
    ]
    return (
        "Worst case over the attacks", ["rule", *(lying(matrix, world, s) for s in shares)], rows
    )  # fmt: skip


def share_table(matrix: Matrix, world: str, share: float) -> Table:
    """Rule x attack at one share of liars, with the average over the attacks."""
    rows = []
    for rule in matrix.rules:
        texts = [matrix.entry(world, rule, attack, share).text for attack in matrix.attacks]
        rows.append([rule, *texts, percent(matrix.average(world, rule, share))])
    return f"{lying(matrix, world, share)} lie", ["rule", *matrix.attacks, "average"], rows


def lying(matrix: Matrix, world: str, share: float) -> str:
    """A share with the number of peers that it means."""
    counts = {e.liars for e in matrix.entries if (e.world, e.share) == (world, share)}
    return f"{share_text(share)} ({max(counts, default=0)})"


def tables(matrix: Matrix, world: str) -> list[Table]:
    """All tables of a world."""
    shares = [share for share in matrix.shares if share]
    return [
        summary_table(matrix, world), worst_table(matrix, world),
        *(share_table(matrix, world, share) for share in shares),
    ]  # fmt: skip


def notes(matrix: Matrix) -> list[str]:
    """What a reader must know."""
    told = "the truth (in a graph, the most that one peer hears)"
    seeds = f"{len(matrix.seeds)} seed{'s' if len(matrix.seeds) != 1 else ''}"
    lines = [
        f"Honest peers' accuracy at the end in percent, median over {seeds}. All fields of a seed "
        "have the same data and links; the liars of a share are among those of a larger one. A hub "
        "does not lie.",
        f"Rules that ask how many lie are told {told if matrix.told is None else matrix.told}. "
        "Clean: nobody lies, and the rule knows it. Clean cost: nobody lies, but the rule is told "
        "of the most liars that it stands here; its accuracy minus that of the mean.",
    ]
    if matrix.below is not None:
        lines.append(
            "Breakdown: the smallest number of liars, found by bisection, at which the worst case "
            f"falls below {matrix.below:g} of the rule's clean accuracy, or the rule is refused."
        )
    if matrix.rates:
        chosen = ", ".join(f"{name} {rate:g}" for name, rate in matrix.rates.items())
        lines.append(f"Learning rates, the best without liars on another seed: {chosen}.")
    return lines


def reasons(matrix: Matrix) -> list[tuple[str, str, str]]:
    """(rule in its world, shares, reason) of what was refused or ended in an error."""
    found: dict[tuple[str, str], list[str]] = {}
    for e in matrix.entries:
        reason = e.refused or e.error
        if reason and e.attack:
            # What is refused does not depend on the attack.
            what = f"{e.world}: {e.rule}" + ("" if e.refused else f", {e.attack}")
            shares = found.setdefault((what, reason), [])
            if share_text(e.share) not in shares:
                shares.append(share_text(e.share))
    return [(what, ", ".join(shares), reason) for (what, reason), shares in found.items()]


def markdown(matrix: Matrix) -> str:
    """All tables, what was refused, notes, environment."""
    lines = [f"# {matrix.title}", "", matrix.created, ""]
    for world in matrix.worlds:
        lines += [f"## {world}, {matrix.peers[world]} peers", ""]
        for title, heads, rows in tables(matrix, world):
            lines += [f"### {title}", "", _line(heads), _line(["---"] * len(heads))]
            lines += [*map(_line, rows), ""]
    lines += ["## Notes", ""]
    lines += [f"- {note}" for note in notes(matrix)]
    lines += [f"- {what} at {shares}: {reason}" for what, shares, reason in reasons(matrix)]
    lines += ["", "## Environment", ""]
    lines += [f"- {key}: {value}" for key, value in matrix.environment.items()]
    return "\n".join(lines) + "\n"


def comma_separated(matrix: Matrix) -> str:
    """A row for each field and seed, and one for each field that has no number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ("world", "rule", "attack", "share", "liars", "told", "seed", "accuracy", "reason")
    )
    for e in (*matrix.entries, *matrix.probes):
        told = "" if e.told is None else e.told
        values = [(seed, repr(value)) for seed, value in e.values.items()] or [("", "")]
        for pair in values:
            writer.writerow(
                (e.world, e.rule, e.attack, e.share, e.liars, told, *pair, e.refused or e.error)
            )
    return buffer.getvalue()


def _where(row: Summary) -> str:
    return f"{row.worst_attack}, {share_text(row.worst_share)}" if row.worst_attack else "-"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
