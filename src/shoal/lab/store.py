"""Finished runs in one SQLite file, so that a grid that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import zlib
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from shoal.base.errors import UsageError
from shoal.lab.cell import Cell, gone
from shoal.world.record import Happening, Row, Run

SCHEMA = 1
# Parameters of more bytes than this are stored as their mean only.
PARAMS_BYTES_MAX = 1 << 28
_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY, arm TEXT NOT NULL, system TEXT, seed INTEGER NOT NULL,
    engine TEXT NOT NULL, cell TEXT NOT NULL, run BLOB NOT NULL,
    created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
)
"""


def default_folder() -> Path:
    """`.shoal` in the working folder, or what SHOAL_HOME names."""
    return Path(os.environ.get("SHOAL_HOME", ".shoal"))


class Store:
    """`runs.sqlite` in a folder; beside it final parameters as safetensors, and checkpoints.

    Every `put` is one transaction, and parameters are in place before it: a run is stored wholly
    or not at all. Several processes may use one folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self.path = self.folder / "runs.sqlite"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: no folder for runs can be here: {error.strerror} "
                "(set SHOAL_HOME to one that you may write to)"
            ) from None
        try:
            self._db = sqlite3.connect(self.path, timeout=60)
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, SCHEMA):
                raise UsageError(
                    f"{self.path}: schema {found}; this version reads {SCHEMA} "
                    "(move the file away, or set SHOAL_HOME)"
                )
            with self._db:
                self._db.execute(_TABLE)
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"{self.path}: cannot be used as a run store: {error} (move the file away)"
            ) from None

    def get(self, key: str) -> Run | None:
        """A stored run, without its parameters."""
        found = self._db.execute("SELECT run FROM runs WHERE key = ?", (key,)).fetchone()
        return decode_run(found[0]) if found else None

    def put(self, key: str, cell: Cell, run: Run) -> None:
        """Keep a finished run; the parameters go to `params_path(key)`."""
        if run.final:
            save_params(run, self.params_path(key), gone(cell))
        self.put_encoded(key, cell, encode_run(run))

    def put_encoded(self, key: str, cell: Cell, data: bytes) -> None:
        """Keep a run that a worker encoded (and whose parameters it saved)."""
        values = (
            key, cell.arm, cell.system, cell.seed, cell.engine, json.dumps(cell.to_json()), data,
        )  # fmt: skip
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO runs (key, arm, system, seed, engine, cell, run) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                values,
            )

    def params_path(self, key: str) -> Path:
        return self.folder / "params" / f"{key}.safetensors"

    def checkpoint_path(self, name: str) -> Path:
        """Of runs that are under way (`engine.lockstep.checkpoint`)."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def count(self) -> int:
        """How many runs are stored."""
        return self._db.execute("SELECT count(*) FROM runs").fetchone()[0]

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_COLUMNS = ("name", "value", "time_s", "round", "peer", "labels")


def encode_run(run: Run) -> bytes:
    """A run without its parameters as compressed MessagePack, rows by column."""
    plain: dict[str, Any] = {
        f.name: getattr(run, f.name) for f in fields(Run) if f.name not in ("rows", "final")
    }
    plain["happenings"] = [(h.time_s, h.what, h.peers) for h in run.happenings]
    plain["settings"] = dict(run.settings)
    plain["rows"] = {name: [getattr(row, name) for row in run.rows] for name in _COLUMNS}
    return zlib.compress(msgspec.msgpack.encode(plain), 6)


def decode_run(data: bytes) -> Run:
    """Inverse of `encode_run`; final parameters stay behind (see `save_params`)."""
    plain = msgspec.msgpack.decode(zlib.decompress(data))
    columns = plain.pop("rows")
    columns["labels"] = [tuple((k, v) for k, v in labels) for labels in columns["labels"]]
    rows = [Row(*values) for values in zip(*(columns[name] for name in _COLUMNS), strict=True)]
    happenings = [Happening(t, what, tuple(peers)) for t, what, peers in plain.pop("happenings")]
    plain["names"] = tuple(plain["names"])
    plain["shapes"] = tuple(tuple(shape) for shape in plain["shapes"])
    return Run(rows=rows, happenings=happenings, **plain)


def save_params(run: Run, path: Path, gone: tuple[int, ...] = ()) -> None:
    """Final parameters as safetensors, by an atomic rename.

    Tensors: `peers` int64 [k], `params` [k, dim] (left out beyond PARAMS_BYTES_MAX) and `mean`
    [dim] over the peers that are not `gone` (crashed or left for good).
    """
    import torch
    from safetensors.torch import save_file

    peers = sorted(run.final)
    staying = [peer for peer in peers if peer not in gone] or peers
    mean = torch.stack([run.final[peer].detach().cpu() for peer in staying]).mean(0)
    tensors = {"peers": torch.tensor(peers), "mean": mean}
    if mean.numel() * mean.element_size() * len(peers) <= PARAMS_BYTES_MAX:
        tensors["params"] = torch.stack([run.final[peer].detach().cpu() for peer in peers])
    metadata = {"names": json.dumps(run.names), "shapes": json.dumps(run.shapes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
