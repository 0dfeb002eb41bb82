"""Several transforms one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.base.errors import UsageError
from shoal.parts.transform.base import (
    Buffer,
    Codec,
    Settings,
    TensorPayload,
    made,
    plain_settings,
)
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key, Vector

Stage = tuple[str, Settings]


@dataclass(frozen=True)
class Chain(Codec):
    """Dense stages in order, such as `clip_and_noise`, and at the end one transform of any kind.

    stages: (name, settings) each, settings as a mapping or (name, value) pairs. Only the last
    stage decides the wire format, hence all stages before it must be `dense`. Stage i draws from
    the key folded with i, so that two noises are independent.
    Source: the postprocessors of Granqvist et al. 2024 (arXiv 2404.06430).

    >>> import torch
    >>> codec = Chain((("clip_and_noise", {"noise_multiplier": 0.0}), ("top_k", {"fraction": 0.5})))
    >>> x = torch.tensor([3., 4.])
    >>> payload, _ = codec.encode(x, codec.init(x), torch.tensor(0))
    >>> codec.decode(payload)
    tensor([0.0000, 0.8000])
    """

    stages: tuple[Stage, ...] = (("identity", ()),)

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"stages": (("clip_and_noise", {"clip": 2.0}), ("quantise", {"bits": 4}))},
        {"stages": (("identity", ()), ("qsgd", {"levels": 3}))},
        {
            "stages": (
                ("clip_and_noise", {"noise_multiplier": 0.1}),
                ("error_feedback", {"inner": "top_k", "settings": {"fraction": 0.2}}),
            )
        },
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", plain_settings(self.stages))
        shaped = (
            isinstance(self.stages, tuple)
            and len(self.stages) > 0
            and all(isinstance(stage, tuple) and len(stage) == 2 for stage in self.stages)
        )
        if not shaped:
            raise UsageError(
                f"chain: stages={self.stages!r}; need one or more (name, settings) pairs"
            )
        for stage, (name, _) in zip(self._stages[:-1], self.stages[:-1], strict=True):
            if not stage.dense:
                raise UsageError(
                    f"chain: stage {name!r} is a codec and not the last one; only the last stage "
                    "may change the format (move it to the end)"
                )

    @property
    def _stages(self) -> tuple[Any, ...]:
        return tuple([made(name, settings, self.spec) for name, settings in self.stages])

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return all(stage.unbiased for stage in self._stages)

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return any(stage.stateful for stage in self._stages)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return self._stages[-1].dense

    @property
    def adds_noise(self) -> bool:  # type: ignore[override]
        return any(stage.adds_noise for stage in self._stages)

    def contraction(self, dim: int) -> float | None:
        """Known when only the last stage changes anything."""
        *before, last = (stage.contraction(dim) for stage in self._stages)
        return last if all(bound == 0.0 for bound in before) else None

    def init(self, like: Vector) -> tuple[Any, ...]:
        return tuple([stage.init(like) for stage in self._stages])

    def encode(
        self, x: Vector, state: tuple[Any, ...], key: Key
    ) -> tuple[TensorPayload, tuple[Any, ...]]:
        self._accept(x)
        *before, last = self._stages
        after: list[Any] = []
        for place, stage in enumerate(before):
            payload, kept = stage.encode(x, state[place], fold(key, place))
            x = stage.decode(payload)
            after.append(kept)
        payload, kept = last.encode(x, state[-1], fold(key, len(before)))
        return payload, (*after, kept)

    def decode(self, payload: TensorPayload) -> Vector:
        return self._stages[-1].decode(payload)

    def unpack(self, data: Buffer) -> TensorPayload:
        self._bound()
        return self._stages[-1].unpack(data)
