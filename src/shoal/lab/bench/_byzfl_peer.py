"""The ByzFL package at work, in an interpreter that has it: a line of JSON in, a line out.

`{"load": file}` takes rows [n, dim] from an .npy file. `{"run": stages, "calls": n, "save": file}`
puts them through the stages, each `[class, settings]`, so many times, and answers with CPU seconds
of one call, and how many of them a copy of the rows took. Only ByzFL's rules are imported: the
package as a whole wants torchvision.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch

from shoal.base.stopwatch import Stopwatch

IN_PLACE = ("ARC", "Clipping")
"""Rules that write into the rows they are given; each call makes a copy."""


def rules() -> dict[str, Any]:
    """Every class of the package's aggregators and pre-aggregators, by name."""
    spec = importlib.util.find_spec("byzfl")
    assert spec is not None
    package = ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["byzfl"] = package
    found: dict[str, Any] = {}
    for name in ("aggregators", "preaggregators"):
        found |= vars(importlib.import_module(f"byzfl.aggregators.{name}"))
    return found


def dealt(order: list[int]) -> None:
    """Bucketing draws as it does, and then takes this order, so that results can be compared."""
    tools = importlib.import_module("byzfl.utils.torch_tools")

    def permutation(vectors: torch.Tensor) -> torch.Tensor:
        torch.randperm(len(vectors))
        return vectors[torch.tensor(order)]

    vars(tools)["permutation"] = permutation


def run(known: dict[str, Any], rows: torch.Tensor, said: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of one call, copies included; the last result is saved if a file is named."""
    stages: list[tuple[str, dict[str, Any]]] = said["run"]
    if "order" in said:
        dealt(said["order"])
    total, copying, out = 0.0, 0.0, rows
    in_place = any(name in IN_PLACE for name, _ in stages)
    for _ in range(said["calls"]):
        made = [known[name](**settings) for name, settings in stages]
        watch = Stopwatch()
        out = rows.clone() if in_place else rows
        copying += watch.cpu_s if in_place else 0.0
        for stage in made:
            out = stage(out)
        total += watch.cpu_s
    if said.get("save"):
        np.save(said["save"], out.numpy())
    return {"cpu_s": total / said["calls"], "copying_s": copying / said["calls"]}


def main() -> None:
    # What rules print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    known = rules()
    rows = torch.zeros(0, device="cpu")
    for line in sys.stdin:
        said = json.loads(line)
        if "load" in said:
            rows, answer = torch.from_numpy(np.load(said["load"])), {}
        else:
            answer = run(known, rows, said)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
