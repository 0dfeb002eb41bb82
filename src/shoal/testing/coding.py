"""The contract of a code for sums, for the library's own and for yours.

def test_my_code():
    check_code(MyCode(workers=9))
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.coding.base import SumCode
from shoal.tensor import keyed as drawn

SETS = 300
"""Sets of workers that are tried; all of them, where there are no more."""


def check_code(code: SumCode, *, seed: int = 0, tolerance: float = 1e-9) -> None:
    """Raise AssertionError where the contract is broken.

    Checks: plans name parts that exist, and every part is planned often enough that it survives;
    encoding is linear; from the messages of workers that are `enough` the sum over all parts comes
    back to `tolerance` of the largest part, for every set with `tolerates` workers missing (of many
    sets some), in any order of messages, and with fewer missing; for results of any shape; sets
    that are not enough are refused with a UsageError.

    >>> from shoal.parts.coding.gradient_code import GradientCode
    >>> check_code(GradientCode.cyclic(5, 2))
    """
    name = repr(code)
    _check_plans(name, code)
    results = _results(code.parts, (3, 2), seed)
    messages = torch.stack([code.encode(w, _of(code, w, results)) for w in range(code.workers)])
    assert messages.shape == (code.workers, 3, 2), f"{name}: messages {list(messages.shape)}"
    _check_linear(name, code, results, seed)
    total, scale = results.sum(0), float(results.abs().max()) * code.parts
    for missing in _sets(code.workers, code.tolerates, seed):
        ids = [w for w in _shuffled(code.workers, seed, len(missing)) if w not in missing]
        assert code.enough(ids), f"{name}: without {sorted(missing)} it should be enough"
        decoded = code.decode(ids, messages[ids])
        error = float((decoded - total).abs().max()) / scale
        assert error <= tolerance, f"{name}: without {sorted(missing)} the sum is {error:.2g} off"
    for missing_count in range(code.tolerates):
        ids = list(range(missing_count, code.workers))
        error = float((code.decode(ids, messages[ids]) - total).abs().max()) / scale
        assert error <= tolerance, f"{name}: with {len(ids)} workers the sum is {error:.2g} off"
    _check_refusals(name, code, messages)


def _check_plans(name: str, code: SumCode) -> None:
    held = [0] * code.parts
    for worker in range(code.workers):
        plan = code.plan(worker)
        assert len(set(plan)) == len(plan), f"{name}: worker {worker} does a part twice"
        assert all(0 <= part < code.parts for part in plan), f"{name}: worker {worker}: {plan}"
        for part in plan:
            held[part] += 1
    fewest = min(held)
    assert fewest > code.tolerates, (
        f"{name}: a part is held by {fewest} workers, {code.tolerates} of which may be missing"
    )


def _check_linear(name: str, code: SumCode, results: Tensor, seed: int) -> None:
    other = _results(code.parts, (3, 2), seed + 1)
    mine, theirs = _of(code, 0, results), _of(code, 0, other)
    apart = code.encode(0, mine) + 2.0 * code.encode(0, theirs)
    joint = code.encode(0, mine + 2.0 * theirs)
    assert torch.allclose(apart, joint, rtol=1e-9, atol=1e-9), f"{name}: encoding is not linear"
    assert joint.dtype == torch.float64, f"{name}: messages are {joint.dtype}; need float64"


def _check_refusals(name: str, code: SumCode, messages: Tensor) -> None:
    assert not code.enough([]), f"{name}: nobody is enough"
    for ids in ([], [0, 0], [code.workers]):
        try:
            code.decode(ids, messages[[0] * len(ids)])
        except UsageError:
            continue
        raise AssertionError(f"{name}: workers {ids} were decoded")


def _sets(workers: int, missing: int, seed: int) -> list[frozenset[int]]:
    if math.comb(workers, missing) <= SETS:
        return [frozenset(each) for each in itertools.combinations(range(workers), missing)]
    # Neighbours are what cyclic codes are worst at.
    neighbours = [
        frozenset((first + j) % workers for j in range(missing)) for first in range(workers)
    ]
    kept = neighbours[: SETS // 2]
    some = range(SETS - len(kept))
    return kept + [frozenset(_shuffled(workers, seed, turn)[:missing]) for turn in some]


def _shuffled(workers: int, seed: int, turn: int) -> list[int]:
    return sorted(range(workers), key=lambda w: keyed.uniform(seed, "check code", turn, w))


def _of(code: SumCode, worker: int, results: Tensor) -> Tensor:
    return results[list(code.plan(worker))]


def _results(parts: int, shape: tuple[int, ...], seed: int) -> Tensor:
    count = parts * math.prod(shape)
    key = drawn.fold(drawn.key_of(seed, "check code"), torch.arange(count, device="cpu"))
    return drawn.normal(key, dtype=torch.float64).view(parts, *shape)
