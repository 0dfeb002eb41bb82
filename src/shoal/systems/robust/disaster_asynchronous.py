"""Decentralised averaging with relays, and without rounds: what `disaster-learning` is when nobody
keeps time.

Every peer trains, tells its neighbours and averages what has come in once per period of its own, so
that lost messages and lost peers cost nothing but their share. Roles, weights and the rule for
relays are those of DecAvg.

Palmieri et al. 2023 (arXiv 2310.02986), section 3, in the asynchronous form.
"""

from __future__ import annotations

from typing import Literal

from shoal.lab.card import Source, System
from shoal.parts.strategy.dec_avg import DecAvg
from shoal.rounds.unpaced import Unpaced
from shoal.world.record import Run


def unpaced_averaging(
    lr: float = 0.1, steps: int | None = None, epochs: int | None = None, batch_size: int = 8,
    momentum: float = 0.0, weights: Literal["data", "uniform"] = "data", period_s: float = 0.0,
) -> Unpaced:  # fmt: skip
    """DecAvg in turns of `period_s` seconds; 0 = four times what a turn's work typically takes."""
    return Unpaced(DecAvg(lr, steps, epochs, batch_size, momentum, weights), period_s)


def news_count_once(run: Run) -> str | None:
    """A peer averages what a neighbour said in a turn at most once, in the order of its turns."""
    # Who came back remembers neither what it heard nor the turn that it was in.
    back = {peer for mark in run.happenings for peer in mark.peers}
    last: dict[tuple[int, int], int] = {}
    for row in run.series("used"):
        for told in dict(row.labels)["news"].split():
            source, turn = map(int, told.split("."))
            before = last.get((row.peer, source), -1)
            if turn <= before and row.peer not in back:
                return f"peer {row.peer} used turn {turn} of {source} after turn {before}"
            last[row.peer, source] = turn
    return None


def news_are_of_neighbors_turns(run: Run) -> str | None:
    """Nobody averages news of itself, or more than came to it."""
    for row in run.series("used"):
        told = dict(row.labels)["news"].split()
        if int(row.value) != len(told) or any(int(n.split(".")[0]) == row.peer for n in told):
            return f"peer {row.peer} used {row.value:g} news: {told}"
    used = sum(row.value for row in run.series("used"))
    if used > run.messages_delivered:
        return f"{used:g} news used, {run.messages_delivered} messages delivered"
    return None


INVARIANTS = (news_count_once, news_are_of_neighbors_turns)
"""What every run keeps, whatever its faults: for fault fuzzing."""

SYSTEM = System(
    name="disaster-asynchronous",
    kind="program",
    title="Averaging with relays without rounds: lost messages and peers hold nobody up",
    make=unpaced_averaging,
    source=Source(
        "Palmieri et al. 2023",
        "Exploring the Impact of Disrupted Peer-to-Peer Communications on Fully Decentralized "
        "Learning in Disaster Scenarios",
        arxiv="2310.02986",
    ),
    scenario="robust.digits_disaster",
    deviations=(
        "the asynchronous form is not spelt out in the paper; chosen: a turn per period on each "
        "peer's own clock, and only what has come in since the last turn is averaged",
        "claims about it are on the card of disaster-learning, beside the form in rounds",
    ),
)
