"""Full collections stay short in a process that has loaded much."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.live

SCRIPT = """
import gc
import weakref

from shoal.engine.live.garbage import keep_collections_short

keep_collections_short()
keep_collections_short()
assert len(gc.callbacks) == 1
set_aside = gc.get_freeze_count()
assert set_aside > 10_000, set_aside

# What a later import leaves behind is looked at once.
kept = [[number] for number in range(2_000_000)]
gc.collect()
assert gc.get_freeze_count() > set_aside + 1_000_000

# Cycles of what is made from now on are found as ever.
class Node:
    pass

alive = []
for _ in range(1000):
    node = Node()
    node.own = node
    alive.append(weakref.ref(node))
del node
gc.collect()
assert not any(each() for each in alive)
"""


def test_what_is_loaded_is_set_aside_and_new_cycles_are_still_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
