"""The 1,797 handwritten digits of scikit-learn, 8x8 (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

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
    # The file alone: `sklearn.datasets` takes longer to import than all else that a peer needs.
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    whole = np.loadtxt(file, delimiter=",")
    x, y = whole[:, :-1].reshape(-1, 8, 8) / 16.0, whole[:, -1].astype(np.int64)
    train, test = held_out(y, 0.2)
    return table_of(x[train], y[train], x[test], y[test], standardise, device)
