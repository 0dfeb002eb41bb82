"""`shoal.base.keyed` on tensors: keys are int64 tensors `[...]`, draws broadcast over them.

>>> import torch
>>> from shoal.base import keyed
>>> key = key_of(7, "loss")
>>> draw = uniform(key, torch.arange(3))
>>> draw[2].item() == keyed.uniform(7, "loss", 2)
True
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.base import keyed
from shoal.tensor.types import Key

_GOLDEN = keyed.signed(keyed.GOLDEN)
_MIX_1 = keyed.signed(keyed.MIX_1)
_MIX_2 = keyed.signed(keyed.MIX_2)


def key_of(seed: int, *words: keyed.Word, device: torch.device | str = "cpu") -> Key:
    """A scalar key, int64 []."""
    return torch.tensor(keyed.signed(keyed.fold(0, seed, *words)), dtype=torch.int64, device=device)


def _mix(z: Tensor) -> Tensor:
    # int64 multiplication wraps as unsigned does; only the right shift must drop the sign bits.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def fold(key: Key, *words: keyed.Word | Tensor) -> Key:
    """Mix more words into keys `[...]`; a word may be an int64 tensor that broadcasts."""
    for part in words:
        bits = (
            part
            if isinstance(part, Tensor)
            else keyed.signed(keyed.word(part) if isinstance(part, str) else int(part) & keyed.MASK)
        )
        key = _mix((key ^ bits) + _GOLDEN)
    return key


def uniform(key: Key, *words: keyed.Word | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws from [0, 1), shape of the broadcast key; float64 equals `base.keyed` bit for bit."""
    bits = fold(key, *words)
    return (((bits >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) * keyed.UNIT).to(dtype)


def normal(key: Key, *words: keyed.Word | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws, shape of the broadcast key (Box and Muller 1958)."""
    state = fold(key, *words)
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(state, 1)))
    return (radius * torch.cos(2.0 * math.pi * uniform(state, 2))).to(dtype)


def grid(key: Key, count: int) -> Key:
    """`count` keys per key: int64 [..., count]."""
    return fold(key.unsqueeze(-1), torch.arange(count, device=key.device))
