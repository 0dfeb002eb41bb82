"""The nearest direction along which nobody's loss rises: CGA's quadratic programme."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from shoal.tensor.types import Mask, Stack, Vector


def projected(own: Vector, cross: Stack, mask: Mask) -> tuple[Vector, Tensor]:
    """The vector nearest to `own` [..., dim] whose inner product with each row of `cross`
    [..., k, dim] that mask [..., k] has is at least 0; and the smallest cosine, float64 [...].

    The programme's dual has one multiplier >= 0 a row: least squares of `own` plus a combination of
    the rows, which an active-set method solves in k dimensions, whatever dim is (Lawson and Hanson
    1974, chapter 23). Rows that are not finite or 0 are no constraint. The cosine is that between
    the result and the row that it gets along with worst: 0 up to rounding where one binds, 1
    without constraints or where nothing is left.

    >>> own, rows = torch.tensor([1.0, 1.0]), torch.tensor([[0.0, -1.0]])
    >>> projected(own, rows, torch.tensor([True]))[0]
    tensor([1., 0.])
    """
    lead, (k, dim) = own.shape[:-1], cross.shape[-2:]
    count = math.prod(lead)
    here = own.detach().to("cpu", torch.float64).reshape(count, dim).numpy()
    rows = cross.detach().to("cpu", torch.float64).reshape(count, k, dim).numpy()
    heard = mask.cpu().reshape(count, k).numpy()
    found = np.empty_like(here)
    cosines = np.ones(len(here))
    for place in range(len(here)):
        found[place], cosines[place] = _one(here[place], rows[place][heard[place]])
    vector = torch.from_numpy(found).reshape(own.shape).to(own)
    return vector, torch.from_numpy(cosines).reshape(lead).to(own.device)


def _one(
    own: np.ndarray[tuple[int], np.dtype[np.float64]],
    rows: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], float]:
    size = np.linalg.norm(rows, axis=-1)
    sound = np.isfinite(size) & (size > 0.0)
    whole = float(np.linalg.norm(own))
    if not sound.any() or not 0.0 < whole < np.inf:
        return own, 1.0
    # Of length 1, so that a steep function's tolerance is not a flat one's violation.
    units = rows[sound] / size[sound, None]
    basis, triangle = np.linalg.qr(units.T)
    multipliers, _ = nnls(triangle, -(basis.T @ own))
    vector = own + multipliers @ units
    left = float(np.linalg.norm(vector))
    # What rounding leaves of a vector of which nothing is left has no direction.
    if left <= 1e-12 * whole:
        return np.zeros_like(own), 1.0
    return vector, float((units @ vector).min() / left)
