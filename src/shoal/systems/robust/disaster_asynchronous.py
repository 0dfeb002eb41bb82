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


def unpaced_averaging(
    lr: float = 0.1, steps: int | None = None, epochs: int | None = None, batch_size: int = 8,
    momentum: float = 0.0, weights: Literal["data", "uniform"] = "data", period_s: float = 0.0,
) -> Unpaced:  # fmt: skip
    """DecAvg in turns of `period_s` seconds; 0 = four times what a turn's work typically takes."""
    return Unpaced(DecAvg(lr, steps, epochs, batch_size, momentum, weights), period_s)


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
