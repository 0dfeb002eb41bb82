"""Every code that the folder holds, with every example of its own, meets its contract."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts import coding
from shoal.parts.coding.base import ShareCode, SumCode
from shoal.parts.coding.gradient_code import GradientCode
from shoal.parts.coding.lagrange_code import LagrangeCode
from shoal.parts.coding.replication_code import ReplicationCode
from shoal.tensor.threads import one_thread
from shoal.testing.coding import check_code, check_share_code


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def classes(protocol: type) -> list[type[Any]]:
    """Every class of the folder that has all the methods of a contract."""
    words = {word for word in vars(protocol) if not word.startswith("_")}
    found = {}
    for each in pkgutil.iter_modules(coding.__path__):
        module = importlib.import_module(f"{coding.__name__}.{each.name}")
        for kind in vars(module).values():
            fields = getattr(kind, "__dataclass_fields__", {})
            here = isinstance(kind, type) and kind.__module__ == module.__name__
            whole = all(hasattr(kind, word) or word in fields for word in words)
            if here and whole and kind is not protocol:
                found[kind.__name__] = kind
    return list(found.values())


def cases(protocol: type) -> list[Any]:
    return [
        pytest.param(kind, settings, id=f"{kind.__name__}-{place}")
        for kind in classes(protocol)
        for place, settings in enumerate(kind.examples)
    ]


def test_all_codes_are_found() -> None:
    assert {kind.__name__ for kind in classes(SumCode)} == {"GradientCode"}
    assert {kind.__name__ for kind in classes(ShareCode)} == {
        "BerrutCode", "LagrangeCode", "ReplicationCode",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), cases(SumCode))
def test_codes_for_sums(kind: type[SumCode], settings: dict[str, Any]) -> None:
    check_code(kind(**settings))


@pytest.mark.parametrize(("kind", "settings"), cases(ShareCode))
def test_codes_for_functions(kind: type[ShareCode], settings: dict[str, Any]) -> None:
    # A polynomial for the codes that are exact, something smooth for the one that is not.
    if kind.__name__ == "BerrutCode":
        check_share_code(kind(**settings), torch.tanh, tolerance=0.3, lied=0.6)
    else:
        check_share_code(kind(**settings), lambda x: x**2 - x)


class Trusting(ReplicationCode):
    """Takes the first copy, and trusts it."""

    def decode_all(self, values: Tensor, present: Tensor | None = None) -> Any:
        result = super().decode_all(values, present)
        copies = values[..., : self.K, :].nan_to_num(0.0)
        return type(result)(copies, result.errors, result.residual, ~result.trusted.isnan())


class Noisy(LagrangeCode):
    """Counts answers that are no numbers."""

    def decode_all(self, values: Tensor, present: Tensor | None = None) -> Any:
        return super().decode_all(values.real.nan_to_num(0.0, 0.0, 0.0), present)


class Wrong(GradientCode):
    """Forgets what workers' coefficients are for."""

    def coefficients(self, worker: int) -> tuple[float, ...]:
        return (1.0,) * (self.stragglers + 1)


class Forgetful(GradientCode):
    """Says that fewer are enough."""

    @property
    def tolerates(self) -> int:
        return self.stragglers + 1


@pytest.mark.parametrize("code", [Wrong(6, 2), Forgetful(6, 2)], ids=["wrong", "forgetful"])
def test_the_contract_finds_sums_that_break_it(code: GradientCode) -> None:
    with pytest.raises((AssertionError, UsageError)):
        check_code(code)


@pytest.mark.parametrize("code", [Trusting(2, 6), Noisy(3, 11, 2)], ids=["trusting", "noisy"])
def test_the_contract_finds_functions_that_break_it(code: ShareCode) -> None:
    with pytest.raises(AssertionError):
        check_share_code(code, torch.square)
