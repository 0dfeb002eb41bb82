"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import settings

from shoal.testing.pretend_device import register

# A single example has no time limit of its own: on a busy machine it says nothing about the code.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

# torch counts devices at the first backward pass of a process, whichever test that is in.
register()
