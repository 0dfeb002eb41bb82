"""Remember what a lossy transform left out, and add it to the next vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.transform.base import (
    Buffer,
    Codec,
    Settings,
    TensorPayload,
    made,
    plain_settings,
)
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class Feedback:
    """residual [..., dim]: what has not been sent yet; inner: the wrapped transform's state."""

    residual: Vector
    inner: Any


@dataclass(frozen=True)
class ErrorFeedback(Codec):
    """Send C(x + e) and keep e <- x + e - C(x + e), for any transform C.

    inner: a transform's name; settings: its settings, as a mapping or (name, value) pairs.
    The sum of all sent vectors differs from the sum of all inputs by e alone, so nothing is lost,
    only late; that repairs biased contractions. It breaks when |C(x) - x| may exceed |x| (coarse
    unbiased quantisers): e then grows. Wire: as the inner transform.
    Source: Seide et al. 2014, section 3; Karimireddy et al. 2019, algorithm 2 (arXiv 1901.09847).

    >>> codec = ErrorFeedback("top_k", settings={"fraction": 0.5})
    >>> x = torch.tensor([3., 2.])
    >>> first, state = codec.encode(x, codec.init(x), torch.tensor(0))
    >>> second, state = codec.encode(x, state, torch.tensor(0))
    >>> codec.decode(first), codec.decode(second), state.residual
    (tensor([3., 0.]), tensor([0., 4.]), tensor([3., 0.]))
    """

    inner: str = "top_k"
    settings: Settings = ()

    stateful: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"inner": "sign_sgd", "settings": {"per_layer": True}},
        {"inner": "quantise", "settings": (("bits", 4), ("rounding", "nearest"))},
        {"inner": "fedzip", "settings": {"z": 0.1, "raw_entries": 8}},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", plain_settings(self.settings))
        inner = made(self.inner, self.settings)
        if inner.stateful or inner.dense or inner.adds_noise:
            raise UsageError(
                f"error_feedback: inner={self.inner!r} keeps its own memory, loses nothing or adds "
                "noise that feedback would undo; need a lossy codec such as 'top_k' (put "
                "'clip_and_noise' before 'error_feedback' in a chain)"
            )

    @property
    def _inner(self) -> Any:
        return made(self.inner, self.settings, self.spec)

    def init(self, like: Vector) -> Feedback:
        return Feedback(torch.zeros_like(like), self._inner.init(like))

    def encode(self, x: Vector, state: Feedback, key: Key) -> tuple[TensorPayload, Feedback]:
        self._accept(x)
        wanted = x + state.residual
        payload, inner = self._inner.encode(wanted, state.inner, key)
        residual = wanted - self._inner.decode(payload)
        # A broken entry is dropped, or it would poison every later message.
        residual = torch.where(residual.isfinite(), residual, torch.zeros_like(residual))
        return payload, Feedback(residual, inner)

    def decode(self, payload: TensorPayload) -> Vector:
        return self._inner.decode(payload)

    def unpack(self, data: Buffer) -> TensorPayload:
        self._bound()
        return self._inner.unpack(data)
