"""What every run of asynchronous learning keeps, whatever its faults: for tests and fault fuzzing.

Each function takes a `Run` and gives a complaint, or None. The names of works hold the origin of
the server's store, so that what a lost store forgot is told apart from what was done twice.
"""

from __future__ import annotations

from collections import Counter

from shoal.world.record import Row, Run


def _names(row: Row) -> list[str]:
    labels = dict(row.labels)
    return labels.get("works", labels.get("work", "")).split()


def _all(run: Run, series: str) -> Counter[str]:
    return Counter(name for row in run.series(series) for name in _names(row))


def works_count_once(run: Run) -> str | None:
    """No work is in two versions, or twice in one."""
    for name, count in _all(run, "applied").items():
        if count > 1:
            return f"work {name} went into versions {count} times"
    return None


def works_were_made(run: Run) -> str | None:
    """Whatever went into a version was made by the client that it is said to be of."""
    made = {(name, row.peer) for row in run.series("made") for name in _names(row)}
    for name in _all(run, "applied"):
        if (name, int(name.split(".")[1])) not in made:
            return f"a version has work {name}, which nobody made"
    return None


def works_are_accounted_for(run: Run) -> str | None:
    """At the end of a server: settled = taken + left out, taken = used + dropped + kept."""
    counts = {row.name.removeprefix("works_"): int(row.value) for row in run.rows
              if row.name.startswith("works_")}  # fmt: skip
    if not counts:
        return None
    out = counts["stale"] + counts["broken"] + counts["unknown"]
    if counts["settled"] != counts["taken"] + out:
        return f"{counts['settled']} works settled, {counts['taken']} taken and {out} left out"
    used = counts["applied"] + counts["dropped"] + counts["kept"]
    if counts["taken"] != used:
        return f"{counts['taken']} works taken, {used} used, dropped or kept"
    return None


def no_work_is_lost(run: Run) -> str | None:
    """What a client was told is taken went into a version, or is kept, or was dropped by name.

    Of the last store of a server that came to its end.
    """
    ends = run.series("works_kept")
    if not ends:
        return None
    origin = dict(ends[-1].labels)["origin"]
    known = _all(run, "applied") + _all(run, "dropped") + Counter(_names(ends[-1]))
    for name in _all(run, "handed_in"):
        if name.split(".")[0] == origin and name not in known:
            return f"work {name} was taken and is nowhere"
    return None


def counts_agree(run: Run) -> str | None:
    """The last store's count of used works is that of the versions made from it."""
    ends = run.series("works_kept")
    if not ends:
        return None
    origin = dict(ends[-1].labels)["origin"]
    names = [name for name in _all(run, "applied").elements() if name.split(".")[0] == origin]
    said = int(run.series("works_applied")[-1].value)
    return None if said == len(names) else f"{said} works used by the books, {len(names)} by name"


INVARIANTS = (
    works_count_once, works_were_made, works_are_accounted_for, no_work_is_lost, counts_agree,
)  # fmt: skip
