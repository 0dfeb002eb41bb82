"""Convolutional networks for small images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shoal.base.errors import UsageError


@dataclass(frozen=True)
class CNN:
    """Convolutions with ReLU and 2x2 max pooling after each, one hidden layer, one output layer.

    The default on 28x28 is conv 1-8, pool, conv 8-16, pool, 400-64-10. Images under 16 pixels
    get a padding of 1, so that something is left to pool; `padding` overrides that.

    >>> sum(p.numel() for p in CNN().build((1, 28, 28), 10).parameters())
    27562
    >>> sum(p.numel() for p in CNN().build((1, 8, 8), 10).parameters())
    6058
    """

    channels: tuple[int, ...] = (8, 16)
    hidden: int = 64
    kernel: int = 3
    padding: int | None = None
    group_norm: int = 0
    """groups of a GroupNorm after each convolution; 0 = none"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or min(*self.channels, self.hidden, self.kernel) < 1:
            raise UsageError(
                f"cnn: channels={self.channels}, hidden={self.hidden}, kernel={self.kernel}; "
                "each must be at least 1 (give one width per convolution)"
            )
        if self.group_norm and any(width % self.group_norm for width in self.channels):
            raise UsageError(
                f"cnn: group_norm={self.group_norm} must divide all of channels={self.channels}"
            )

    def build(self, features: tuple[int, ...], outputs: int) -> nn.Module:
        if len(features) != 3:
            raise UsageError(f"cnn: samples of shape {features}; need (channels, height, width)")
        width, *size = features
        padding = self.padding if self.padding is not None else int(min(size) < 16)
        layers: list[nn.Module] = []
        for channels in self.channels:
            layers.append(nn.Conv2d(width, channels, self.kernel, padding=padding))
            if self.group_norm:
                layers.append(nn.GroupNorm(self.group_norm, channels))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            size = [(side + 2 * padding - self.kernel + 1) // 2 for side in size]
            if min(size) < 1:
                raise UsageError(
                    f"cnn: {len(self.channels)} convolutions leave nothing of {features[1:]} "
                    "(use fewer, or padding=1)"
                )
            width = channels
        flat = width * size[0] * size[1]
        layers += [nn.Flatten(), nn.Linear(flat, self.hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.hidden, outputs))
