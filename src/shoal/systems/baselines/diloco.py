"""DiLoCo: twenty AdamW steps at home, then one outer step along the mean of what all went.

Every round each peer makes `steps` steps of AdamW from the common parameters and tells the others
where they led. The mean displacement is a gradient to an outer SGD with Nesterov momentum, which
every peer computes for itself. So peers talk once per `steps` gradients, and need no hub; with
`--set exchange=star` there is one. On a sparse graph, or under loss, peers are drawn together as in
gossip (`send`).

Douillard et al. 2023, algorithm 1 (arXiv 2311.08105).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.diloco import DiLoCo

SYSTEM = System(
    name="diloco",
    kind="strategy",
    title="Many AdamW steps at home, then one shared step of outer momentum",
    make=DiLoCo,
    source=Source(
        "Douillard et al. 2023",
        "DiLoCo: Distributed Low-Communication Training of Language Models",
        arxiv="2311.08105",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "gossip"}, "topology": {"name": "full"}},
)
