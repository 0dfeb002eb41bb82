"""At how many liars a rule breaks down, found by bisection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.lab.robustness.cases import Row, Runs, case_of, field_of
from shoal.lab.robustness.liars import most_liars
from shoal.lab.robustness.matrix import Breakdown, Entry, Matrix
from shoal.lab.scenario import Part


@dataclass
class Search:
    """Bisection for the smallest number that breaks a rule, from 1 to `most`; more breaks it, too.

    >>> search = Search(most=7)
    >>> while (probe := search.probe) is not None:
    ...     search.learn(probe, probe >= 3)
    >>> search.broken, Search(most=3, standing=3).probe
    (3, None)
    """

    most: int
    standing: int = 0
    broken: int = 0

    def __post_init__(self) -> None:
        self.broken = self.broken or self.most + 1

    @property
    def probe(self) -> int | None:
        """The number to try next; None when `broken` is found, beyond `most` if nothing breaks."""
        middle = (self.standing + self.broken) // 2
        return middle if self.standing < middle < self.broken else None

    def learn(self, count: int, broken: bool) -> None:
        """What came of a number; that it breaks the rule outweighs that a larger one does not."""
        if broken and count < self.broken:
            self.broken = count
            self.standing = min(self.standing, count - 1)
        elif not broken and self.standing < count < self.broken:
            self.standing = count


def breakdowns(
    rows: Sequence[Row], attacks: Sequence[Part], matrix: Matrix, told: int | None, below: float,
    runs: Runs,
) -> None:  # fmt: skip
    """Find the smallest number of liars at which each rule is refused, or falls under some attack.

    Falls: its median accuracy over the seeds is less than `below` times the clean one. What the
    matrix has is used; every other number is tried for all rules together, and kept in `probes`.
    """
    known: dict[tuple[str, str], dict[int, list[Entry]]] = {}
    for entry in matrix.entries:
        if entry.attack:
            at = known.setdefault((entry.world, entry.rule), {})
            at.setdefault(entry.liars, []).append(entry)
    searches: list[tuple[Row, Search, dict[int, list[Entry]]]] = []
    for row in rows:
        search = Search(min(most_liars(cell.scenario) for cell in row.base))
        fields = known.setdefault((row.world, row.rule.describe()), {})
        for count in sorted(fields):
            search.learn(count, _broken(fields[count], matrix, below) is not None)
        searches.append((row, search, fields))
    while any(search.probe is not None for _, search, _ in searches):
        tried = [
            (row, fields, attack, count, case_of(row, attack, count, told))
            for row, search, fields in searches
            if (count := search.probe) is not None
            for attack in attacks
        ]
        runs.need(case for *_, case in tried)
        for row, fields, attack, count, case in tried:
            entry = field_of(row, attack, count, count / row.peers, case, runs)
            fields.setdefault(count, []).append(entry)
            matrix.probes.append(entry)
        for _, search, fields in searches:
            if (count := search.probe) is not None:
                search.learn(count, _broken(fields[count], matrix, below) is not None)
    for row, search, fields in searches:
        matrix.breakdowns.append(_found(row, search, fields, matrix, below))


def _broken(fields: Sequence[Entry], matrix: Matrix, below: float) -> Entry | None:
    """The field that breaks a rule most; None if it stands all. One that only failed breaks it."""
    for entry in fields:
        if entry.refused or not entry.values:
            return entry
    worst = min(fields, key=lambda entry: entry.value)
    return worst if worst.value < below * matrix.clean(worst.world, worst.rule) else None


def _found(
    row: Row, search: Search, fields: dict[int, list[Entry]], matrix: Matrix, below: float
) -> Breakdown:
    name, count = row.rule.describe(), search.broken
    worst = None if count > search.most else _broken(fields[count], matrix, below)
    if worst is None:
        return Breakdown(row.world, name, search.most)
    attack = "" if worst.refused else worst.attack
    share = count / row.peers
    return Breakdown(row.world, name, search.most, count, share, attack, worst.refused)
