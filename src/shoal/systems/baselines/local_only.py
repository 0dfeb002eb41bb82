"""Every peer learns from its own data alone: what any cooperation has to beat."""

from __future__ import annotations

from shoal.lab.card import System
from shoal.parts.strategy.local_steps import LocalSteps


def local_only(
    lr: float = 0.1, steps: int | None = None, epochs: int | None = None, batch_size: int = 32,
    momentum: float = 0.0, weight_decay: float = 0.0, lr_decay: float = 1.0,
) -> LocalSteps:  # fmt: skip
    """Local training; one epoch a round unless steps or epochs are given."""
    if steps is None and epochs is None:
        epochs = 1
    return LocalSteps(
        lr, steps, epochs, batch_size, momentum, weight_decay, lr_decay, keep_momentum=True
    )


SYSTEM = System(
    name="local-only",
    kind="strategy",
    title="No exchange: every peer learns alone",
    make=local_only,
    scenario="baselines.digits_home",
    uses={"exchange": {"name": "isolated"}},
)
