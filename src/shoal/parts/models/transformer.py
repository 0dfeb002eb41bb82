"""A small decoder-only transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.base.errors import UsageError


@dataclass(frozen=True)
class Transformer:
    """Pre-norm causal language model: whole numbers `[batch, length]` to
    `[batch, length, outputs]`.

    Source: Vaswani et al. 2017 with the pre-norm order of GPT-2 (Radford et al. 2019); rotary
    positions are those of Su et al. 2021, equation 34.

    >>> model = Transformer(width=16, layers=1, heads=2).build((8,), 30)
    >>> model(torch.zeros(3, 8, dtype=torch.int64)).shape
    torch.Size([3, 8, 30])
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    positions: str = "rotary"
    tied: bool = False
    """output layer shares the embedding's table (then gradients fall back to `torch.func`)"""
    expansion: int = 4

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.expansion) < 1:
            raise UsageError("transformer: width, layers, heads, expansion must be at least 1")
        if self.width % (2 * self.heads):
            raise UsageError(
                f"transformer: width={self.width} must be a multiple of 2*heads={2 * self.heads}"
            )
        if self.positions not in ("learned", "rotary"):
            raise UsageError(f"transformer: positions={self.positions!r}; use learned or rotary")

    def build(self, features: tuple[int, ...], outputs: int) -> nn.Module:
        if len(features) != 1:
            raise UsageError(f"transformer: samples of shape {features}; need (length,)")
        return Decoder(self, features[0], outputs)


class Decoder(nn.Module):
    """The module behind `Transformer`."""

    def __init__(self, settings: Transformer, length: int, outputs: int) -> None:
        super().__init__()
        width = settings.width
        self.depth = settings.layers
        self.embedding = nn.Embedding(outputs, width)
        rotary = settings.positions == "rotary"
        self.position = None if rotary else nn.Embedding(length, width)
        half = width // settings.heads // 2
        angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosine", angles.cos() if rotary else None, persistent=False)
        self.register_buffer("sine", angles.sin() if rotary else None, persistent=False)
        self.blocks = nn.ModuleList(
            Block(width, settings.heads, settings.expansion) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs, bias=False)
        if settings.tied:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: 0.02, residual projections scaled by the depth."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * self.depth) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        if self.position is not None:
            h = h + self.position.weight[: x.shape[-1]]
        for block in self.blocks:
            h = block(h, self.cosine, self.sine)
        return self.head(self.norm(h))


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        parts = self.mix(self.before(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if cosine is not None and sine is not None:
            query = _rotate(query, cosine[:length], sine[:length])
            key = _rotate(key, cosine[:length], sine[:length])
        # Written out, so that per-sample gradients and any transformation of torch.func work.
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.down(functional.gelu(self.up(self.between(x))))


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1)
