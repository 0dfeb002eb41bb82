"""DP-BREM+: private momentum whose noisy sum nobody computes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.privacy.joint_noise import JointNoise
from shoal.parts.privacy.secure_noisy_sum import SecureNoisySum
from shoal.parts.strategy.private_momentum import PrivateMomentum, State, clipped
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.keyed import fold
from shoal.tensor.types import Mask, Stack


@dataclass(frozen=True)
class SecureMomentum(PrivateMomentum):
    """`PrivateMomentum` with the rule "centred", summed by `parts.privacy.secure_noisy_sum`.

    A client clips its difference to the last sum by itself and sends that; what is longer than
    `client_clip` is rejected by the norm check, and the sum counts those accepted. threshold: how
    many clients may collude; bits, draws: see `JointNoise`. The hub of a run stands for all holders
    at once: it executes their arithmetic on shares, while messages carry the vectors themselves.
    Costs about draws * bits * (threshold + 1)^2 products per entry, holder and round.
    Source: Gu, Zhao, Yu and Xiong 2025, section 5 (DP-BREM+, arXiv 2306.12608).

    >>> SecureMomentum(threshold=1).rule
    'centred'
    """

    noise: float = 0.2
    threshold: int = 2
    bits: int = 12
    draws: int = 12

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"threshold": 1, "bits": 8},)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule != "centred" or self.local_noise or self.client_clip == float("inf"):
            raise UsageError(
                f"SecureMomentum: rule={self.rule!r}, local_noise={self.local_noise}, "
                f"client_clip={self.client_clip}; need the rule 'centred', noise on the sum and a "
                "finite clip, which is what the proof of the norm is about"
            )
        if self.secrets != "run":
            raise UsageError(
                f"SecureMomentum: secrets={self.secrets!r}; its shares and noise are drawn by key "
                "(set secrets = 'run'; a run measures what the protocol costs)"
            )
        self.adder.unit(self.deviation)

    @property
    def adder(self) -> SecureNoisySum:
        """The protocol with these settings."""
        return SecureNoisySum(self.threshold, JointNoise(self.bits, self.draws))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        state, parcel = super().local(state, step)
        apart = (parcel.vector - state.center).unsqueeze(-2)
        there = torch.ones_like(apart[..., 0], dtype=torch.bool)
        return state, replace(parcel, vector=clipped(apart, self.client_clip, there).squeeze(-2))

    def combine(
        self, state: State, rows: Stack, mask: Mask, share: Tensor, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        """Each hub's clients one after the other: what is done on shares has no leading axes."""
        shape = state.center.shape
        centers, keys = state.center.reshape(-1, shape[-1]), step.key.reshape(-1)
        found, counts = [], []
        for center, own, heard, key in zip(
            centers, rows.reshape(len(centers), *rows.shape[-2:]), mask.reshape(len(centers), -1),
            keys, strict=True,
        ):  # fmt: skip
            moved, count = center, 0
            vectors = own[heard].double().cpu().numpy()
            if len(vectors) > 2 * self.threshold:
                opened = self.adder(
                    vectors, self.client_clip, self.deviation, fold(key.cpu(), "secure")
                )
                count = int(opened.accepted.sum())
                total = torch.as_tensor(opened.total, device=center.device).to(center.dtype)
                moved = center + total / max(1, count)
            found.append(moved)
            counts.append(count)
        total = torch.tensor(counts, device=state.center.device).reshape(shape[:-1])
        return Heard(torch.stack(found).reshape(shape), total)
