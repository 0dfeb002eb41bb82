"""Federated averaging: clients train locally, a hub averages by numbers of samples.

Every round the hub sends its parameters to the active clients; each trains for some epochs (or
steps) and sends its parameters back; the hub's new parameters are their mean, weighted by how many
samples each has. With `--set exchange.sample=10` only ten clients, drawn by key, take part. The hub
is peer 0 and a client as well. When it crashes, nothing moves any more.

McMahan et al. 2017, algorithm 1 (arXiv 1602.05629).
"""

from __future__ import annotations

from shoal.lab.card import System
from shoal.parts.strategy.local_steps import LocalSteps


def fedavg(
    lr: float = 0.1, steps: int | None = None, epochs: int | None = None, batch_size: int = 32,
    momentum: float = 0.0, weight_decay: float = 0.0, lr_decay: float = 1.0,
) -> LocalSteps:  # fmt: skip
    """Local training weighted by samples; one epoch unless steps or epochs are given."""
    if steps is None and epochs is None:
        epochs = 1
    return LocalSteps(
        lr, steps, epochs, batch_size, momentum, weight_decay, lr_decay, by_samples=True
    )


SYSTEM = System(
    name="fedavg",
    kind="strategy",
    title="Clients train locally, a hub averages",
    make=fedavg,
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "star"}},
)
