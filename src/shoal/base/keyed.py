"""Keyed randomness: a draw is a function of its key, not of how many draws came before.

`uniform(seed, "loss", source, target, round)` has the same value in every engine, process and
order of calls. `shoal.tensor.keyed` computes the same integers on tensors; a test compares both.
The mix is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 16), applied per word.

>>> uniform(7, "loss", 3, 4) == uniform(7, "loss", 3, 4)
True
>>> uniform(7, "loss", 3, 4) == uniform(7, "loss", 4, 3)
False
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
UNIT = 2.0**-53

Word = int | str


@lru_cache(maxsize=65536)
def word(text: str) -> int:
    """The 64 bits that stand for a string (BLAKE2b, so that no process salts them)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fold(state: int, *key: Word) -> int:
    """64 mixed bits of `state` and the words of `key`; `fold(fold(s, a), b) == fold(s, a, b)`."""
    for part in key:
        bits = part if type(part) is int else word(part) if isinstance(part, str) else int(part)
        z = ((state ^ bits) + GOLDEN) & MASK
        z = ((z ^ (z >> 30)) * MIX_1) & MASK
        z = ((z ^ (z >> 27)) * MIX_2) & MASK
        state = z ^ (z >> 31)
    return state & MASK


def mix(state: int, bits: int) -> int:
    """`fold(state, bits)` of one integer, for a draw with every message.

    >>> mix(7, 9) == fold(7, 9)
    True
    """
    z = ((state ^ bits) + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * MIX_1) & MASK
    z = ((z ^ (z >> 27)) * MIX_2) & MASK
    return z ^ (z >> 31)


def uniform(seed: int, *key: Word) -> float:
    """One draw from [0, 1), 53 bits."""
    return (fold(0, seed, *key) >> 11) * UNIT


def unit(state: int) -> float:
    """The draw from [0, 1) that belongs to an already folded state."""
    return (state >> 11) * UNIT


def normal(seed: int, *key: Word) -> float:
    """One standard normal draw (Box and Muller 1958)."""
    state = fold(0, seed, *key)
    radius = math.sqrt(-2.0 * math.log1p(-unit(fold(state, 1))))
    return radius * math.cos(2.0 * math.pi * unit(fold(state, 2)))


def signed(state: int) -> int:
    """The same 64 bits as a signed integer, the form in which tensors carry a key."""
    return state - (1 << 64) if state >> 63 else state
