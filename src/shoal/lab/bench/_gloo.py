"""`torch.distributed` with Gloo as the yardstick of collectives: a process per rank, over TCP.

`python -m shoal.lab.bench._gloo` with `rate RANKS [BYTES REPEATS]...` prints the seconds of each
all-reduce, and with `kill RANKS BYTES` what survivors of a kill are told; both as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from shoal.base.stopwatch import Stopwatch

_UNCOUNTED = 2


def _join(rank: int, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)


def _rate(rank: int, ranks: int, meeting: str, *plan: Any) -> None:
    *numbers, pipe = plan
    _join(rank, ranks, meeting)
    found = []
    for size, repeats in zip(numbers[::2], numbers[1::2], strict=True):
        values = torch.empty(size // 4)
        seconds = []
        for _ in range(_UNCOUNTED + repeats):
            values.fill_(1.0)
            dist.barrier()
            watch = Stopwatch()
            dist.all_reduce(values)
            seconds.append(watch.wall_s)
            assert values[0] == values[-1] == ranks
        found.append(seconds[_UNCOUNTED:])
    if not rank:
        pipe.send(found)
    dist.destroy_process_group()


def _kill(rank: int, ranks: int, meeting: str, size: int, pipe: Connection) -> None:
    _join(rank, ranks, meeting)
    values = torch.ones(size // 4)
    dist.all_reduce(values)
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    told = []
    for _ in range(2):
        try:
            dist.all_reduce(values)
            told.append("")
        except RuntimeError as error:
            told.append(str(error).splitlines()[0][:120])
    pipe.send(told)
    os._exit(0)


def _run(work: Any, ranks: int, *more: int) -> Any:
    context = processes.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        each = [
            context.Process(target=work, args=(rank, ranks, meeting, *more, theirs), daemon=True)
            for rank in range(ranks)
        ]
        for process in each:
            process.start()
        answer = ours.recv() if ours.poll(300.0) else None
        for process in each:
            process.join(10.0)
            with contextlib.suppress(AttributeError):
                process.kill()
    return answer


def main(mode: str, *numbers: str) -> None:
    """Print what a run gave, as one line of JSON."""
    work = {"rate": _rate, "kill": _kill}[mode]
    sys.stdout.write(json.dumps(_run(work, *map(int, numbers))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
