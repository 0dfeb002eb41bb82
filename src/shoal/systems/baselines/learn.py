"""LEARN: agreement on gradients and on models, with growing batches in place of momentum.

A step takes two rounds: everybody sends a gradient and steps along the trimmed mean of those heard,
then everybody sends its model and takes the trimmed mean of those heard. The variance of gradients,
behind which faulty peers hide, shrinks with the batch alone: t + 1 samples in step t, so T steps
cost about T^2/2 gradients a peer. The paper repeats each agreement in several waves
(`--set exchange.steps=3`); one wave is the cheapest form.

El-Mhamdi et al. 2021, algorithm 3 (Collaborative Learning in the Jungle, arXiv 2008.00742).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.learn import Learn

SYSTEM = System(
    name="learn",
    kind="strategy",
    title="Trimmed means of gradients and of models, with growing batches",
    make=Learn,
    source=Source(
        "El-Mhamdi et al. 2021",
        "Collaborative Learning in the Jungle (Decentralized, Byzantine, Heterogeneous, "
        "Asynchronous and Nonconvex Learning)",
        arxiv="2008.00742",
        venue="NeurIPS",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "first_come"}, "aggregator": {"name": "trimmed_mean"}},
)
