"""SCAFFOLD: local steps that are corrected by the difference between one's own gradient and all's.

Each client keeps a control variate, the mean gradient of its last participation, and the hub
their mean. A local step follows the gradient minus the own variate plus the mean one, so that
clients with differing data do not drift apart. It doubles the bytes each way and needs clients
that come back.

Karimireddy et al. 2020, algorithm 1 (arXiv 1910.06378).
"""

from __future__ import annotations

from shoal.lab.card import Source, System
from shoal.parts.strategy.control_variates import ControlVariates

SYSTEM = System(
    name="scaffold",
    kind="strategy",
    title="Local steps corrected by control variates",
    make=ControlVariates,
    source=Source(
        "Karimireddy et al. 2020",
        "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        arxiv="1910.06378",
        venue="ICML",
    ),
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "star"}},
)
