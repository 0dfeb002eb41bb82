"""How large a code should be: precision against the number of errors that it finds, by simulation.

A large dimension leaves little precision noise in the checks but few checks; a small one the
reverse. Where the best is depends on how fast the coefficients of f(u(.)) fall, so that it is tried
out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding.berrut_code import BerrutCode
from shoal.tensor import keyed


@dataclass(frozen=True)
class CodeDimension:
    """best: the dimension of least error. errors: dimension -> median relative error of results;
    located: dimension -> share of trials in which exactly the wrong workers were left out."""

    best: int
    errors: dict[int, float]
    located: dict[int, float]


@dataclass(frozen=True)
class Trials:
    """Draws by key: inputs [trials, K, dim], what liars add to their answers before it is scaled,
    and the order in which workers lie, or else are missing, [trials, N]."""

    inputs: Tensor
    lies: Tensor
    order: Tensor

    @classmethod
    def drawn(
        cls, seed: int, trials: int, K: int, N: int, dim: int, out: int | None = None
    ) -> Trials:
        """Standard normal inputs of `dim` entries and lies of `out` (as many unless given)."""
        key = keyed.key_of(seed, "coded trials")
        order = keyed.uniform(keyed.grid(keyed.fold(key, "order"), trials * N)).view(trials, N)
        return cls(
            _normal(keyed.fold(key, "inputs"), trials, K, dim),
            _normal(keyed.fold(key, "lies"), trials, N, dim if out is None else out),
            order.argsort(-1),
        )

    def liars(self, count: int) -> Tensor:
        """Who lies, bool [trials, N]."""
        nobody = torch.zeros_like(self.order, dtype=torch.bool)
        return nobody.scatter(-1, self.order[:, :count], True)

    def present(self, liars: int, missing: int) -> Tensor:
        """Who answers, bool [trials, N]: `missing` workers that do not lie are away."""
        all_of_them = torch.ones_like(self.order, dtype=torch.bool)
        return all_of_them.scatter(-1, self.order[:, liars : liars + missing], False)


def _normal(key: Tensor, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return keyed.normal(keyed.grid(key, count), dtype=torch.float64).view(shape)


def relative_error(Y: Tensor, truth: Tensor) -> Tensor:
    """Norm of the difference over that of the truth, [...] from [..., K, dim]."""
    return (Y - truth).flatten(-2).norm(dim=-1) / truth.flatten(-2).norm(dim=-1)


def choose_dimension(
    f: Callable[[Tensor], Tensor], K: int, N: int, A: int, noise: float = 1.0, *, S: int = 0,
    dim: int = 50, trials: int = 20, seed: int = 0, dimensions: Sequence[int] | None = None,
    inputs: Tensor | None = None,
) -> CodeDimension:  # fmt: skip
    """The dimension with which A liars and S missing answers cost least accuracy.

    f maps [..., dim] to [..., out]. noise: liars add so many times a standard normal number to
    every entry. dimensions: those that are tried, all by default. inputs: [trials, K, dim],
    standard normal ones by default; own data are better, as the best dimension depends on them.

    >>> choose_dimension(torch.sigmoid, 3, 12, 1, dim=8, trials=4).best in range(3, 12)
    True
    """
    chosen = tuple(range(K, N)) if dimensions is None else tuple(dimensions)
    if not chosen or A < 0 or S < 0 or A + S > N - 2:
        raise UsageError(
            f"choose_dimension: dimensions={chosen}, A={A}, S={S}, N={N}; need one dimension or "
            "more, and at least 2 workers that neither lie nor are missing"
        )
    if inputs is not None:
        trials, dim = inputs.shape[0], inputs.shape[-1]
    base = BerrutCode(K, N)
    draws = Trials.drawn(seed, trials, K, N, dim)
    X = draws.inputs if inputs is None else inputs.to(torch.float64)
    truth, answers = f(X), f(base.encode(X))
    if answers.shape[-1] != dim:
        draws = Trials.drawn(seed, trials, K, N, dim, answers.shape[-1])
    liars, present = draws.liars(A), draws.present(A, S)
    answers = answers + noise * draws.lies.to(answers.device) * liars.unsqueeze(-1)
    errors, located = {}, {}
    for size in chosen:
        result = replace(base, code_dim=size).decode_all(answers, present)
        errors[size] = float(relative_error(result.Y, truth).median())
        located[size] = float((result.errors == liars).all(-1).double().mean())
    return CodeDimension(min(errors, key=lambda size: errors[size]), errors, located)
