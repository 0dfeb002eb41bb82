"""Patches and pooling windows of images that lie `[rows, channels, height, width, batch]`.

With the batch innermost every patch and every window is a strided view whose runs are whole
batches, so patches are one copy, convolutions are plain matrix products, and pooling is
arithmetic between planes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from shoal.parts.models._scratch import Scratch

Pair = tuple[int, int]

# Keeps a gradient where its second argument is above zero; far faster than a boolean mask.
where_positive = torch.ops.aten.threshold_backward.grad_input


def patches(
    x: Tensor, kernel: Pair, stride: Pair, dilation: Pair, out: Pair, window: Pair
) -> Tensor:
    """View `[rows, channels, kh, kw, wh, ww, oh, ow, batch]` of a contiguous padded image.

    The output positions are `(wh * oh, ww * ow)`, listed by their place in a pooling window of
    `window` positions: `window=(1, 1)` lists them in image order.
    """
    rows, channels, height, width, batch = x.shape
    down, right = width * batch, batch
    steps = (stride[0] * down, stride[1] * right)
    return x.as_strided(
        (rows, channels, *kernel, *window, *out, batch),
        (
            channels * height * down,
            height * down,
            dilation[0] * down,
            dilation[1] * right,
            *steps,
            steps[0] * window[0],
            steps[1] * window[1],
            1,
        ),
        x.storage_offset(),
    )


def windows(x: Tensor, window: Pair) -> Tensor:
    """View `[rows, channels, wh, ww, oh, ow, batch]` of a contiguous image; odd ends are cut."""
    out = (x.shape[2] // window[0], x.shape[3] // window[1])
    return patches(x, (1, 1), (1, 1), (1, 1), out, window)[:, :, 0, 0]


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
    memory: Scratch,
) -> Tensor:
    """The gradient of a padded image from that of a convolution's output.

    weight: [rows, out, channels, kh, kw]; gradient: [rows, out, oh, ow, batch], contiguous;
    shape: (channels, height, width) of the padded image.
    """
    rows, out, oh, ow, batch = gradient.shape
    channels, height, width = shape
    kh, kw = weight.shape[-2:]
    result = memory.empty((rows, channels, height, width, batch), gradient).zero_()
    flat = gradient.view(rows, out, oh * ow * batch)
    with memory.borrowed():
        part = memory.empty((rows, channels * kw, oh * ow * batch), gradient)
        # One kernel row at a time keeps the product small enough to be still in the cache when
        # it is added; the product with all rows would go through main memory.
        for i in range(kh):
            taps = weight[:, :, :, i].reshape(rows, out, channels * kw).transpose(1, 2)
            torch.bmm(taps, flat, out=part)
            columns = part.view(rows, channels, kw, oh, ow, batch)
            top = i * dilation[0]
            lines = result[:, :, top : top + stride[0] * (oh - 1) + 1 : stride[0]]
            for j in range(kw):
                left = j * dilation[1]
                place = slice(left, left + stride[1] * (ow - 1) + 1, stride[1])
                lines[:, :, :, place].add_(columns[:, :, j])
    return result


def window_max(x: Tensor, memory: Scratch) -> Tensor:
    """Maxima [rows, channels, oh, ow, batch] of windows [rows, channels, wh, ww, oh, ow, batch]."""
    top = memory.empty((*x.shape[:2], *x.shape[4:]), x)
    if x.is_contiguous():
        planes = x.view(*x.shape[:2], x.shape[2] * x.shape[3], -1)
        torch.amax(planes, 2, out=top.view(*x.shape[:2], -1))
        return top
    first, *rest = [x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])]
    top.copy_(first)
    for plane in rest:
        torch.maximum(top, plane, out=top)
    return top


def window_max_backward(
    x: Tensor, top: Tensor, gradient: Tensor, out: Tensor, memory: Scratch
) -> None:
    """Send each window's gradient to its first largest place, as `max_pool2d` does.

    x, out: windows as for `window_max` (may be the same memory); top, gradient: the maxima and
    their gradient; the gradient is overwritten.
    """
    count = x.shape[2] * x.shape[3]
    with memory.borrowed():
        below, rest = memory.empty(top.shape, top), memory.empty(top.shape, top)
        for place in range(count - 1):
            i, j = divmod(place, x.shape[3])
            # Above zero where this place lies below the maximum; there the gradient moves on.
            torch.sub(top, x[:, :, i, j], out=below)
            where_positive(gradient, below, 0, grad_input=rest)
            torch.sub(gradient, rest, out=out[:, :, i, j])
            gradient, rest = rest, gradient
        out[:, :, -1, -1].copy_(gradient)
