"""Random views of images that gradients go through, the same for all images of a set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor.keyed import uniform
from shoal.tensor.types import Key


@dataclass(frozen=True, eq=False)
class View:
    """One view per row: moving pixels is a product with `matrix` [..., pixels, pixels].

    gain, offset: [...]; kept: [..., pixels], 0 where the view is cut out.
    """

    matrix: Tensor
    gain: Tensor
    offset: Tensor
    kept: Tensor

    def of(self, images: Tensor) -> Tensor:
        """Images [..., n, channels, height, width] as this view has them."""
        gain, offset = (t.view(*t.shape, 1, 1) for t in (self.gain, self.offset))
        moved = _flat(images) @ self.matrix.transpose(-1, -2)
        return ((moved * gain + offset) * self.kept.unsqueeze(-2)).view(images.shape)

    def back(self, slope: Tensor) -> Tensor:
        """The gradient in the images of a function of their views, from that in the views."""
        gain = self.gain.view(*self.gain.shape, 1, 1)
        return ((_flat(slope) * self.kept.unsqueeze(-2) * gain) @ self.matrix).view(slope.shape)


def _flat(images: Tensor) -> Tensor:
    """[..., n * channels, pixels]: one product for all images of a set."""
    return images.flatten(-2).flatten(-3, -2)


@dataclass(frozen=True)
class Augmentation:
    """Colour, crop, scale, rotation and cutout; a view is drawn by key and is linear in the image.

    colour: largest change of contrast (a factor) and of brightness (half of it); shift: of either
    axis, as a share of its length (a crop after padding with 0); scale: largest factor of size;
    rotate_deg: largest angle; cut: side of the square that is cut out, as a share. All 0 and scale
    1: every view is the image itself. No flips: digits have no mirror images.
    Source: Zhao and Bilen 2021 (arXiv 2102.08259).

    >>> images = torch.rand(2, 5, 1, 8, 8)
    >>> plain = Augmentation(colour=0.0, shift=0.0, scale=1.0, rotate_deg=0.0, cut=0.0)
    >>> torch.equal(plain.draw(torch.tensor([1, 2]), images).of(images), images)
    True
    """

    colour: float = 0.3
    shift: float = 0.125
    scale: float = 1.2
    rotate_deg: float = 15.0
    cut: float = 0.25

    def __post_init__(self) -> None:
        shares = (self.colour, self.shift, self.cut)
        if not all(0 <= s < 1 for s in shares) or not self.scale >= 1 or not self.rotate_deg >= 0:
            raise UsageError(
                f"{self}; need colour, shift and cut from 0 to below 1, scale at least 1 and an "
                "angle of at least 0"
            )

    def draw(self, key: Key, like: Tensor) -> View:
        """A view per key [...] for images like `like` [..., channels, height, width]."""
        height, width = like.shape[-2:]

        def between(low: float, high: float, word: int) -> Tensor:
            return low + (high - low) * uniform(key, word)

        angle = between(-self.rotate_deg, self.rotate_deg, 0) * (math.pi / 180)
        grow = between(-math.log(self.scale), math.log(self.scale), 1).exp()
        down = between(-self.shift, self.shift, 2) * height
        right = between(-self.shift, self.shift, 3) * width
        y, x = _grid(height, width, like.device)
        middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
        cosine, sine = (angle.cos() / grow).unsqueeze(-1), (angle.sin() / grow).unsqueeze(-1)
        # Where each pixel of the view comes from; between pixels it is interpolated.
        dy, dx = y - middle_y, x - middle_x
        from_y = cosine * dy - sine * dx + middle_y - down.unsqueeze(-1)
        from_x = sine * dy + cosine * dx + middle_x - right.unsqueeze(-1)
        near_y = (1 - (from_y.unsqueeze(-1) - y).abs()).clamp_min(0)
        near_x = (1 - (from_x.unsqueeze(-1) - x).abs()).clamp_min(0)
        kept = torch.ones_like(from_y)
        if self.cut:
            top = (between(0.0, 1.0, 4) * height).unsqueeze(-1)
            left = (between(0.0, 1.0, 5) * width).unsqueeze(-1)
            tall, wide = self.cut * height / 2, self.cut * width / 2
            inside = ((y + 0.5 - top).abs() < tall) & ((x + 0.5 - left).abs() < wide)
            kept = kept.masked_fill(inside, 0.0)
        dtype = like.dtype
        return View(
            (near_y * near_x).to(dtype),
            between(1 - self.colour, 1 + self.colour, 6).to(dtype),
            between(-self.colour / 2, self.colour / 2, 7).to(dtype),
            kept.to(dtype),
        )


USUAL = Augmentation()
PLAIN = Augmentation(colour=0.0, shift=0.0, scale=1.0, rotate_deg=0.0, cut=0.0)
"""Every view is the image itself."""


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each pixel, float64 [pixels]."""
    place = torch.arange(height * width, device=device)
    return (place // width).to(torch.float64), (place % width).to(torch.float64)
