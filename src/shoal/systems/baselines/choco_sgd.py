"""CHOCO-SGD: decentralised SGD that sends compressed differences to public copies of the models.

Peers keep a public copy of each model, the same at all who hold it, and send what a transform
leaves of the difference to it. What was left out is part of the next difference. Choose the
transform with `--set transform=top_k`, and `gamma` near the share of energy that it keeps.

Koloskova et al. 2019, algorithms 2 and 5 (arXiv 1902.00340).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.compressed_gossip import CompressedGossip

SYSTEM = System(
    name="choco-sgd",
    kind="strategy",
    title="Gossip of compressed differences to public copies",
    make=CompressedGossip,
    source=Source(
        "Koloskova et al. 2019",
        "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed Communication",
        arxiv="1902.00340",
        venue="ICML",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "gossip"}, "transform": {"name": "top_k", "fraction": 0.1}},
)
