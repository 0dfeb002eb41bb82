"""Letters A to Z as 8x8 grey images, drawn from the fonts that come with matplotlib.

A public task that is like digits and has none of them: what a network learns here may be frozen and
used there. Nothing is downloaded, and the same library draws the same pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CELL = 32
"""Pixels along a side before the images are made smaller."""
_FILL = 0.9
"""What part of a side the longer side of a letter takes."""


@lru_cache(maxsize=2)
def letters(copies: int = 16) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] in [0, 1] and labels 0 to 25; `copies` of each letter of each face.

    Each copy is turned by up to 15 degrees, sheared, scaled by 0.8 to 1.1 and moved by up to half a
    pixel of the small image, and has noise of deviation 0.05.
    """
    faces = torch.from_numpy(glyphs())
    count = faces.shape[0] * len(LETTERS)
    cells = faces.reshape(count, 1, _CELL, _CELL).repeat(copies, 1, 1, 1)
    labels = torch.arange(len(LETTERS), device="cpu").repeat(copies * faces.shape[0])
    rng = np.random.default_rng(0)
    n = len(cells)
    angle = rng.uniform(-1.0, 1.0, n) * math.radians(15.0)
    zoom, shear = 1.0 / rng.uniform(0.8, 1.1, n), rng.uniform(-0.2, 0.2, n)
    move = rng.uniform(-1.0, 1.0, (n, 2)) / 8.0
    rows = [
        [zoom * np.cos(angle), zoom * (shear * np.cos(angle) - np.sin(angle)), move[:, 0]],
        [zoom * np.sin(angle), zoom * (shear * np.sin(angle) + np.cos(angle)), move[:, 1]],
    ]
    matrix = torch.from_numpy(np.moveaxis(np.array(rows), -1, 0).astype(np.float32))
    grid = affine_grid(matrix, list(cells.shape), align_corners=False)
    small = avg_pool2d(grid_sample(cells, grid, align_corners=False), _CELL // 8)
    noise = torch.from_numpy(rng.normal(0.0, 0.05, tuple(small.shape)).astype(np.float32))
    return (small + noise).clamp(0.0, 1.0), labels


def glyphs() -> np.ndarray:
    """Every letter in every face of DejaVu: float32 [faces, 26, 32, 32], ink = 1."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(f for f in folder.glob("DejaVu*.ttf") if "Display" not in f.name)
    width, height = len(LETTERS) * _CELL, len(files) * _CELL
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for row, file in enumerate(files):
        font = FontProperties(fname=str(file))
        for column, letter in enumerate(LETTERS):
            path = TextPath((0, 0), letter, size=100, prop=font)
            box = path.get_extents()
            scale = _FILL * _CELL / max(box.width, box.height)
            middle = ((column + 0.5) * _CELL, height - (row + 0.5) * _CELL)
            place = (
                Affine2D()
                .translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
                .scale(scale)
                .translate(*middle)
            )
            figure.add_artist(
                PathPatch(path, transform=place, facecolor="black", linewidth=0, antialiased=True)
            )
    canvas.draw()
    grey = 1.0 - np.asarray(canvas.buffer_rgba())[..., 0].astype(np.float32) / 255.0
    return grey.reshape(len(files), _CELL, len(LETTERS), _CELL).transpose(0, 2, 1, 3).copy()
