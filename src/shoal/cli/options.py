"""Options that several commands share, and how they become an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def system_names() -> list[str]:
    """For shell completion; reads source text only."""
    from shoal.lab.discover import names

    return list(names())


def families() -> list[str]:
    """For shell completion."""
    from shoal.lab.discover import cards

    return sorted({card.family for card in cards()})


Json = Annotated[bool, typer.Option("--json", help="JSON Lines: one object a line, no bars.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing about progress.")]
Seed = Annotated[int | None, typer.Option("--seed", help="First seed.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="How many seeds.")]
Peers = Annotated[int | None, typer.Option("--peers", min=1, help="How many peers.")]
Engine = Annotated[
    str | None,
    typer.Option("--engine", help="auto, event, lockstep, live or processes.", metavar="ENGINE"),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Torch device, such as cpu or cuda:0 (default auto: a GPU if there is one).",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE",
        help="Change a setting of the scenario (task.alpha=0.1) or of the systems (lr=0.05); "
        "ARM.KEY=VALUE for one arm. May be repeated.",
    ),
]  # fmt: skip
Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid", metavar="KEY=A,B", help="Try every value; several --grid give all combinations."
    ),
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Worker processes.")]
AllCores = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Worker processes (default: all cores).")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Run again what is stored, from its start.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the report (default .shoal/reports).")
]


def overrides(
    settings: list[str] | None, peers: int | None, device: str | None
) -> Mapping[str, Any]:
    """--set, --peers and --device as one mapping; texts stay texts until their type is known."""
    from shoal.lab.scenario import parse_settings

    out: dict[str, Any] = dict(parse_settings(settings or []))
    if peers is not None:
        out["peers"] = peers
    if device is not None:
        out["engine.device"] = device
    return out


def grid(pairs: list[str] | None) -> Mapping[str, tuple[str, ...]]:
    """`--grid lr=0.1,0.2` as {"lr": ("0.1", "0.2")}."""
    from shoal.base.errors import UsageError
    from shoal.lab.scenario import parse_settings

    out = {}
    for key, text in parse_settings(pairs or [], "--grid", "lr=0.01,0.1").items():
        values = tuple(value.strip() for value in text.split(",") if value.strip())
        if not values or len(set(values)) != len(values):
            raise UsageError(f"--grid {key}={text}; need different values, separated by commas")
        out[key] = values
    return out


def engine_name(engine: str | None) -> str:
    """The engine, checked."""
    from shoal.base.errors import UsageError
    from shoal.lab.values import near

    known = ("auto", "event", "lockstep", "live", "processes")
    if engine is not None and engine not in known:
        raise UsageError(f"--engine {engine}; {near(engine, known)}")
    return engine or "auto"
