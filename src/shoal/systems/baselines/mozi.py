"""MOZI: the nearest models, and of those the ones that do no worse on a batch of own samples.

Every round each peer takes `steps` gradient steps, sends its parameters to its neighbours, keeps
the nearest part `rho` of what came, tests these on a batch of its own samples, and goes half of the
way to the mean of those that are not worse than its own. In other papers it is called UBAR.

Guo et al. 2022, algorithm 1 (arXiv 2002.08569).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.mozi import Mozi

SYSTEM = System(
    name="mozi",
    kind="strategy",
    title="The nearest models, and of those the ones that do no worse on a local batch",
    make=Mozi,
    source=Source(
        "Guo et al. 2022",
        "Byzantine-Resilient Decentralized Stochastic Gradient Descent",
        arxiv="2002.08569",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "gossip"}},
)
