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

import numpy as np
import torch
from torch import Tensor

from shoal.base import keyed
from shoal.tensor.types import Key

_GOLDEN = keyed.signed(keyed.GOLDEN)
_MIX_1 = keyed.signed(keyed.MIX_1)
_MIX_2 = keyed.signed(keyed.MIX_2)
_NP_GOLDEN, _NP_MIX_1, _NP_MIX_2 = map(np.uint64, (keyed.GOLDEN, keyed.MIX_1, keyed.MIX_2))
_ELEVEN, _TWENTY_SEVEN, _THIRTY, _THIRTY_ONE = map(np.uint64, (11, 27, 30, 31))


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
    if _on_processor(key, words):
        numbers = [part for part in words if not isinstance(part, Tensor)]
        if not key.dim() and len(numbers) == len(words):
            folded = keyed.fold(int(key) & keyed.MASK, *numbers)
            return torch.tensor(keyed.signed(folded), dtype=torch.int64, device="cpu")
        state, shape = _fold(key, words)
        return torch.from_numpy(state.view(np.int64)).view(shape)
    for part in words:
        bits = part if isinstance(part, Tensor) else keyed.signed(_bits(part))
        key = _mix((key ^ bits) + _GOLDEN)
    return key


def uniform(key: Key, *words: keyed.Word | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws from [0, 1), shape of the broadcast key; float64 equals `base.keyed` bit for bit."""
    if _on_processor(key, words):
        state, shape = _fold(key, words)
        return torch.from_numpy((state >> _ELEVEN) * keyed.UNIT).to(dtype).view(shape)
    bits = fold(key, *words)
    return (((bits >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) * keyed.UNIT).to(dtype)


def _bits(part: keyed.Word) -> int:
    return keyed.word(part) if isinstance(part, str) else int(part) & keyed.MASK


def _on_processor(key: Tensor, words: tuple[keyed.Word | Tensor, ...]) -> bool:
    """Whether these are plain tensors of the processor, which numpy can read where they lie."""
    if type(key) is not Tensor or key.device.type != "cpu":
        return False
    return all(type(w) is Tensor and w.device.type == "cpu" for w in words if isinstance(w, Tensor))


def _fold(
    key: Tensor, words: tuple[keyed.Word | Tensor, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The folded keys, uint64 of at least one axis, and the shape that they should have."""
    # Keys come by the hundred, where a call of torch costs thrice as much as one of numpy, and
    # torch has no right shift without the sign.
    state, shape = key.numpy().view(np.uint64), tuple(key.shape)
    # Arrays wrap in silence, numpy's numbers warn.
    state = state if shape else state.reshape(1)
    for part in words:
        if isinstance(part, Tensor):
            z = state ^ part.numpy().view(np.uint64)
            shape = np.broadcast_shapes(shape, tuple(part.shape))
        else:
            z = state ^ np.uint64(_bits(part))
        z += _NP_GOLDEN
        z ^= z >> _THIRTY
        z *= _NP_MIX_1
        z ^= z >> _TWENTY_SEVEN
        z *= _NP_MIX_2
        z ^= z >> _THIRTY_ONE
        state = z
    return state, shape


def normal(key: Key, *words: keyed.Word | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws, shape of the broadcast key (Box and Muller 1958)."""
    state = fold(key, *words)
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(state, 1)))
    return (radius * torch.cos(2.0 * math.pi * uniform(state, 2))).to(dtype)


def grid(key: Key, count: int) -> Key:
    """`count` keys per key: int64 [..., count]."""
    return fold(key.unsqueeze(-1), torch.arange(count, device=key.device))
