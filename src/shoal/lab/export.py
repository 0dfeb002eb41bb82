"""A trained model out of a run: named tensors, as one safetensors file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.base.errors import UsageError
from shoal.lab.report_data import CellResult

if TYPE_CHECKING:
    from torch import Tensor


def load_model(cell: CellResult, peer: int | str = "mean") -> dict[str, Tensor]:
    """Named tensors of one peer's final model, or of the mean over the peers that stayed."""
    from safetensors import safe_open

    if not cell.params_file or not Path(cell.params_file).exists():
        raise UsageError(
            f"report: no parameters are stored for arm {cell.arm}, seed {cell.seed}"
            + (f" (looked in {cell.params_file})" if cell.params_file else "")
            + " (run it again with a store, from the folder that it ran in)"
        )
    with safe_open(cell.params_file, framework="pt") as file:
        metadata = file.metadata()
        if peer == "mean":
            flat = file.get_tensor("mean")
        else:
            peers = file.get_tensor("peers").tolist()
            if peer not in peers:
                raise UsageError(
                    f"report: peer {peer} left no parameters; these did: {_ranges(peers)} "
                    "(choose one, or 'mean')"
                )
            if "params" not in file.keys():  # noqa: SIM118 - a file of safetensors is no mapping
                raise UsageError(
                    "report: the run was too large to keep every peer's parameters (use 'mean')"
                )
            flat = file.get_slice("params")[peers.index(peer)]
    names, shapes = json.loads(metadata["names"]), json.loads(metadata["shapes"])
    if not names:
        return {"params": flat.clone()}
    out, start = {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = math.prod(shape)
        out[name] = flat[start : start + size].reshape(shape).clone()
        start += size
    return out


def export(cell: CellResult, out: str | Path, peer: int | str = "mean") -> Path:
    """Write `load_model` as a safetensors file; the metadata say which run it came from."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = load_model(cell, peer)
    metadata = {
        "format": "pt", "arm": cell.arm, "seed": str(cell.seed), "peer": str(peer),
        "state_digest": cell.state_digest,
    }  # fmt: skip
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be written: {error} (name another file)") from None
    return path


def _ranges(peers: list[int]) -> str:
    """`0-9, 12` for the peers 0 to 9 and 12."""
    parts: list[list[int]] = []
    for peer in sorted(peers):
        if parts and peer == parts[-1][1] + 1:
            parts[-1][1] = peer
        else:
            parts.append([peer, peer])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts) or "none"
