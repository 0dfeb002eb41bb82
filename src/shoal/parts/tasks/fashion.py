"""Fashion-MNIST, 28x28 (Xiao, Rasul and Vollgraf 2017), from Debian's package."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shoal.base.errors import UsageError
from shoal.parts.tasks._images import Images, Table, table_of

FOLDER = "/usr/share/datasets/fashion-mnist"


@dataclass(frozen=True, eq=False, kw_only=True)
class Fashion(Images):
    """Real images of clothes, 60,000 for training and 10,000 for testing.

    folder: where the four IDX files are. See `Images` for the other settings.
    """

    folder: str = FOLDER
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"peers": 4, "hidden": (16,)},)

    def __post_init__(self) -> None:
        self.prepare(lambda standardise, device: _table(self.folder, standardise, device))


@lru_cache(maxsize=2)
def _table(folder: str, standardise: bool, device: str) -> Table:
    read = [
        _idx(Path(folder) / f"{part}-{what}.gz", offset)
        for part in ("train", "t10k")
        for what, offset in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
    ]
    x, y, test_x, test_y = read
    x, test_x = (part.reshape(-1, 28, 28) / np.float32(255) for part in (x, test_x))
    return table_of(x, y, test_x, test_y, standardise, device)


def _idx(path: Path, offset: int) -> np.ndarray:
    if not path.exists():
        raise UsageError(
            f"task fashion: no file {path} (apt-get install dataset-fashion-mnist, set "
            "task.folder, or take task = 'mnist', which comes from a Python package)"
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
