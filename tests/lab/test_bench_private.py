"""The bench of private steps: both contestants make the same step, and rows say so."""

from __future__ import annotations

import pytest

from shoal.lab.bench import private
from shoal.tensor import keyed

opacus = pytest.importorskip("opacus", reason="opacus is not installed (`make setup` installs it)")


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("case", private._TINY, ids=lambda case: case.name)
def test_both_make_the_same_step(case: private.Case, ghost: bool) -> None:
    task = case.task()
    assert private.apart(task, task.init(keyed.key_of(1)).unsqueeze(0), ghost=ghost) < 1e-5


def test_rows_at_the_smallest_sizes() -> None:
    rows = list(private.measure(True, lambda text: None))
    assert len(rows) == 3 * len(private._TINY)
    assert {row.reference for row in rows} == {None, "Opacus", "Opacus, ghost clipping"}
    assert all(row.ratio is not None for row in rows if row.reference)
