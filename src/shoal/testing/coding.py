"""The contracts of codes, for the library's own and for yours.

def test_my_code():
    check_code(MyCode(workers=9))

def test_my_share_code():
    check_share_code(MyShareCode(K=3, N=15), torch.square)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.coding.base import ShareCode, SumCode
from shoal.parts.coding.decode_result import DecodeResult
from shoal.tensor import keyed as drawn

SETS = 300
"""Sets of workers that are tried; all of them, where there are no more."""
LIES = (10.0, 1e9, 1e160, 1e308)
"""How large lies are relative to answers: from what stands out to what float64 hardly holds."""
WIDTH = 12
"""Entries of inputs and answers; of fewer, liars that are as many as can be corrected may hide."""


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


def check_share_code(
    code: ShareCode, f: Callable[[Tensor], Tensor], *, seed: int = 0, tolerance: float = 1e-9,
    lied: float | None = None,
) -> None:  # fmt: skip
    """Raise AssertionError where the contract is broken.

    f: what workers apply, entry by entry; the code must decode it to `tolerance` of the largest
    result from all answers. lied: the same where some lie, for a code that is not exact; half of
    the liars that it may correct then count. Checks: inputs
    that are all the same are their own shares; leading axes stay apart, and arguments as they were;
    the order of answers is nothing; an answer with an entry that is no number, or complex, is a
    missing one; as many liars as the code corrects are left out, however large their lies; any
    number of liars never makes it raise, nor trust what is no number; nothing is trusted that
    nothing checks; wrong shapes, workers that are none, and twice the same are refused with a
    UsageError.

    >>> from shoal.parts.coding.lagrange_code import LagrangeCode
    >>> check_share_code(LagrangeCode(3, 11, degree=2), torch.square)
    """
    name, N = repr(code), code.N
    X = _results(2 * code.K, (WIDTH,), seed).view(2, code.K, WIDTH)
    kept = X.clone()
    shares = code.encode(X)
    assert shares.shape == (2, N, WIDTH), f"{name}: shares {list(shares.shape)}"
    assert shares.dtype == torch.float64, f"{name}: shares are {shares.dtype}; need float64"
    assert _off(code.encode(X[1]), shares[1]) < 1e-12, f"{name}: encoding mixes tasks"
    same = code.encode(X[:, :1].expand(2, code.K, WIDTH)) - X[:, :1]
    assert float(same.abs().max()) < 1e-9, f"{name}: shares of equal inputs are no input"
    answers, truth = f(shares), f(X)
    sent = answers.clone()
    result = code.decode_all(answers)
    assert _off(result.Y, truth) <= tolerance, f"{name}: {_off(result.Y, truth):.2g} off"
    assert not result.errors.any(), f"{name}: {result.errors.sum()} honest answers are errors"
    checked = ~result.residual.isnan()
    assert not (result.trusted & ~checked).any(), f"{name}: trusted, and nothing was checked"
    assert (result.trusted | ~checked).all(), f"{name}: honest answers are not trusted"
    order = _shuffled(N, seed, 0)
    for task in range(2):
        alone = code.decode(order, answers[task, order])
        assert _off(alone.Y, result.Y[task]) < 1e-9, f"{name}: decoding depends on order or tasks"
    _check_missing(name, code, answers)
    bound = tolerance if lied is None else lied
    most = code.corrects() if lied is None else (code.corrects() + 1) // 2
    for turn, size in enumerate(LIES):
        _check_liars(name, code, answers, truth, size, turn, most, bound)
    for now, before in ((X, kept), (answers, sent)):
        assert torch.equal(now, before), f"{name}: arguments were written"
    _check_share_refusals(name, code, answers[0])


def _off(Y: Tensor, truth: Tensor) -> float:
    return float((Y - truth).abs().max() / truth.abs().max().clamp(min=1e-300))


def _check_missing(name: str, code: ShareCode, answers: Tensor) -> None:
    if code.corrects(1) == 0 and not code.corrects():
        return
    there = torch.ones(code.N, dtype=torch.bool, device=answers.device)
    there[code.N // 2] = False
    expected = code.decode_all(answers, there)
    imaginary = torch.complex(answers, torch.zeros_like(answers))
    imaginary.imag[:, code.N // 2, 1] = 1.0
    broken = {"that is complex": imaginary}
    for entry in (math.nan, math.inf):
        broken[f"{entry}"] = answers.clone()
        broken[f"{entry}"][:, code.N // 2, 1] = entry
    for what, sent in broken.items():
        found = code.decode_all(sent)
        assert _off(found.Y, expected.Y) < 1e-12, f"{name}: an entry {what} is not as if missing"


def _check_liars(
    name: str, code: ShareCode, answers: Tensor, truth: Tensor, size: float, turn: int, count: int,
    bound: float,
) -> None:  # fmt: skip
    largest = float(answers.abs().max())
    factor = min(size * largest, 1e308)
    for liars in sorted({count, min(count + 1, code.N), (code.N + 1) // 2, code.N}):
        who = _shuffled(code.N, turn, liars)[:liars]
        lie = answers.clone()
        lie[:, who] = factor * (0.5 + 0.5 * _results(liars, (WIDTH,), turn).clamp(-1, 1).abs())
        result = code.decode_all(lie)
        _check_told(name, code, result)
        if liars == count and count:
            named = [set(task.nonzero().flatten().tolist()) for task in result.errors]
            assert all(each >= set(who) for each in named), f"{name}: {who} lied, not {named}"
            off = _off(result.Y, truth)
            assert off <= bound, f"{name}: {off:.2g} off with {liars} lies of {size:g}"


def _check_told(name: str, code: ShareCode, result: DecodeResult) -> None:
    numbers = result.Y.isfinite().flatten(-2).all(-1)
    assert (numbers | ~result.trusted).all(), f"{name}: trusts what is no number"
    shape = (*result.Y.shape[:-2], code.N)
    assert result.errors.shape == shape, f"{name}: errors {list(result.errors.shape)}"


def _check_share_refusals(name: str, code: ShareCode, answers: Tensor) -> None:
    N = code.N
    for what, call in {
        "inputs of another number": lambda: code.encode(answers.new_zeros(code.K + 1, 4)),
        "complex inputs": lambda: code.encode(answers.new_zeros(code.K, 4).to(torch.complex128)),
        "inputs without an axis": lambda: code.encode(answers.new_zeros(code.K)),
        "nobody": lambda: code.decode([], answers[:0]),
        "somebody twice": lambda: code.decode([0] * N, answers),
        "a worker too much": lambda: code.decode(range(1, N + 1), answers),
        "an answer too few": lambda: code.decode(range(N), answers[:-1]),
        "answers that are empty": lambda: code.decode(range(N), answers[:, :0]),
        "no numbers at all": lambda: code.decode_all(torch.full_like(answers, math.nan)),
    }.items():
        try:
            call()
        except UsageError:
            continue
        raise AssertionError(f"{name}: {what} were not refused")


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
