"""What every run of sequential gradient coding keeps, whatever its faults."""

from __future__ import annotations

from bisect import bisect_right

from shoal.world.record import Row, Run

EXACT = 1e-8
"""Relative error of a gradient that is exact but for rounding."""
ROUNDING = 1e-9


def _planned(run: Run) -> Row | None:
    """What the master said first: its jobs, with the scheme's name, delay and load."""
    found = run.series("jobs_planned", 0)
    return found[0] if found else None


def gradients_are_exact(run: Run) -> str | None:
    """Whatever was late, lost, damaged or computed by the master itself: every gradient is that of
    all data. A scheme that leaves stragglers out promises nothing."""
    planned = _planned(run)
    if planned is None or dict(planned.labels)["scheme"] == "ignoring":
        return None
    for row in run.series("gradient_error"):
        if row.value > EXACT:
            return f"the gradient of round {row.round} is off by {row.value:.1e} of its length"
    return None


def jobs_are_in_time(run: Run) -> str | None:
    """Each job is applied in its own round or one of the T next ones."""
    planned = _planned(run)
    if planned is None:
        return None
    most = int(dict(planned.labels)["delay"])
    for row in run.series("job_delay"):
        if not 0 <= row.value <= most:
            return f"a job came {row.value:.0f} rounds after its own; the scheme has T = {most}"
    return None


def jobs_are_applied_in_order(run: Run) -> str | None:
    """In a life of the master each job follows the one before; another life leaves none out."""
    begun = sorted(mark.time_s for mark in run.happenings if 0 in mark.peers)
    last, life = 0, 0
    for row in run.series("job_loss", 0):
        job, now = int(dict(row.labels)["job"]), bisect_right(begun, row.time_s)
        # What was not committed before a crash is done again, all of it where the store is lost.
        if job != last + 1 and not (now > life and 1 <= job <= last):
            return f"job {job} was applied after job {last} at {row.time_s} s"
        last, life = job, now
    return None


def who_ends_has_done_all(run: Run) -> str | None:
    """A master that says it is done has applied every job."""
    planned = _planned(run)
    if planned is None or not run.series("finished_s", 0):
        return None
    jobs = {int(dict(row.labels)["job"]) for row in run.series("job_loss", 0)}
    lacking = set(range(1, int(planned.value) + 1)) - jobs
    return f"it is over without jobs {sorted(lacking)}" if lacking else None


def nobody_does_more_than_the_load(run: Run) -> str | None:
    """A worker's work for a round is at most the fraction of the data that the scheme says."""
    planned = _planned(run)
    if planned is None:
        return None
    load = float(dict(planned.labels)["load"])
    for row in run.series("load"):
        if row.value > load * (1 + ROUNDING):
            return f"worker {row.peer - 1} went over {row.value:.4f} of the data, not {load:.4f}"
    return None


INVARIANTS = (
    gradients_are_exact, jobs_are_in_time, jobs_are_applied_in_order, who_ends_has_done_all,
    nobody_does_more_than_the_load,
)  # fmt: skip
