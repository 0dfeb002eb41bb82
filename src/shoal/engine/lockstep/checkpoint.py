"""Checkpoints inside a run: what rounds have changed, in a file, so that a kill costs little.

A checkpoint holds what rounds change, and nothing that the same arguments make anew: no method,
data or network. It is plain numbers and tensors, read with `torch.load(weights_only=True)`, so
that reading one executes no code. Tensors that share memory still share it afterwards, since some
arithmetic (a hub's model, held by everybody) depends on that. A run that goes on from a checkpoint
leaves the same bits as one that was never stopped.

Wall time decides when a checkpoint is saved. It never enters what a round computes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterable
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.base.stopwatch import Stopwatch
from shoal.engine.lockstep.timeline import _Moment
from shoal.engine.lockstep.traffic import Queued
from shoal.rounds.adapter import Model, Update
from shoal.tensor import tree
from shoal.world.record import Row

if TYPE_CHECKING:
    from shoal.engine.lockstep.lockstep import Lockstep
    from shoal.engine.lockstep.world import World

EVERY_S = 10.0
SHARE = 0.02
"""Saving takes at most this part of the time, however large a checkpoint is."""
EXPECTED_BYTES_PER_S = 2e8
"""How fast the first one is taken to be saved; the next ones go by what the last one took."""

FORMAT = f"shoal checkpoint 1, torch {torch.__version__}"
"""Another torch may round in another way, and the halves of a run must not differ."""

KEPT = {
    "world": (
        "ended_s", "bytes_sent", "bytes_received", "clock", "next_round", "on", "listens", "done",
        "led", "sent_s", "received_s", "stored", "reset", "margin", "behind", "_round",
    ),
    "timeline": ("birth", "death", "hard", "kept", "_past", "_times", "_number"),
    "run": (
        "messages_sent", "messages_delivered", "messages_in_flight", "dropped", "bytes_by_kind",
        "flops",
    ),
}  # fmt: skip
"""Attributes that rounds change and that are plain already; others have a line of code below."""

_Change = tuple[object, str, Any]
"""An owner, its attribute and the attribute's value."""

_KINDS = {kind.__name__: kind for kind in (Model, Update)}

_log = logging.getLogger("shoal")


class Checkpoint:
    """The file that keeps one lockstep execution between rounds.

    key: digest of all that determines the runs (of stacked seeds: of all of them); a file that was
    made with another key is ignored. every_s: least wall seconds between two saves; they are
    farther apart where saving would take more than 2% of the time. resumed: the round from which
    the execution goes on, 0 = from its start. A file that cannot be used, or written, costs one
    line on the log `shoal` and nothing else. Whoever stores the runs removes the file.
    """

    def __init__(self, path: str | Path, key: str, *, every_s: float = EVERY_S) -> None:
        self.path = Path(path)
        self.key = key
        self.every_s = every_s
        self.resumed = 0
        self._structure: Any = None
        self._wait_s = every_s
        self._since = Stopwatch()
        self._works = True

    def resume(self, engine: Lockstep) -> tuple[int, Stopwatch]:
        """Put an engine that has run nothing where the file left it.

        Returns the round to go on with, and a stopwatch that counts what was spent before.
        """
        _, self._structure = tree.flatten(_trees(engine))
        self._remove_parts()
        found = self._read(engine) if self.path.exists() else None
        watch = Stopwatch()
        if found is not None:
            self.resumed, spent_s, changes = found
            for owner, name, value in changes:
                setattr(owner, name, value)
            watch = Stopwatch(*spent_s)
        self._wait_s = max(self.every_s, _size(engine) / EXPECTED_BYTES_PER_S / SHARE)
        self._since = Stopwatch()
        return self.resumed, watch

    def offer(self, engine: Lockstep, round: int, watch: Stopwatch) -> None:
        """Save what an engine has reached, if it is time to: `round` is the next to run."""
        if not self._works or self._since.wall_s < self._wait_s:
            return
        leaves, structure = tree.flatten(_trees(engine))
        if structure != self._structure:
            self._give_up("the strategy's state has not the structure that it began with")
            return
        saving = Stopwatch()
        state = {
            "format": FORMAT,
            "key": self.key,
            "round": round,
            "spent_s": (watch.wall_s, watch.cpu_s),
            "leaves": leaves,
            "adopted": None if engine.hub is None else engine.adopted,
            "worlds": [_state_of(world) for world in engine.worlds],
        }
        try:
            self._write(state)
        except (OSError, RuntimeError) as error:
            self._give_up(f"cannot be written: {error}")
        self._wait_s = max(self.every_s, saving.wall_s / SHARE)
        self._since = Stopwatch()

    def _read(self, engine: Lockstep) -> tuple[int, tuple[float, float], list[_Change]] | None:
        """(next round, wall and CPU seconds spent, what to change); None if it is of no use."""
        try:
            with zipfile.ZipFile(self.path) as file:
                # torch does not look at the checksums that it writes.
                broken = file.testzip()
            if broken is not None:
                raise ValueError(f"{broken} is not what was written")
            found = torch.load(self.path, weights_only=True)
            if found["format"] != FORMAT:
                raise ValueError(f"it is a '{found['format']}', not a '{FORMAT}'")
            if found["key"] == self.key:
                # All is made before anything is changed: a file is used wholly or not at all.
                return found["round"], found["spent_s"], _changes(engine, self._structure, found)
            reason = "it was made by other code or settings"
        except Exception as error:
            # Whatever a file holds, the worst that it may cause is a start from round 0.
            told = str(error).splitlines() or [""]
            reason = f"it cannot be read ({type(error).__name__}: {told[0]:.100})"
        _log.warning(f"{self.path}: this checkpoint is ignored, {reason}; starting from round 0")
        return None

    def _write(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    def _give_up(self, reason: str) -> None:
        self._works = False
        _log.warning(f"{self.path}: {reason}; the run goes on without checkpoints")

    def _remove_parts(self) -> None:
        """What a kill in the middle of saving left behind."""
        for part in self.path.parent.glob(f"{self.path.stem}.*.part"):
            with contextlib.suppress(OSError):
                part.unlink()


def _trees(engine: Lockstep) -> Any:
    """All that is written in the strategy's and the transform's own terms."""
    return engine.state, engine.codec, engine.hub_state, engine.saved


def _size(engine: Lockstep) -> int:
    """Bytes of the tensors that grow with the model."""
    leaves, _ = tree.flatten((_trees(engine), None if engine.hub is None else engine.adopted))
    stores = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage() for leaf in leaves}
    return sum(store.nbytes() for store in stores.values())


def _state_of(world: World) -> dict[str, Any]:
    timeline, wires, measure = world.timeline, world._wires, world.measure
    return {
        "world": {name: getattr(world, name) for name in KEPT["world"]},
        "timeline": {
            **{name: getattr(timeline, name) for name in KEPT["timeline"]},
            "_seen": sorted(timeline._seen),
            "_moments": {p: [astuple(m) for m in all] for p, all in timeline._moments.items()},
        },
        "run": {
            **{name: getattr(world.run, name) for name in KEPT["run"]},
            "rows": _columns(world.run.rows),
        },
        "up_free": wires.up_free,
        "queued": {
            kind.__name__: [getattr(wave, f.name) for f in fields(Queued)]
            for kind, wave in wires.queued.items()
        },
        "measured": None if measure is None else (_columns(measure.taken), measure.last),
    }


def _changes(engine: Lockstep, structure: Any, found: dict[str, Any]) -> list[_Change]:
    """Everything that differs from an engine's beginning."""
    state, codec, hub_state, saved = tree.unflatten(structure, found["leaves"])
    changes: list[_Change] = [
        (engine, "state", state), (engine, "codec", codec), (engine, "hub_state", hub_state),
        (engine, "saved", saved),
    ]  # fmt: skip
    if engine.hub is not None:
        changes.append((engine, "adopted", found["adopted"]))
    for world, old in zip(engine.worlds, found["worlds"], strict=True):
        changes += _changes_of(world, old)
    return changes


def _changes_of(world: World, old: dict[str, Any]) -> list[_Change]:
    timeline: dict[str, Any] = old["timeline"]
    timeline["_seen"] = set(timeline["_seen"])
    moments = timeline["_moments"].items()
    timeline["_moments"] = {peer: [_Moment(*each) for each in all] for peer, all in moments}
    run: dict[str, Any] = old["run"]
    run["rows"] = _rows(run["rows"])
    queued = {_KINDS[name]: Queued(*wave) for name, wave in old["queued"].items()}
    wires = {"up_free": old["up_free"], "queued": queued}
    owners: list[tuple[object, dict[str, Any]]] = [
        (world, old["world"]), (world.timeline, timeline), (world.run, run), (world._wires, wires),
    ]  # fmt: skip
    if world.measure is not None:
        taken, last = old["measured"]
        owners.append((world.measure, {"taken": _rows(taken), "last": last}))
    return [(owner, name, value) for owner, values in owners for name, value in values.items()]


def _columns(rows: list[Row]) -> dict[str, Any]:
    """Rows by column: there may be one for each peer, metric and round."""
    names = {name: number for number, name in enumerate(dict.fromkeys(row.name for row in rows))}

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device="cpu")

    return {
        "names": list(names),
        "name": column((names[row.name] for row in rows), torch.int64),
        "value": column((row.value for row in rows), torch.float64),
        "time_s": column((row.time_s for row in rows), torch.float64),
        "round": column((row.round for row in rows), torch.int64),
        "peer": column((row.peer for row in rows), torch.int64),
        "special": {
            place: (row.value, row.labels)
            for place, row in enumerate(rows)
            if row.labels or type(row.value) is not float
        },
    }


def _rows(columns: dict[str, Any]) -> list[Row]:
    """Inverse of `_columns`."""
    names = [columns["names"][number] for number in columns["name"].tolist()]
    numbers = (columns[name].tolist() for name in ("value", "time_s", "round", "peer"))
    rows = [Row(*each) for each in zip(names, *numbers, strict=True)]
    for place, (value, labels) in columns["special"].items():
        rows[place] = replace(rows[place], value=value, labels=labels)
    return rows
