"""Settings that all tests share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from shoal.testing.pretend_device import register

# A single example has no time limit of its own: on a busy machine it says nothing about the code.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

# torch counts devices at the first backward pass of a process, whichever test that is in.
register()


@pytest.fixture(autouse=True)
def _own_first_values() -> None:
    """Modules that a test makes without a seed begin alike in every run, in any order of tests."""
    torch.manual_seed(0)
