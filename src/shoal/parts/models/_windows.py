"""Patches and pooling windows of images that lie `[rows, channels, height, width, batch]`.

With the batch innermost the patches of a convolution are one strided copy whose runs are whole
lines, and an image is what torch calls channels-last with the batch in the place of channels:
its pooling kernels then work on whole batches at a time.
"""

from __future__ import annotations

from torch import Tensor

Pair = tuple[int, int]


def patches(image: Tensor, kernel: Pair, stride: Pair, dilation: Pair, out: Pair) -> Tensor:
    """View `[rows, channels, kh, kw, oh, ow, batch]` of the patches at the `out` positions."""
    row, channel, down, right, _ = image.stride()
    return image.as_strided(
        (image.shape[0], image.shape[1], *kernel, *out, image.shape[-1]),
        (
            row,
            channel,
            dilation[0] * down,
            dilation[1] * right,
            stride[0] * down,
            stride[1] * right,
            1,
        ),
        image.storage_offset(),
    )


def taps(
    image: Tensor, kernel: Pair, stride: Pair, dilation: Pair, out: Pair
) -> list[list[Tensor]]:
    """For each place in the kernel the view `[rows, channels, oh, ow, batch]` that it meets."""
    view = patches(image, kernel, stride, dilation, out)
    return [[view[:, :, i, j] for j in range(kernel[1])] for i in range(kernel[0])]


def channels_last(x: Tensor) -> Tensor:
    """A contiguous image as torch's pooling sees it: `[rows * channels, batch, height, width]`."""
    rows, channels, height, width, batch = x.shape
    return x.view(rows * channels, height, width, batch).permute(0, 3, 1, 2)
