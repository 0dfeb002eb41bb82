"""Groups of cells, here or in spawned processes.

Never forked: a fork after torch is imported is slow or hangs.
"""

from __future__ import annotations

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
from typing import Any

from shoal.base.errors import ShoalError, UsageError
from shoal.lab import launch as seam
from shoal.lab.cell import Cell, Launcher, Progress, execute, execute_seeds, gone, stacks
from shoal.lab.store import Store, decode_run, encode_run, save_params
from shoal.world.record import Run

Waiting = tuple[Cell, str | None]
"""A cell that is to run, and its key in the store."""

STACK_MAX = 10
"""Most seeds in one stack: bounds memory, and what a kill costs."""


@dataclass(frozen=True)
class Outcome:
    """A cell with its run, or with the error that it ended in."""

    cell: Cell
    run: Run | None
    error: str = ""
    key: str | None = None


def stacked(waiting: list[Waiting], launcher: Launcher) -> list[list[Waiting]]:
    """Cells that run together: the seeds of a strategy's arm in one piece, others by themselves.

    Only the lab's own launcher knows how to run several seeds at once; one that was put in its
    place does not.
    """
    groups: dict[Any, list[Waiting]] = {}
    for place, (cell, key) in enumerate(waiting):
        common = stacks(cell) if getattr(launcher, "__module__", "") == seam.__name__ else None
        groups.setdefault(place if common is None else common, []).append((cell, key))
    return [
        group[start : start + STACK_MAX]
        for group in groups.values()
        for start in range(0, len(group), STACK_MAX)
    ]


def run_group(
    group: list[Waiting], launcher: Launcher, progress: Progress | None = None
) -> list[Run | str]:
    """The runs of a group, or the errors that they ended in."""
    cells = [cell for cell, _ in group]
    try:
        if len(cells) > 1:
            return list(execute_seeds(cells, progress))
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
            futures[pool.submit(_work, group, launcher, paths)] = group
        for future in as_completed(futures):
            group = futures[future]
            try:
                results = future.result()
            except BrokenProcessPool:
                cell = group[0][0]
                raise ShoalError(
                    f"a worker process died while {cell.arm}, seed {cell.seed} or a cell beside "
                    "it ran (out of memory? lower --jobs); what had finished is stored"
                ) from None
            for (cell, key), (data, error) in zip(group, results, strict=True):
                if data is not None and store is not None and key is not None:
                    store.put_encoded(key, cell, data)
                yield Outcome(cell, decode_run(data) if data is not None else None, error, key)


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
    group: list[Waiting], launcher: Launcher, paths: list[Path | None]
) -> list[tuple[bytes | None, str]]:
    """In the worker: run a group, save parameters, return each encoded run or error."""
    out: list[tuple[bytes | None, str]] = []
    for (cell, _), path, result in zip(group, paths, run_group(group, launcher), strict=True):
        if isinstance(result, str):
            out.append((None, result))
            continue
        if path is not None and result.final:
            save_params(result, path, gone(cell))
        out.append((encode_run(result), ""))
    return out
