"""Local training in which each record is private: clipped gradients, and noise on their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.privacy.ledger import MOST, Ledger, most_within, noise_for
from shoal.parts.privacy.poisson_sampling import clipped_sum, dealt, drawn
from shoal.parts.privacy.sampled_gaussian import GaussianRelease
from shoal.parts.privacy.secret_keys import Secrets, check_secrets, draw_keys
from shoal.parts.privacy.tree_noise import TreeNoise, TreeRelease, TreeSums
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.rounds.task import Shard
from shoal.tensor.keyed import fold, normal
from shoal.tensor.types import Key, Vector

Draws = Literal["poisson", "parts"]
Noise = Literal["fresh", "tree"]


@dataclass(frozen=True)
class State:
    """params [..., dim]; taken int64 [...]: steps so far; sums: the noise in the running sum of
    gradients, with a tree, else None."""

    params: Vector
    taken: Tensor
    sums: TreeSums | None


@dataclass(frozen=True)
class PrivateSteps:
    """`steps` noisy steps on own data, then what was combined: DP-SGD at each peer, or DP-FTRL.

    A step goes along (sum of the gradients of some records, each clipped to norm `clip`, plus
    noise) / (sampling * records). The noise has standard deviation noise * clip in each entry.
    Peers add their own noise, so each record is protected from everybody else, whatever becomes of
    the models: a hub, a neighbour and who sees the outcome learn no more about a record than
    `epsilon(rounds, delta)` says. With n peers that average their models the noise averages out,
    too. That holds with secrets="system", where nobody can work the draws out; with "run" they
    follow from the run's seed, so that a run can be repeated, and protect from nobody who knows it
    (see `parts.privacy.secret_keys`). Noise is in floating point, whose low bits may tell more
    than the theory has it (Mironov 2012): `parts.privacy.discrete_gaussian` has none of that.

    budget: epsilon at `delta` that a record may spend in all. A peer makes no step that would
    exceed it, and from then on only takes part in what others learn; rounds in which it was absent
    count as if it had worked. None = no end.

    draws: "poisson", each record with probability `sampling`, by itself (DP-SGD; it gains from
    nobody knowing who was drawn), or "parts", the records dealt into 1 / sampling parts of which
    each step uses the next (no gain, no assumption). mechanism: "fresh" noise in each step, or
    "tree", running sums of gradients with the noise of a binary tree (DP-FTRL without momentum),
    for parts only; a tree is as long as a pass over the parts, then another begins. sampling = 1
    takes all records in each step.

    records: |D|, a public number that must not tell whether a record is there; None takes the size
    of the peer's shard, which then counts as public. Gradients are clipped one by one by the task
    (`clipped_grad_sum`), which any task can. With "parts" a peer that loses its state begins anew
    with the first part, which neither ledger nor budget counts.
    Source: Abadi et al. 2016, algorithm 1 (arXiv 1607.00133); Kairouz et al. 2021 (arXiv
    2103.00039).

    >>> round(PrivateSteps(noise=1.0, sampling=0.05).epsilon(rounds=200, delta=1e-5), 2)
    5.37
    """

    lr: float = 0.5
    steps: int = 1
    sampling: float = 0.1
    clip: float = 1.0
    noise: float = 1.0
    draws: Draws = "poisson"
    mechanism: Noise = "fresh"
    records: int | None = None
    budget: float | None = None
    delta: float = 1e-5
    secrets: Secrets = "run"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"noise": 0.1, "steps": 2}, {"noise": 0.1, "sampling": 0.25, "draws": "parts"},
        {"noise": 0.1, "sampling": 0.5, "draws": "parts", "mechanism": "tree", "records": 30},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.sampling <= 1:
            raise UsageError(
                f"PrivateSteps: sampling={self.sampling}; need a share above 0, at most 1"
            )
        if self.draws not in ("poisson", "parts") or self.mechanism not in ("fresh", "tree"):
            raise UsageError(
                f"PrivateSteps: draws={self.draws!r}, mechanism={self.mechanism!r}; need poisson "
                "or parts, and fresh or tree"
            )
        if self.mechanism == "tree" and self.draws != "parts":
            raise UsageError(
                "PrivateSteps: a tree's accountant counts in how many terms a record is, which "
                "draws='poisson' leaves open (set draws='parts')"
            )
        if self.draws == "parts" and abs(self.parts * self.sampling - 1) > 1e-6:
            raise UsageError(
                f"PrivateSteps: sampling={self.sampling}; parts are all of one share: need 1 over "
                "a whole number"
            )
        for name, fine, rule in (
            ("steps", self.steps >= 1, "at least 1"),
            ("clip", 0 < self.clip < math.inf, "a finite norm above 0"),
            ("noise", 0 <= self.noise < math.inf, "a finite number >= 0"),
            ("records", self.records is None or self.records >= 1, "at least 1, or None"),
            ("delta", 0 < self.delta < 1, "a chance above 0 and below 1"),
            ("budget", self.budget is None or self.budget >= 0, "at least 0, or None"),
        ):
            if not fine:
                raise UsageError(f"PrivateSteps: {name}={getattr(self, name)}; need {rule}")
        check_secrets("PrivateSteps", self.secrets)

    @property
    def parts(self) -> int:
        """Parts in a pass, of draws="parts"."""
        return max(1, round(1 / self.sampling))

    @property
    def tree(self) -> TreeNoise:
        return TreeNoise(self.parts, self.noise * self.clip, self.secrets)

    @property
    def allowed(self) -> int:
        """How many steps the budget is enough for.

        >>> PrivateSteps(sampling=0.01, budget=1.0, noise=1.1).allowed
        141
        """
        return MOST if self.budget is None else _allowed(self)

    def ledger(self, rounds: int) -> Ledger:
        """What a record of a peer that worked in all of so many rounds has spent."""
        if rounds < 0:
            raise UsageError(f"PrivateSteps: rounds={rounds}; need 0 or more")
        return self._spent(min(rounds * self.steps, self.allowed))

    def _spent(self, taken: int) -> Ledger:
        """What so many steps spend."""
        if self.draws == "poisson":
            return Ledger().after(GaussianRelease(self.noise, self.sampling), taken)
        passes, rest = divmod(taken, self.parts)
        if self.mechanism == "fresh":
            # Of the steps of a pass one alone sees the record.
            return Ledger().after(GaussianRelease(self.noise, draws="parts"), passes + (rest > 0))
        ledger = Ledger().after(TreeRelease(self.noise, self.parts), passes)
        return ledger.after(TreeRelease(self.noise, rest), 1) if rest else ledger

    def epsilon(self, rounds: int, delta: float) -> float:
        """epsilon of (epsilon, delta)-privacy of a record after so many rounds.

        Neighbours differ by one record that is there or not; with draws="parts" its place stays
        empty, as all others would come into other parts. For one that is replaced halve the noise.
        """
        return self.ledger(rounds).epsilon(delta)

    def calibrated(self, epsilon: float, delta: float, rounds: int) -> PrivateSteps:
        """The same with the noise that spends epsilon in so many rounds.

        >>> strategy = PrivateSteps(sampling=0.05).calibrated(2.0, 1e-5, rounds=200)
        >>> round(strategy.noise, 3), round(strategy.epsilon(200, 1e-5), 6)
        (1.793, 2.0)
        """
        noise = noise_for(
            epsilon, delta, lambda noise: replace(self, noise=noise, budget=None).ledger(rounds)
        )  # fmt: skip
        return replace(self, noise=noise)

    def init(self, params: Vector) -> State:
        taken = torch.zeros_like(params[..., 0], dtype=torch.int64)
        return State(params, taken, self.tree.init(params) if self.mechanism == "tree" else None)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        params, sums = state.params, state.sums
        steps = min(self.steps, max(0, self.allowed - step.round * self.steps))
        for number in range(steps):
            key = fold(step.key, number)
            sample, size = self.sample(step.shard, state.taken + number, key)
            total = clipped_sum(
                step.task, params, sample, key, self.sampling * step.shard.index.shape[-1],
                self.clip,
            )  # fmt: skip
            noise, sums = self._drawn(params, sums, fold(key, "noise"))
            scale = self.lr / (self.sampling * size.clamp_min(1).to(params.dtype))
            move = (total + noise) * scale.unsqueeze(-1)
            # Who has no records, and says so, has nothing to hide.
            params = torch.where((size > 0).unsqueeze(-1), params - move, params)
        return State(params, state.taken + steps, sums), Parcel(params)

    def sample(self, shard: Shard, taken: Tensor, key: Key) -> tuple[Shard, Tensor]:
        """The records of step number `taken` [...], and |D| [...]."""
        size = shard.size if self.records is None else torch.full_like(shard.size, self.records)
        if self.draws == "poisson":
            sample = drawn(shard, key, self.sampling, self.secrets)
        else:
            sample = dealt(shard, taken % self.parts, self.parts)
        return sample, size

    def _drawn(
        self, like: Vector, sums: TreeSums | None, key: Key
    ) -> tuple[Vector | float, TreeSums | None]:
        """What a step's sum has in noise."""
        if sums is not None:
            sums, noise = self.tree.after(sums, key)
            return noise, sums
        if not self.noise:
            return 0.0, None
        draws = normal(draw_keys(key, like.shape[-1], self.secrets), dtype=like.dtype)
        return draws * (self.noise * self.clip), None

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector, state.taken, state.sums)

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.taken, state.sums)

    def params(self, state: State) -> Vector:
        return state.params


@lru_cache(maxsize=64)
def _allowed(strategy: PrivateSteps) -> int:
    assert strategy.budget is not None
    return most_within(strategy._spent, strategy.budget, strategy.delta)
