"""Experts' velocities combined by a router: the flow of all data from the flows of its clusters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.flow.path import check_times
from shoal.tensor import keyed
from shoal.tensor.types import Key

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [n, dim], t [n]) -> velocity [n, dim]."""

Router = Callable[[Tensor, Tensor], Tensor]
"""(x_t [n, dim], t [n]) -> how likely each expert's cluster is, [n, experts]."""

KINDS = ("full", "uniform", "sample", "top", "threshold", "nucleus")


@dataclass(frozen=True)
class Rule:
    """Which experts count, and how much, given the router's probabilities.

    full: all by their probabilities; uniform: all alike; sample: one, drawn; top: the `amount` most
    likely; threshold: those of probability `amount` or more (and the likeliest); nucleus: the
    fewest whose probabilities sum to `amount` or more. Those that count are scaled to sum to 1.

    >>> Rule.of("top2"), Rule.of("nucleus0.9").amount
    (Rule(kind='top', amount=2.0), 0.9)
    >>> Rule.of("top1").weights(torch.tensor([0.1, 0.7, 0.2]))
    tensor([0., 1., 0.])
    """

    kind: str = "full"
    amount: float = 0.0

    def __post_init__(self) -> None:
        good = {
            "top": self.amount >= 1 and self.amount == int(self.amount),
            "threshold": 0 <= self.amount <= 1,
            "nucleus": 0 < self.amount <= 1,
        }.get(self.kind, self.kind in KINDS)
        if not good:
            raise UsageError(
                f"ensemble: rule {self.kind}{self.amount:g}; need full, uniform, sample, top with "
                "a count (top1), or threshold or nucleus with a probability (nucleus0.9)"
            )

    @classmethod
    def of(cls, text: str) -> Rule:
        """From a word, such as `full`, `top1` or `nucleus0.9`."""
        found = re.fullmatch(r"([a-z]+)(\d*\.?\d*)", text)
        if found is None:
            raise UsageError(f"ensemble: rule {text!r}; need a word such as full, top1, nucleus0.9")
        return cls(found[1], float(found[2] or 0))

    def weights(self, share: Tensor, key: Key | None = None) -> Tensor:
        """Weights [..., experts] that sum to 1, from probabilities [..., experts].

        key: for `sample` alone, one for each row or for all.
        """
        match self.kind:
            case "full":
                kept = share
            case "uniform":
                kept = torch.ones_like(share)
            case "top":
                most = min(int(self.amount), share.shape[-1])
                kept = _only(share, share.topk(most, -1).indices)
            case "threshold":
                large = torch.where(share >= self.amount, share, 0.0)
                kept = torch.where(
                    (large > 0).any(-1, keepdim=True), large, _only(share, _largest(share))
                )
            case "nucleus":
                order = share.argsort(dim=-1, descending=True, stable=True)
                ranked = share.gather(-1, order)
                before = ranked.cumsum(-1) - ranked
                kept = torch.zeros_like(share).scatter(
                    -1, order, torch.where(before < self.amount, ranked, 0.0)
                )
            case _:
                if key is None:
                    raise UsageError("ensemble: rule sample draws; it needs a key (give one)")
                edges = share.cumsum(-1)
                draw = keyed.uniform(key, dtype=share.dtype).expand(share.shape[:-1])
                hit = (edges <= draw.unsqueeze(-1) * edges[..., -1:]).sum(-1, keepdim=True)
                return _only(torch.ones_like(share), hit.clamp_max(share.shape[-1] - 1))
        return kept / kept.sum(-1, keepdim=True)


def _largest(share: Tensor) -> Tensor:
    return share.argmax(-1, keepdim=True)


def _only(share: Tensor, places: Tensor) -> Tensor:
    return torch.zeros_like(share).scatter(-1, places, share.gather(-1, places))


FULL = Rule()


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Experts, of which None are missing, and their router (None for a single expert).

    v(x, t) = sum_k r_k(x, t) v_k(x, t). The router's probabilities must be those of noised samples,
    p_t(k | x_t). Without a missing expert the others' probabilities are scaled to sum to 1, which
    is exactly the flow of the rest of the data. An expert is asked for those samples alone in which
    it counts, so `top1` costs what one model does.
    Source: McAllister et al. 2025, sections 3 and 4.3 (arXiv 2501.05450).

    >>> still = Ensemble((lambda x, t: 0 * x, lambda x, t: x), lambda x, t: torch.ones(len(x), 2))
    >>> still.velocity(torch.ones(1, 2), torch.ones(1))
    tensor([[0.5000, 0.5000]])
    >>> still.without(0).velocity(torch.ones(1, 2), torch.ones(1))
    tensor([[1., 1.]])
    """

    experts: tuple[Velocity | None, ...]
    router: Router | None = None

    def __post_init__(self) -> None:
        if not self.present:
            raise UsageError("ensemble: no expert is there; need at least one")
        if self.router is None and len(self.experts) > 1:
            raise UsageError(
                f"ensemble: {len(self.experts)} experts and no router; only one can do without"
            )

    @property
    def present(self) -> tuple[int, ...]:
        return tuple(k for k, expert in enumerate(self.experts) if expert is not None)

    def without(self, *gone: int) -> Ensemble:
        """The ensemble that has lost these experts."""
        kept = tuple(None if k in gone else expert for k, expert in enumerate(self.experts))
        return replace(self, experts=kept)

    def weights(self, x: Tensor, t: Tensor, rule: Rule = FULL, key: Key | None = None) -> Tensor:
        """What each expert counts: [n, experts], 0 for those that are missing."""
        check_times(t)
        here = torch.tensor([e is not None for e in self.experts], device=x.device)
        if self.router is None:
            return x.new_ones(len(x), 1)
        share = self.router(x, t).to(x.dtype)
        if share.shape != (len(x), len(self.experts)):
            raise UsageError(
                f"ensemble: the router gives {tuple(share.shape)} for {len(x)} samples; need one "
                f"number for each of {len(self.experts)} experts"
            )
        share = share * here
        # Where only missing experts were likely, none of the others is likelier than another.
        share = torch.where(share.sum(-1, keepdim=True) > 0, share, here.to(share.dtype))
        present = list(self.present)
        out = torch.zeros_like(share)
        chosen = share[:, present]
        out[:, present] = rule.weights(chosen / chosen.sum(-1, keepdim=True), key)
        return out

    def velocity(self, x: Tensor, t: Tensor, rule: Rule = FULL, key: Key | None = None) -> Tensor:
        """The combined velocity [n, dim] at x_t [n, dim] and times [n]."""
        return self.combined(x, t, self.weights(x, t, rule, key))

    def combined(self, x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """The experts' velocities with given weights [n, experts]."""
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            counts = weight[:, k] > 0
            if expert is None or not bool(counts.any()):
                continue
            at = counts.nonzero().squeeze(-1)
            found = expert(x[at], t[at])
            if found.shape != (len(at), x.shape[1]):
                raise UsageError(
                    f"ensemble: expert {k} gives {tuple(found.shape)} for samples "
                    f"{(len(at), x.shape[1])}; need the shape of the samples"
                )
            out[at] += weight[at, k].unsqueeze(-1) * found
        return out

    def sample(
        self, noise: Tensor, steps: int = 50, rule: Rule | str = FULL, *, heun: bool = False,
        key: Key | None = None,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """Samples [n, dim] made of noise [n, dim], and how many experts were asked per velocity.

        Euler steps from t = 1 to 0, or Heun's, which ask twice per step. key: for rule `sample`.
        """
        rule = Rule.of(rule) if isinstance(rule, str) else rule
        asked: list[float] = []

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            own = None
            if key is not None:
                own = keyed.grid(keyed.fold(key, len(asked)), len(x))
            weight = self.weights(x, t, rule, own)
            asked.append(float((weight > 0).sum()) / max(1, len(x)))
            return self.combined(x, t, weight)

        found = integrate(velocity, noise, steps, heun=heun)
        return found, math.fsum(asked) / len(asked)


def integrate(velocity: Velocity, noise: Tensor, steps: int, *, heun: bool = False) -> Tensor:
    """Follow a velocity from noise [n, dim] at t = 1 to samples at t = 0, in equal steps.

    >>> integrate(lambda x, t: torch.full_like(x, 2.0), torch.ones(1, 1), steps=4)
    tensor([[-1.]])
    """
    if steps < 1:
        raise UsageError(f"integrate: steps={steps}; need at least 1")
    x, width = noise, 1.0 / steps
    for i in range(steps):
        t = torch.full_like(x[:, 0], 1.0 - i * width)
        slope = velocity(x, t)
        if heun:
            late = torch.full_like(t, max(0.0, 1.0 - (i + 1) * width))
            slope = 0.5 * (slope + velocity(x - width * slope, late))
        x = x - width * slope
    return x
