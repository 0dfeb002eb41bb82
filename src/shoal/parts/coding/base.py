"""What a code over workers promises: who computes what, what is sent, and from whom it is decoded.

A `SumCode` is for a sum over parts of the work. `plan` says which parts a worker does, `encode`
makes one message of their results, and `decode` gives the sum over all parts back from the messages
of any worker set that is `enough`. Who is missing is known (an erasure), and nobody lies: a number
that is none, or wrong, makes the sum so.

A `ShareCode` is for a function of K inputs. `encode` makes one share for each of N workers, which
apply the function to it, and `decode` gives the K results back from their answers, of which some
may be missing and some wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from shoal.parts.coding.decode_result import DecodeResult

Workers = range | list[int] | tuple[int, ...] | Tensor
"""Whose answers these are, in their order."""


class SumCode(Protocol):
    """A linear code for a sum over `parts` parts of the work. Frozen; arithmetic is float64."""

    @property
    def workers(self) -> int: ...

    @property
    def parts(self) -> int:
        """How many parts of equal size the work is cut into."""
        ...

    @property
    def tolerates(self) -> int:
        """How many workers, whichever they are, may be missing."""
        ...

    def plan(self, worker: int) -> tuple[int, ...]:
        """The parts that a worker computes."""
        ...

    def encode(self, worker: int, results: Tensor) -> Tensor:
        """One message [...] of the results [planned, ...] of a worker's parts, in plan's order."""
        ...

    def enough(self, ids: Sequence[int]) -> bool:
        """Whether the messages of these workers can be decoded."""
        ...

    def decode(self, ids: Sequence[int], messages: Tensor) -> Tensor:
        """The sum [...] over all parts, from messages [ids, ...] of these workers."""
        ...


class ShareCode(Protocol):
    """A code for a function of K inputs. Frozen; arithmetic is float64."""

    @property
    def K(self) -> int: ...

    @property
    def N(self) -> int:
        """How many workers there are, one share for each."""
        ...

    def corrects(self, missing: int = 0) -> int:
        """How many wrong answers, whosever they are, are left out when so many are missing."""
        ...

    def encode(self, X: Tensor) -> Tensor:
        """Shares [..., N, dim] of inputs [..., K, dim]; leading axes are independent tasks."""
        ...

    def decode(self, ids: Workers, V: Tensor) -> DecodeResult:
        """The results [..., K, out] from what workers `ids` answered, [..., len(ids), out]."""
        ...

    def decode_all(self, values: Tensor, present: Tensor | None = None) -> DecodeResult:
        """The same from a row for every worker, [..., N, out], and who answered, bool [..., N].

        Answers that are no real numbers count as missing.
        """
        ...
