"""Federated averaging that sends updates: what a client learned, not what it has.

As `fedavg`, but a client returns its parameters minus those that it was given, and the hub adds the
mean. Without compression both are the same method. With a lossy transform only this form works: the
largest hundredth of an update says much, the largest hundredth of the parameters nothing.

McMahan et al. 2017, algorithm 1 (arXiv 1602.05629).
"""

from __future__ import annotations

from shoal.lab.card import System
from shoal.parts.strategy.local_updates import LocalUpdates

SYSTEM = System(
    name="fedavg-updates",
    kind="strategy",
    title="Clients send what they learned, a hub adds the mean",
    make=LocalUpdates,
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "star"}},
)
