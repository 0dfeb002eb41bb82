"""The 1,797 handwritten digits of scikit-learn, 8x8 (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from shoal.parts.tasks._images import Images, Table, held_out, table_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Digits(Images):
    """Real digits, 1,437 for training and 360 for testing; see `Images` for the settings.

    >>> task = Digits(peers=4, split="dirichlet", alpha=0.3)
    >>> task.spec.dim, int(task.shard(0).size) > 0
    (4810, True)
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 6}, {"peers": 6, "split": "dirichlet", "alpha": 0.3},
        {"peers": 6, "split": "classes", "model": "cnn"},
        {"peers": 6, "split": "sizes", "label_noise": 0.2},
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.prepare(_table)


@lru_cache(maxsize=4)
def _table(standardise: bool, device: str) -> Table:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8) / 16.0
    train, test = held_out(y, 0.2)
    return table_of(x[train], y[train], x[test], y[test], standardise, device)
