"""FedAdam: the mean update of the clients is a gradient to Adam at the hub.

With `--set rule=yogi` or `rule=adagrad` it is FedYogi or FedAdagrad. Clients run plain SGD and keep
nothing; the hub's moments make up for coordinates that move by very different amounts.

Reddi et al. 2021, algorithm 2 (arXiv 2003.00295).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.adaptive_updates import AdaptiveUpdates

SYSTEM = System(
    name="fedadam",
    kind="strategy",
    title="Mean updates as gradients of an adaptive optimiser at the hub",
    make=AdaptiveUpdates,
    source=Source(
        "Reddi et al. 2021",
        "Adaptive Federated Optimization",
        arxiv="2003.00295",
        venue="ICLR",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "star"}},
)
