"""A process that commits in a loop until it is killed; says on its output what has returned.

    python store_writer.py DIRECTORY

Each commit writes one number under several keys, one of them large, so that a torn commit shows as
keys that disagree.
"""

from __future__ import annotations

import os
import sys

from shoal.engine.live.store import DiskStore

KEYS = ("a", "b", "large", "c")
ROUNDS_A_KEY = 7
LARGE_BYTES = 1 << 16


def items(number: int) -> dict[str, bytes]:
    """What commit `number` writes."""
    word = number.to_bytes(8, "little")
    return {
        **dict.fromkeys(KEYS, word),
        "large": word * (LARGE_BYTES // 8),
        f"old {number % ROUNDS_A_KEY}": word,
    }


def check(stored: dict[str, bytes]) -> int:
    """The newest commit in a store; AssertionError when it is not whole."""
    if not stored:
        return -1
    number = int.from_bytes(stored["a"], "little")
    assert {**stored, **items(number)} == stored, f"commit {number} is torn"
    for back in range(min(number + 1, ROUNDS_A_KEY)):
        earlier = number - back
        assert stored[f"old {earlier % ROUNDS_A_KEY}"] == earlier.to_bytes(8, "little")
    return number


def main() -> None:
    store = DiskStore(sys.argv[1], 0)
    number = check(store.load())
    while True:
        number += 1
        store.commit(items(number))
        os.write(1, number.to_bytes(8, "little"))


if __name__ == "__main__":
    main()
