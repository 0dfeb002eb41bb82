"""The place where the package draws its permutations."""

from __future__ import annotations

import torch


def permutation(vectors: torch.Tensor) -> torch.Tensor:
    return vectors[torch.randperm(len(vectors))]
