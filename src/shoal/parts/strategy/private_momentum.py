"""Client momentum of clipped gradients, clipped around the last sum, with noise on the sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.aggregate.median import middle
from shoal.parts.privacy.poisson_sampling import sampled_gradient
from shoal.parts.privacy.secret_keys import Secrets, check_secrets, draw_keys
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor import tree
from shoal.tensor.keyed import fold, normal
from shoal.tensor.stack import masked_mean, usable
from shoal.tensor.types import Key, Mask, Stack, Vector

Rule = Literal["centred", "median", "sign", "entries"]
RULES = ("centred", "median", "sign", "entries")


@dataclass(frozen=True)
class State:
    """params; momentum: a client's phi_i; center: the hub's last phi~; all [..., dim]."""

    params: Vector
    momentum: Vector
    center: Vector


@dataclass(frozen=True)
class PrivateMomentum:
    """Each client sends phi <- beta phi + (1 - beta) g; the hub moves by what `rule` makes of them.

    g: gradients of records drawn with probability `sampling`, each clipped to `record_clip` (R),
    over the expected number (see `parts.privacy.poisson_sampling`). phi is updated in every round
    in which the client works. noise: sigma; the noise has standard deviation sigma R, in every rule
    sized for one record's S = R / (sampling |D|), and `parts.privacy.momentum_accountant` says what
    that buys with s = sigma * sampling * |D|.

    rule: "centred" is DP-BREM: phi~ <- phi~ + (sum_i clip_C(phi_i - phi~) + Z) / n with C =
    `client_clip`; C = inf is the mean, with momentum = 0 DP-FedSGD. "median": the coordinate-wise
    median plus noise, not divided by n, since one record may move a median as far as its client.
    "sign": clients send the signs of their vectors, and the mean sign is followed; one record may
    turn all signs of its client, so that noise must be local. "entries": the
    mean of vectors whose entries are clipped to C. local_noise: each client adds its noise to g
    before the momentum, and nobody trusts the hub.

    With "centred" m malicious of n clients move phi~ by at most 2 m C / n in a round; C must be
    about the distance of honest clients from phi~, far above it is the plain mean. The clip R stays
    the same in all rounds: momentum carries older gradients, so noise that shrinks with R would no
    longer cover them. secrets: "run" draws records and noise by key, which hides nothing from those
    who know the seed; with "system" nobody can work them out (see `parts.privacy.secret_keys`).
    records: |D|, a public number that must not tell whether a record is there; None takes the size
    of each client's shard, which then counts as public. Needs a hub that does not work on data of
    its own.
    Source: Gu, Zhao, Yu and Xiong 2025, algorithm 1 (DP-BREM, arXiv 2306.12608).

    >>> PrivateMomentum(client_clip=0.5).needs_hub
    True
    """

    lr: float = 3.0
    sampling: float = 0.1
    record_clip: float = 1.0
    client_clip: float = 0.2
    momentum: float = 0.9
    noise: float = 0.0
    rule: Rule = "centred"
    local_noise: bool = False
    secrets: Secrets = "run"
    records: int | None = None

    needs_hub: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"noise": 0.1}, {"noise": 0.1, "momentum": 0.0, "client_clip": math.inf},
        {"noise": 0.1, "local_noise": True}, {"rule": "median", "sampling": 1.0},
        {"rule": "sign", "noise": 0.1, "local_noise": True, "lr": 0.05},
        {"rule": "entries", "client_clip": 0.1},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.sampling <= 1:
            raise UsageError(
                f"PrivateMomentum: sampling={self.sampling}; need a probability above 0, at most 1"
            )
        if not 0 <= self.momentum < 1:
            raise UsageError(
                f"PrivateMomentum: momentum={self.momentum}; need 0 <= momentum < 1 (0 = none)"
            )
        if not 0 < self.record_clip < math.inf:
            raise UsageError(
                f"PrivateMomentum: record_clip={self.record_clip}; need a finite norm above 0"
            )
        if not self.client_clip > 0:
            raise UsageError(
                f"PrivateMomentum: client_clip={self.client_clip}; need a norm above 0 (the usual "
                "distance of honest clients from the mean; inf = no clipping)"
            )
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"PrivateMomentum: noise={self.noise}; need a finite number >= 0")
        if self.rule not in RULES:
            raise UsageError(f"PrivateMomentum: rule={self.rule!r}; need one of {', '.join(RULES)}")
        if self.rule == "sign" and self.noise and not self.local_noise:
            raise UsageError(
                f"PrivateMomentum: rule='sign', noise={self.noise} at the hub; one record may turn "
                "every sign that its client sends, far more than the noise is sized for (set "
                "local_noise, or noise = 0)"
            )
        if self.records is not None and self.records < 1:
            raise UsageError(f"PrivateMomentum: records={self.records}; need at least 1, or None")
        check_secrets("PrivateMomentum", self.secrets)

    @property
    def deviation(self) -> float:
        """The noise's standard deviation, sigma R."""
        return self.noise * self.record_clip

    def init(self, params: Vector) -> State:
        return State(params, torch.zeros_like(params), torch.zeros_like(params))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        gradient = sampled_gradient(
            step.task, state.params, step.shard, step.key, self.sampling, self.record_clip,
            self.secrets, self.records,
        )  # fmt: skip
        if self.local_noise:
            gradient = gradient + self.drawn_noise(step.key, gradient)
        momentum = torch.lerp(gradient, state.momentum, self.momentum)
        sent = momentum.sign() if self.rule == "sign" else momentum
        return replace(state, momentum=momentum), Parcel(sent)

    def drawn_noise(self, key: Key, like: Vector) -> Vector:
        """N(0, (sigma R)^2) in each entry."""
        if not self.noise:
            return torch.zeros_like(like)
        keys = draw_keys(fold(key, "noise"), like.shape[-1], self.secrets)
        return normal(keys, dtype=like.dtype) * self.deviation

    def combine(
        self, state: State, rows: Stack, mask: Mask, share: Tensor, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        """The hub's next phi~; rows that are not finite are absent."""
        rows, heard = usable(rows, mask)
        count = heard.sum(-1, keepdim=True).clamp_min(1).to(rows.dtype)
        zero = torch.zeros_like(state.center)
        noise = zero if self.local_noise else self.drawn_noise(step.key, state.center)
        if self.rule == "centred":
            found = state.center + self.noisy_sum(state.center, rows, heard, noise) / count
        elif self.rule == "median":
            found = middle(rows, heard) + noise
        elif self.rule == "sign":
            found = masked_mean(rows.sign(), heard)
        else:
            limit = self.client_clip
            found = masked_mean(rows.clamp(-limit, limit), heard) + noise / count
        return Heard(found, heard.sum(-1))

    def noisy_sum(self, center: Vector, rows: Stack, heard: Mask, noise: Vector) -> Vector:
        """What a trusted hub computes: sum of clip_C(row - center), and the noise."""
        return (clipped(rows - center.unsqueeze(-2), self.client_clip, heard)).sum(-2) + noise

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        params = torch.sub(state.params, heard.vector, alpha=self.lr)
        moved = State(params, state.momentum, heard.vector)
        return tree.where(heard.count > 0, moved, state)

    def down(self, state: State) -> dict[str, Vector]:
        return {"center": state.center}

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.momentum, step.given["center"])

    def params(self, state: State) -> Vector:
        return state.params


def clipped(x: Stack, clip: float, rows: Mask) -> Stack:
    """x [..., k, dim] with each row scaled to length `clip` at most; other rows are zero."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    factor = (clip / length.clamp_min(clip)) if clip < math.inf else torch.ones_like(length)
    return torch.where(rows.unsqueeze(-1), x * factor.to(x.dtype), 0.0)
