"""Gradient tracking: gossip of models, and of an estimate of the mean gradient.

Every round each peer steps along its tracker, and mixes model and tracker with its neighbours'.
The trackers' mean is the mean of all peers' last gradients, so a constant step size leads to the
optimum of all, where D-PSGD settles at a distance that grows with the difference of the data.

Pu and Nedic 2021 (arXiv 1805.11454).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.gradient_tracking import GradientTracking

SYSTEM = System(
    name="gradient-tracking",
    kind="strategy",
    title="Gossip of models and of a tracked mean gradient",
    make=GradientTracking,
    source=Source(
        "Pu and Nedic 2021",
        "Distributed Stochastic Gradient Tracking Methods",
        arxiv="1805.11454",
        venue="Mathematical Programming",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "gossip"}},
)
