"""Names for tensors by what they hold. All are `torch.Tensor`; the shape is in the docstring."""

from __future__ import annotations

from torch import Tensor

Vector = Tensor
"""Flat parameters or displacements, `[..., dim]`."""

Stack = Tensor
"""Several vectors for one receiver, `[..., k, dim]`."""

Mask = Tensor
"""Booleans, `[..., k]` or `[...]`; False means absent: that row's numbers are arbitrary."""

Weight = Tensor
"""Non-negative weights, `[..., k]`; not normalised unless a docstring says so."""

Scalar = Tensor
"""One number per leading index, `[...]`."""

Key = Tensor
"""A folded random key, int64 `[...]`; see `shoal.tensor.keyed`."""

Index = Tensor
"""Integer positions, int64 `[...]`; -1 is padding where a docstring says so."""
