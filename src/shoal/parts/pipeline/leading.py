"""How a pipeline is led: how long, how patiently, and which parts fail on purpose."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.base.limits import check_positive
from shoal.parts.pipeline.failure_trace import FailureTrace


@dataclass(frozen=True)
class Leading:
    """How a head leads. iterations: to be applied; evaluate_every: iterations between validations;
    trace: parts that fail on purpose, by the number of applied iterations; keep_every: see `Stage`.

    timeout_s: an attempt at an iteration that takes longer is dropped and begun anew, with twice
    the time. patience_s: without an applied iteration for so long it gives up. pace_s: an iteration
    at most so often.
    """

    iterations: int
    evaluate_every: int = 10
    trace: FailureTrace | None = None
    keep_every: int = 0
    timeout_s: float = 3.0
    patience_s: float = 60.0
    pace_s: float = 0.0

    def __post_init__(self) -> None:
        check_positive("leading", self, "iterations", "evaluate_every", "timeout_s", "patience_s",
                       finite=True)  # fmt: skip
        if self.keep_every < 0 or not 0 <= self.pace_s < float("inf"):
            raise UsageError(
                f"leading: keep_every={self.keep_every}, pace_s={self.pace_s}; need 0 (no "
                "checkpoints, no pause) or more"
            )
