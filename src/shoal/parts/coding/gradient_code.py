"""Gradient coding: a sum of gradients that any n - s of n workers give exactly.

The data are cut into n parts; every worker holds s + 1 of them and sends one combination of their
gradients. `cyclic` works for all n > s: worker i holds parts i .. i + s. With H, s x n, such that
H 1 = 0 and any s columns are independent, row i of the coding matrix B is the vector of that
support in the null space of H; B spans the null space, so the ones are a combination of any n - s
rows. `fractional` needs (s + 1) | n: s + 1 workers hold the same parts and send plain sums.

Tandon et al. 2017 (ICML, arXiv 1612.03301), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import keyed

RESIDUAL = 1e-9
"""How far from the ones a combination of rows may be; beyond it decoding is refused."""
REFINED = 1e-11
"""From which residual on a solution is refined by another way."""
DRAWS = 8
"""Matrices H that are drawn, of which the best conditioned is taken."""
_Array = np.ndarray


@dataclass(frozen=True)
class GradientCode:
    """A code over `workers` that does without any `stragglers` of them; see the module's text.

    kind: "cyclic" or "fractional". seed: from which H is drawn. Each worker does
    (stragglers + 1) / workers of the work. Results and messages are float64, or become it.

    H is normal, and not a matrix of Fourier or Vandermonde: of those some s neighbouring columns
    are dependent in float64 for n = 256, s = 15. What decoding multiplies rounding by
    (`amplification`) is some 1e2 to 1e5 for such n, for most sets; there are sets for which it is
    more, as for any matrix whose entries are not chosen for the set. The residual is checked.

    >>> code = GradientCode.cyclic(5, 2)
    >>> gradients = torch.arange(10.0, device="cpu", dtype=torch.float64).reshape(5, 2)
    >>> sent = [code.encode(i, gradients[list(code.plan(i))]) for i in (0, 3, 4)]
    >>> code.decode((0, 3, 4), torch.stack(sent)).round(decimals=9).tolist()
    [20.0, 25.0]
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"workers": 1, "stragglers": 0}, {"workers": 6, "stragglers": 2},
        {"workers": 7, "stragglers": 6}, {"workers": 9, "stragglers": 3, "seed": 4},
        {"workers": 64, "stragglers": 15},
        {"workers": 6, "stragglers": 2, "kind": "fractional"},
        {"workers": 16, "stragglers": 3, "kind": "fractional"},
        {"workers": 5, "stragglers": 0, "kind": "fractional"},
    )  # fmt: skip

    workers: int
    stragglers: int
    kind: str = "cyclic"
    seed: int = 0
    _cache: dict[tuple[int, ...], _Array] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        n, s = self.workers, self.stragglers
        if not 0 <= s < n:
            raise UsageError(
                f"GradientCode: stragglers={s} of workers={n}; need 0 to {max(n - 1, 0)}"
            )
        if self.kind not in ("cyclic", "fractional"):
            raise UsageError(f"GradientCode: kind={self.kind!r}; need 'cyclic' or 'fractional'")
        if self.kind == "fractional" and n % (s + 1):
            raise UsageError(
                f"GradientCode: fractional repetition of {n} workers with s={s}; s + 1 must divide "
                "the number of workers (take cyclic)"
            )

    @classmethod
    def cyclic(cls, workers: int, stragglers: int, seed: int = 0) -> GradientCode:
        """Worker i holds parts i .. i + s modulo n; any n > s."""
        return cls(workers, stragglers, "cyclic", seed)

    @classmethod
    def fractional(cls, workers: int, stragglers: int) -> GradientCode:
        """Groups of s + 1 workers hold the same s + 1 parts; (s + 1) | n."""
        return cls(workers, stragglers, "fractional")

    @property
    def parts(self) -> int:
        """As many as there are workers."""
        return self.workers

    @property
    def tolerates(self) -> int:
        return self.stragglers

    @property
    def load(self) -> float:
        """The fraction of the data that a worker processes."""
        return (self.stragglers + 1) / self.workers

    def plan(self, worker: int) -> tuple[int, ...]:
        """The parts that a worker holds."""
        n, s = self.workers, self.stragglers
        if not 0 <= worker < n:
            raise UsageError(f"GradientCode: worker {worker} of {n}; need 0 to {n - 1}")
        first = worker - worker % (s + 1) if self.kind == "fractional" else worker
        return tuple((first + j) % n for j in range(s + 1))

    def coefficients(self, worker: int) -> tuple[float, ...]:
        """What a worker multiplies the results of its parts with, in plan's order."""
        self.plan(worker)
        return self._rows[worker]

    def encode(self, worker: int, results: Tensor) -> Tensor:
        """The combination [...] of results [s + 1, ...], in plan's order."""
        if results.shape[:1] != (self.stragglers + 1,):
            raise UsageError(
                f"GradientCode: results {list(results.shape)} of worker {worker}; need "
                f"{self.stragglers + 1} rows, one for each part of its plan"
            )
        return _combined(np.array(self.coefficients(worker)), results)

    def enough(self, ids: Sequence[int]) -> bool:
        """Whether these workers' messages can be decoded."""
        known = set(self._checked(ids))
        if self.kind == "fractional":
            return len({worker // (self.stragglers + 1) for worker in known}) == self._groups
        return len(known) >= self.workers - self.stragglers

    def solvable(self, ids: Sequence[int]) -> bool:
        """Whether they can be decoded in float64, too; of what `enough` admits, nearly all can.

        Of random sets as many as may be missing, 1 in 1,500 cannot for n = 256 and s = 27, and none
        of 4,000 for n = 64 and s = 9. With fewer missing it is rarer yet.
        """
        try:
            self.weights(ids)
        except UsageError:
            return False
        return True

    def weights(self, ids: Sequence[int]) -> _Array:
        """What messages are multiplied with, [ids], such that all parts count once.

        The smallest of all weights that do. Raises UsageError when the workers are
        too few, or when float64 cannot tell them apart (`RESIDUAL`).
        """
        key = self._checked(ids)
        if key not in self._cache:
            if not self.enough(key):
                raise UsageError(
                    f"GradientCode: {len(key)} of {self.workers} workers cannot be decoded with "
                    f"s={self.stragglers} (wait for {self.workers - self.stragglers})"
                )
            if len(self._cache) > 4096:
                self._cache.clear()
            self._cache[key] = self._solved(key)
        return self._cache[key]

    def amplification(self, ids: Sequence[int]) -> float:
        """What rounding errors of parts of one size are multiplied by at most, when decoded."""
        key = self._checked(ids)
        return float((np.abs(self.weights(key)) @ np.abs(self.matrix[list(key)])).max())

    def decode(self, ids: Sequence[int], messages: Tensor) -> Tensor:
        """The sum [...] over all parts from messages [ids, ...].

        One pass over the messages. A number that is none, of whom it may be, is one in the sum.
        """
        by = self.weights(ids)
        if not messages.dim() or messages.shape[0] != len(by):
            raise UsageError(
                f"GradientCode: messages {list(messages.shape)} of {len(by)} workers; need one row "
                "for each"
            )
        return _combined(by, messages)

    @cached_property
    def matrix(self) -> _Array:
        """The coding matrix B, float64 [workers, parts]."""
        n, s = self.workers, self.stragglers
        if self.kind == "cyclic":
            return _cyclic(n, s, self.seed)
        group = np.arange(n) // (s + 1)
        return (group[:, None] == group[None, :]).astype(np.float64)

    @cached_property
    def _rows(self) -> tuple[tuple[float, ...], ...]:
        """Of every worker what its parts are multiplied with."""
        return tuple(
            tuple(self.matrix[worker, list(self.plan(worker))].tolist())
            for worker in range(self.workers)
        )

    @cached_property
    def _solutions(self) -> tuple[_Array, _Array]:
        """The smallest weights [workers] of all workers that give the ones, and an orthonormal
        basis [workers, stragglers] of those that give zero."""
        rank = self.workers - self.stragglers
        left, sizes, right = np.linalg.svd(self.matrix)
        some = left[:, :rank] @ (right[:rank].sum(1) / sizes[:rank])
        return some, left[:, rank:]

    @property
    def _groups(self) -> int:
        return self.workers // (self.stragglers + 1)

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        key = tuple(int(worker) for worker in ids)
        if len(set(key)) != len(key) or any(not 0 <= w < self.workers for w in key):
            raise UsageError(
                f"GradientCode: workers {list(key)}; need different ones of 0 to {self.workers - 1}"
            )
        return key

    def _solved(self, key: tuple[int, ...]) -> _Array:
        if self.kind == "fractional":
            taken: dict[int, int] = {}
            for place, worker in enumerate(key):
                taken.setdefault(worker // (self.stragglers + 1), place)
            weights = np.zeros(len(key))
            weights[list(taken.values())] = 1.0
            return weights
        # All weights that give the ones are `some` and whatever gives zero; those of the missing
        # must vanish, which takes a system of as many equations as are missing.
        some, zero = self._solutions
        missing = sorted(set(range(self.workers)) - set(key))
        free = np.linalg.lstsq(zero[missing], -some[missing], rcond=None)[0]
        weights = (some + zero @ free)[list(key)]
        rows, ones = self.matrix[list(key)], np.ones(self.parts)
        left = ones - rows.T @ weights
        if np.abs(left).max() > REFINED:
            # Rare, and slow: solve for what the short way has left.
            weights = weights + np.linalg.lstsq(rows.T, left, rcond=None)[0]
        residual = float(np.abs(ones - rows.T @ weights).max())
        if not residual <= RESIDUAL:
            raise UsageError(
                f"GradientCode: these {len(key)} workers leave a residual of {residual:.2g}; need "
                f"{RESIDUAL:g} (wait for more of them, or take fractional)"
            )
        return weights


BLOCK = 1 << 20
"""Numbers that are made float64 at a time, which stay in the processor's cache."""


def _combined(by: _Array, rows: Tensor) -> Tensor:
    """`sum_k by[k] * rows[k]`, float64 [...]."""
    weights = torch.as_tensor(by, device=rows.device)
    flat = rows.reshape(rows.shape[0], -1)
    if flat.dtype == torch.float64:
        return (weights @ flat).view(rows.shape[1:])
    out = torch.empty(flat.shape[1], dtype=torch.float64, device=flat.device)
    width = max(1, BLOCK // max(1, flat.shape[0]))
    for first in range(0, flat.shape[1], width):
        block = flat[:, first : first + width]
        out[first : first + width] = weights @ block.to(torch.float64)
    return out.view(rows.shape[1:])


@lru_cache(maxsize=32)
def _cyclic(n: int, s: int, seed: int) -> _Array:
    """B of the H, of several that are drawn, whose s neighbouring columns are furthest from
    dependent."""
    if s == 0:
        return np.eye(n)
    if s == n - 1:
        return np.ones((n, n))
    best, chosen = np.inf, None
    neighbours = (np.arange(n)[:, None] + np.arange(1, s + 1)) % n
    for draw in range(DRAWS):
        key = keyed.key_of(seed, "gradient code", n, s, draw)
        entries = keyed.normal(
            keyed.fold(key, torch.arange(s * n, device="cpu")), dtype=torch.float64
        )
        h = entries.view(s, n).numpy()
        h = h - h.mean(1, keepdims=True)
        windows = h[:, neighbours].transpose(1, 0, 2)
        worst = float(np.linalg.cond(windows).max())
        if worst < best:
            best, chosen = worst, (h, windows)
    assert chosen is not None
    h, windows = chosen
    solved = np.linalg.solve(windows, -h.T[:, :, None])[:, :, 0]
    b = np.eye(n)
    np.put_along_axis(b, neighbours, solved, axis=1)
    return b
