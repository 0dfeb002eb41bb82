"""One machine has all the data: what any decentralised method would like to reach.

A world of one peer that holds the whole training set and trains on it; faults, links and attacks of
the scenario do not apply, since there is nobody to lose or to listen to. One epoch a round takes as
many gradient computations as one epoch at every peer of the decentralised arms.
"""

from __future__ import annotations

from shoal.lab.card import System
from shoal.parts.strategy.local_steps import LocalSteps


def centralised(
    lr: float = 0.1, steps: int | None = None, epochs: int | None = None, batch_size: int = 32,
    momentum: float = 0.0, weight_decay: float = 0.0, lr_decay: float = 1.0,
) -> LocalSteps:  # fmt: skip
    """Training on everything; one epoch a round unless steps or epochs are given."""
    if steps is None and epochs is None:
        epochs = 1
    return LocalSteps(
        lr, steps, epochs, batch_size, momentum, weight_decay, lr_decay, keep_momentum=True
    )


SYSTEM = System(
    name="centralised",
    kind="strategy",
    title="All data on one machine",
    make=centralised,
    scenario="baselines.digits_home",
    uses={
        "peers": 1,
        "exchange": {"name": "isolated"},
        "topology": None,
        "task.split": "iid",
        "faults": [],
        "attack": None,
        "byzantine": 0,
    },
)
