"""Decentralised SGD with Polyak's momentum: one damped momentum step, then what all agree on.

Every round each peer takes one step along its momentum, a mean of its past gradients that never
leaves it, and sends the resulting parameters to everybody. With the mean as aggregator, nobody
faulty and one wave it is momentum SGD on the pooled batch; with a robust rule it is the half of
MoNNA that happens at each peer, and what robust rules are compared in.

Polyak 1964; the damped form is algorithm 1 of Farhadkhani et al. 2023 (arXiv 2209.10931).
"""

from __future__ import annotations

from shoal.lab.card import System
from shoal.parts.strategy.momentum_step import MomentumStep

SYSTEM = System(
    name="momentum-sgd",
    kind="strategy",
    title="A damped momentum step, then what everybody agrees on",
    make=MomentumStep,
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "first_come"}},
)
