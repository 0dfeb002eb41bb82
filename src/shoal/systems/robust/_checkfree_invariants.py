"""What every run of a pipeline of peers keeps, whatever its faults."""

from __future__ import annotations

from shoal.world.record import Run


def _lives(run: Run) -> dict[int, list[float]]:
    ends: dict[int, list[float]] = {}
    for mark in run.happenings:
        for peer in mark.peers:
            ends.setdefault(peer, []).append(mark.time_s)
    return ends


def no_update_is_doubled(run: Run) -> str | None:
    """In one life a stage takes the step of an iteration once, unless it was rewound or rebuilt."""
    ends = _lives(run)
    for peer in range(1, run.peers):
        last = -1
        since = 0.0
        rows = [
            r for r in run.rows if r.peer == peer and r.name in ("applied", "rewound", "rebuilt")
        ]
        for row in rows:
            if any(since < end <= row.time_s for end in ends.get(peer, ())):
                last = -1
            since = row.time_s
            if row.name != "applied":
                last = int(row.value) - 1
                continue
            update = int(dict(row.labels)["update"])
            if last >= 0 and update != last + 1:
                return f"stage {peer} took step {update} after {last} at {row.time_s} s"
            last = update
    return None


def one_attempt_for_all(run: Run) -> str | None:
    """All parts take a step with the gradients of one attempt: none is lost, and none mixed."""
    if len(_lives(run)) >= run.peers:
        # Where everybody has begun anew, attempts are counted anew.
        return None
    found: dict[float, set[str]] = {}
    for row in run.series("applied"):
        found.setdefault(row.value, set()).add(dict(row.labels)["update"])
    for attempt, updates in found.items():
        if len(updates) > 1:
            return f"attempt {attempt:.0f} was applied as iterations {', '.join(sorted(updates))}"
    # Iterations are made again after a rewind, and by a head that begins anew.
    again = len({row.time_s for row in run.series("rewound", 0)}) + len(_lives(run).get(0, ()))
    steps: dict[str, set[float]] = {}
    for row in run.series("applied"):
        if row.peer:
            steps.setdefault(dict(row.labels)["update"], set()).add(row.value)
    for update, attempts in steps.items():
        if len(attempts) > 1 + again:
            return f"iteration {update} was applied from attempts {sorted(attempts)}"
    return None


def who_ends_has_all(run: Run) -> str | None:
    """Stages that heard the last word of a head that did not give up have all updates."""
    heads = {row.value for row in run.series("version", 0)}
    if len(heads) != 1 or run.series("gave_up"):
        return None
    for row in run.series("version"):
        if row.peer and dict(row.labels)["ended"] == "True" and row.value not in heads:
            return f"stage {row.peer} ended at version {row.value:.0f}, part 0 at {heads}"
    return None
