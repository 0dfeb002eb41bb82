"""Patches and pooling windows of images that lie `[rows, channels, height, width, batch]`.

With the batch innermost every patch and every window is a strided view whose runs are whole
batches, so patches are one copy, convolutions are plain matrix products, and pooling is
arithmetic between planes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[int, int]


def patches(
    x: Tensor, kernel: Pair, stride: Pair, dilation: Pair, out: Pair, window: Pair
) -> Tensor:
    """View `[rows, channels, kh, kw, wh, ww, oh, ow, batch]` of a contiguous padded image.

    The output positions are `(wh * oh, ww * ow)`, listed by their place in a pooling window of
    `window` positions: `window=(1, 1)` lists them in image order.
    """
    rows, channels, height, width, batch = x.shape
    row, channel = channels * height * width * batch, height * width * batch
    down, right = width * batch, batch
    return x.as_strided(
        (rows, channels, *kernel, *window, *out, batch),
        (
            row,
            channel,
            dilation[0] * down,
            dilation[1] * right,
            stride[0] * down,
            stride[1] * right,
            stride[0] * window[0] * down,
            stride[1] * window[1] * right,
            1,
        ),
    )


def pad(x: Tensor, padding: Pair) -> Tensor:
    """Zeros around height and width of `[rows, channels, height, width, batch]`."""
    if padding == (0, 0):
        return x.contiguous()
    down, right = padding
    return functional.pad(x, (0, 0, right, right, down, down))


def scatter_patches(
    weight: Tensor,
    gradient: Tensor,
    shape: tuple[int, int, int],
    stride: Pair,
    dilation: Pair,
) -> Tensor:
    """The gradient of a padded image from that of a convolution's output.

    weight: [rows, out, channels, kh, kw]; gradient: [rows, out, oh, ow, batch];
    shape: (channels, height, width) of the padded image.
    """
    rows, out, oh, ow, batch = gradient.shape
    channels, height, width = shape
    kh, kw = weight.shape[-2:]
    result = gradient.new_zeros((rows, channels, height, width, batch))
    flat = gradient.reshape(rows, out, oh * ow * batch)
    # One kernel row at a time keeps the product small enough to be still in the cache when it is
    # added; the whole [channels * kh * kw, positions] product would go through main memory.
    for i in range(kh):
        taps = weight[:, :, :, i].reshape(rows, out, channels * kw).transpose(1, 2)
        part = torch.bmm(taps, flat).view(rows, channels, kw, oh, ow, batch)
        top = i * dilation[0]
        lines = result[:, :, top : top + stride[0] * (oh - 1) + 1 : stride[0]]
        for j in range(kw):
            left = j * dilation[1]
            lines[:, :, :, left : left + stride[1] * (ow - 1) + 1 : stride[1]].add_(part[:, :, j])
    return result


def windows(x: Tensor, window: Pair) -> Tensor:
    """View `[rows, channels, wh, ww, oh, ow, batch]` of a contiguous image; odd ends are cut."""
    return patches(
        x, (1, 1), (1, 1), (1, 1), (x.shape[2] // window[0], x.shape[3] // window[1]), window
    )[:, :, 0, 0]


def window_max_backward(x: Tensor, top: Tensor, gradient: Tensor, out: Tensor) -> None:
    """Send each window's gradient to its first largest place, as `max_pool2d` does.

    x, out: [rows, channels, wh, ww, oh, ow, batch] (may be the same memory); top: the maxima
    [rows, channels, oh, ow, batch]; gradient: like top.
    """
    last = x.shape[2] * x.shape[3] - 1
    below = torch.empty_like(top)
    for place in range(last):
        i, j = divmod(place, x.shape[3])
        # `threshold_backward` keeps a gradient where its second argument is above zero: here,
        # where this place lies below the maximum. It is far faster than a boolean mask.
        torch.sub(top, x[:, :, i, j], out=below)
        rest = torch.ops.aten.threshold_backward(gradient, below, 0)
        torch.sub(gradient, rest, out=out[:, :, i, j])
        gradient = rest
    out[:, :, -1, -1].copy_(gradient)
