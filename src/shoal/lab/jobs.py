"""Groups of cells, here or in spawned processes.

Never forked: a fork after torch is imported is slow or hangs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.base.digest import bytes_digest
from shoal.base.errors import ShoalError, UsageError
from shoal.lab import launch as seam
from shoal.lab.cell import Cell, Launcher, Progress, execute, execute_seeds, gone, stacks
from shoal.lab.store import Store, decode_run, encode_run, save_params
from shoal.world.record import Run

if TYPE_CHECKING:
    from shoal.engine.lockstep import Checkpoint

Waiting = tuple[Cell, str | None]
"""A cell that is to run, and its key in the store."""

STACK_MAX = 10
"""Most seeds in one stack: bounds memory."""

Kept = tuple[Path, str]
"""The file that keeps a group's rounds while it runs, and the key that the file must have."""


@dataclass(frozen=True)
class Outcome:
    """A cell with its run, or with the error that it ended in.

    resumed: the round from which it went on, if an earlier process was killed in it.
    """

    cell: Cell
    run: Run | None
    error: str = ""
    key: str | None = None
    resumed: int = 0


def stacked(waiting: list[Waiting], launcher: Launcher) -> list[list[Waiting]]:
    """Cells that run together: the seeds of a strategy's arm in one piece, others by themselves.

    Only the lab's own launcher knows how to run several seeds at once; one that was put in its
    place does not.
    """
    groups: dict[Any, list[Waiting]] = {}
    for place, (cell, key) in enumerate(waiting):
        common = stacks(cell) if _own(launcher) else None
        groups.setdefault(place if common is None else common, []).append((cell, key))
    return [
        group[start : start + STACK_MAX]
        for group in groups.values()
        for start in range(0, len(group), STACK_MAX)
    ]


def _own(launcher: Launcher) -> bool:
    return getattr(launcher, "__module__", "") == seam.__name__


def kept_at(group: list[Waiting], launcher: Launcher, store: Store | None) -> Kept | None:
    """Where the rounds of a group are kept; None for cells that can only start again.

    The place follows from the cells alone: other code finds the file there, does not use it, and
    puts its own in its place.
    """
    keys = [key for _, key in group if key is not None]
    if store is None or len(keys) < len(group):
        return None
    if not _own(launcher) or stacks(group[0][0]) is None:
        return None
    cells = json.dumps([cell.to_json() for cell, _ in group], sort_keys=True)
    path = store.checkpoint_path(bytes_digest(cells.encode()))
    return path, bytes_digest("".join(keys).encode())


def forget(kept: Kept | None) -> None:
    """The runs are stored, or are to start from the beginning."""
    if kept is not None:
        kept[0].unlink(missing_ok=True)


def run_group(
    group: list[Waiting], launcher: Launcher, progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Run | str]:  # fmt: skip
    """The runs of a group, or the errors that they ended in."""
    cells = [cell for cell, _ in group]
    try:
        if len(cells) > 1 or checkpoint is not None:
            return list(execute_seeds(cells, progress, checkpoint))
        return [execute(cells[0], launcher, progress)]
    except UsageError:
        raise
    except ShoalError as error:
        return [f"{type(error).__name__}: {error}"] * len(cells)


def in_processes(
    waiting: list[Waiting], launcher: Launcher, store: Store | None, jobs: int
) -> Iterator[Outcome]:
    """Outcomes in the order in which they finish. Leaving the loop early ends the processes."""
    _check_picklable(waiting, launcher)
    groups = stacked(waiting, launcher)
    with workers(min(jobs, len(groups))) as pool:
        futures = {}
        for group in groups:
            paths = [
                store.params_path(key) if store is not None and key is not None else None
                for _, key in group
            ]
            kept = kept_at(group, launcher, store)
            futures[pool.submit(_work, group, launcher, paths, kept)] = group, kept
        for future in as_completed(futures):
            group, kept = futures[future]
            try:
                results, resumed = future.result()
            except BrokenProcessPool:
                cell = group[0][0]
                raise ShoalError(
                    f"a worker process died while {cell.arm}, seed {cell.seed} or a cell beside "
                    "it ran (out of memory? lower --jobs); what had finished is stored"
                ) from None
            for (cell, key), (data, _) in zip(group, results, strict=True):
                if data is not None and store is not None and key is not None:
                    store.put_encoded(key, cell, data)
            forget(kept)
            for (cell, key), (data, error) in zip(group, results, strict=True):
                run = decode_run(data) if data is not None else None
                yield Outcome(cell, run, error, key, resumed)


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes with one thread of arithmetic each; gone whenever the block is left.

    Leaving it by an exception, Ctrl-C included, ends them in the middle of what they do.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        # A cell may have minutes to go; Ctrl-C means now. What is stored is whole.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise


def _check_picklable(waiting: list[tuple[Cell, str | None]], launcher: Launcher) -> None:
    try:
        pickle.dumps(([cell for cell, _ in waiting], launcher))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"jobs: a live object cannot be sent to another process: {error} "
            "(define its class at the top of a module, or use jobs=1)"
        ) from None


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal's group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Processes share the cores, so each gets one thread; torch reads this when it is imported.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent that was killed cannot end its workers, and they would wait for it for good."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(
    group: list[Waiting], launcher: Launcher, paths: list[Path | None], kept: Kept | None
) -> tuple[list[tuple[bytes | None, str]], int]:
    """In the worker: run a group, save parameters.

    Returns each encoded run or error, and the round from which they went on.
    """
    checkpoint = None if kept is None else seam.checkpoint(*kept)
    results = run_group(group, launcher, checkpoint=checkpoint)
    out: list[tuple[bytes | None, str]] = []
    for (cell, _), path, result in zip(group, paths, results, strict=True):
        if isinstance(result, str):
            out.append((None, result))
            continue
        if path is not None and result.final:
            save_params(result, path, gone(cell))
        out.append((encode_run(result), ""))
    return out, 0 if checkpoint is None else checkpoint.resumed
