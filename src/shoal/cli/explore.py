"""`shoal explore`: look for fault lists that break a system."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.options import Json, Peers, Quiet, Settings, overrides, system_names

if TYPE_CHECKING:
    from shoal.cli.progress import Tell
    from shoal.lab.explore import Exploration

MANY = 100
"""From so many fault lists on, all cores share them: a process takes as long to start as about 40
lists take to run."""


def command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A system.", autocompletion=system_names)
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many fault lists.")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, help="First seed.")] = 0,
    peers: Peers = None,
    settings: Settings = None,
    again: Annotated[
        Path | None,
        typer.Option("--replay", metavar="FILE", help="Run the failures in this file again."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Worker processes (default: all cores from 100 "
                     "fault lists on, else 1)."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Look for fault lists that break a system.

    The system runs in the event engine, in its own scenario with about 10 peers and 8 rounds, once
    for every generated list of crashes, partitions, losses and other faults. A run fails when it
    hangs, when an exception comes out of it, and when an invariant is broken: messages are
    conserved, numbers are finite, and whatever the module of the system names in INVARIANTS.
    Failing lists are shrunk and stored for --replay. What is found does not depend on --jobs.

    Exit code 0: nothing found; 1: a failure; 2: misuse.

    Examples:
      shoal explore modest --seeds 300
      shoal explore modest --seeds 1000 --jobs 4
      shoal explore dpsgd --peers 12 --set rounds=20
      shoal explore gossip --seeds 50 --json
      shoal explore modest --replay .shoal/explore/modest.json
    """
    from shoal.cli.progress import progress
    from shoal.lab.fuzz import target

    given = dict(overrides(settings, peers, None))
    if again is not None:
        raise typer.Exit(_replay(name, again, given, json))
    aim = target(name, given)
    cores = (os.cpu_count() or 1) if seeds >= MANY else 1
    with progress("fault lists", quiet=quiet, json=json) as tell:
        found = aim.explore(seeds, seed, _tick(tell, seeds), jobs=jobs or cores)
    path = _save(name, given, found) if found.failures else None
    (_show_json if json else _show)(name, found, path)
    raise typer.Exit(1 if found.failures else 0)


def _tick(tell: Tell | None, seeds: int) -> Callable[[int, int], None] | None:
    if tell is None:
        return None
    return lambda done, bad: tell(done, seeds, f"{bad} failures" if bad else "")


def _save(name: str, given: dict[str, Any], found: Exploration) -> Path:
    import json

    from shoal.lab.store import default_folder

    path = default_folder() / "explore" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"system": name, "overrides": given, **json.loads(found.to_json())}
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
    return path


def _replay(name: str, path: Path, given: dict[str, Any], as_json: bool) -> int:
    import json

    from shoal.base.errors import UsageError
    from shoal.cli.console import json_line, say
    from shoal.lab.fuzz import target

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        system, failures, kept = data["system"], data["failures"], data["overrides"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--replay {path}: {type(error).__name__}: {error}; need a file that `shoal explore` "
            "wrote (run it without --replay first)"
        ) from None
    if system != name:
        raise UsageError(f"--replay {path}: it holds failures of {system!r}, not of {name!r}")
    aim = target(name, {**kept, **given})
    left = 0
    for failure in failures:
        problem = aim.replay(failure)
        left += problem is not None
        if as_json:
            json_line({"seed": failure["seed"], "problem": problem and problem.text})
        else:
            say(f"seed {failure['seed']}: {problem.text if problem else 'gone'}")
    return 1 if left else 0


def _show(name: str, found: Exploration, path: Path | None) -> None:
    import json

    from shoal.cli.console import say, table

    table(["fault", "tried"], [[kind, str(found.kinds[kind])] for kind in sorted(found.kinds)])
    say(f"\n{found.seeds} fault lists, {found.traces} different traces")
    for error, count in sorted(found.ended.items()):
        say(f"{count} runs ended with {error}, as programs may under faults")
    for failure in found.failures:
        say(f"\nseed {failure.seed}: {failure.problem.kind}: {failure.problem.text}", "bold", "red")
        for fault in failure.to_data()["faults"]:
            say(f"  {json.dumps(fault)}")
    if path is not None:
        say(f"\nrun these again: shoal explore {name} --replay {path}")
    else:
        say("no failure")


def _show_json(name: str, found: Exploration, path: Path | None) -> None:
    from shoal.cli.console import json_line

    for failure in found.failures:
        json_line({"failure": failure.to_data()})
    json_line(
        {
            "system": name, "seeds": found.seeds, "traces": found.traces,
            "kinds": dict(found.kinds), "ended": dict(found.ended),
            "failures": len(found.failures), "file": None if path is None else str(path),
        }
    )  # fmt: skip
