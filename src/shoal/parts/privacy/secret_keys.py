"""Keys for noise and draws: by the run's seed, or secret.

Whoever knows a seed knows every draw that follows from it, and takes the noise out again. A run
that can be repeated measures what noise costs; it protects nobody. Where records are to be
protected, each draw needs a key that nobody can work out: with secrets = "system" every one of them
has 64 bits of its own from the operating system, and no run is like another.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch

from shoal.base.errors import UsageError
from shoal.tensor.keyed import grid
from shoal.tensor.types import Key

Secrets = Literal["run", "system"]
"""Where keys come from: the run's seed, or the operating system."""


def draw_keys(key: Key, count: int, secrets: Secrets = "run") -> Key:
    """`count` keys per key, int64 [..., count]: made from it, or secret ones.

    >>> from shoal.tensor.keyed import key_of
    >>> draw_keys(key_of(1), 2).equal(draw_keys(key_of(1), 2))
    True
    >>> draw_keys(key_of(1), 2, "system").equal(draw_keys(key_of(1), 2, "system"))
    False
    """
    if secrets == "run":
        return grid(key, count)
    octets = bytearray(os.urandom(8 * key.numel() * count))
    secret = torch.frombuffer(octets, dtype=torch.int64) if octets else key.new_empty(0).cpu()
    return secret.view(*key.shape, count).to(key.device)


def check_secrets(who: str, secrets: str) -> None:
    """UsageError for other words."""
    if secrets not in get_args(Secrets):
        raise UsageError(
            f"{who}: secrets={secrets!r}; need 'run' (draws follow from the seed, and hide nothing "
            "from those who know it) or 'system' (no run is like another)"
        )
