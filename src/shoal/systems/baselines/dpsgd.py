"""Decentralised parallel SGD: one local step, then an average over the neighbourhood.

Every round each peer takes `steps` gradient steps from its own parameters, sends the result to its
neighbours and replaces it by the weighted mean of what it heard and its own (the topology's mixing
weights; a lost neighbour's weight goes to the own vector). With more steps this is DFedAvg.

Lian et al. 2017, algorithm 1 (arXiv 1705.09056), in its combine-after-adapt form.
"""

from __future__ import annotations

from shoal.lab.card import System
from shoal.parts.strategy.local_steps import LocalSteps


def dpsgd(
    lr: float = 0.1, steps: int | None = None, epochs: int | None = None, batch_size: int = 32,
    momentum: float = 0.0, weight_decay: float = 0.0, lr_decay: float = 1.0,
    keep_momentum: bool = False,
) -> LocalSteps:  # fmt: skip
    """Local training combined with mixing weights; one step unless steps or epochs are given."""
    return LocalSteps(
        lr, steps, epochs, batch_size, momentum, weight_decay, lr_decay,
        keep_momentum=keep_momentum,
    )  # fmt: skip


SYSTEM = System(
    name="dpsgd",
    kind="strategy",
    title="A local step, then an average over the neighbourhood",
    make=dpsgd,
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "gossip"}},
)
