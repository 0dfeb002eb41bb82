"""FedProx: federated averaging whose clients are held back to where they started.

As `fedavg`, but each client's loss has a term mu/2 |w - w_start|^2 added, which keeps clients with
differing data together when they take many steps.

Li et al. 2020, algorithm 2 (arXiv 1812.06127).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.proximal_steps import ProximalSteps

SYSTEM = System(
    name="fedprox",
    kind="strategy",
    title="Local training with a pull back to the common model",
    make=ProximalSteps,
    source=Source(
        "Li et al. 2020",
        "Federated Optimization in Heterogeneous Networks",
        arxiv="1812.06127",
        venue="MLSys",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "star"}},
)
