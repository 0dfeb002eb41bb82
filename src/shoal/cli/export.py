"""`shoal export`: a trained model out of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    report: Annotated[Path, typer.Argument(help="A report: its .json, or a file beside it.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    peer: Annotated[str, typer.Option("--peer", help="A peer's number, or mean.")] = "mean",
    arm: Annotated[str | None, typer.Option("--arm", help="Which arm (default: first).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Which seed (default: first).")] = None,
) -> None:
    """Write a run's final model to a file.

    Named tensors, as safetensors. `mean` is the mean over the peers that did not crash or leave.

    Examples:
      shoal export .shoal/reports/dpsgd.json --out model.safetensors
      shoal export .shoal/reports/dpsgd.json --out peer3.safetensors --peer 3 --arm dpsgd
    """
    from shoal.base.errors import UsageError
    from shoal.lab.export import export
    from shoal.lab.report import Report

    if peer != "mean" and not peer.isdecimal():
        raise UsageError(f"--peer {peer}; need a peer's number or mean")
    loaded = Report.load(report)
    cell = loaded.cell(arm or loaded.arms[0], seed)
    path = export(cell, out, peer if peer == "mean" else int(peer))
    typer.echo(f"{path}: {cell.arm}, seed {cell.seed}, peer {peer}")
