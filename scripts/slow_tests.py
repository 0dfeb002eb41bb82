"""The slow tests of one turn: as many as fit into a time limit, beginning at another one each turn.

The turn is the number of commits, so that all tests have theirs, and a failure can be repeated with
`--turn`. Which tests are chosen is printed. Exit code: pytest's, or 1 when none was run.
"""

from __future__ import annotations

import argparse
import subprocess
import time

import pytest


class Turn:
    """A pytest plugin: slow tests in the order of this turn, until the time is over."""

    def __init__(self, turn: int, limit_s: float) -> None:
        self.turn = turn
        self.limit_s = limit_s
        self.ran: list[str] = []
        self.left = 0
        self._end_s = 0.0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        slow = [
            item
            for item in items
            if item.get_closest_marker("slow") and not item.get_closest_marker("gpu")
        ]
        first = self.turn % len(slow) if slow else 0
        items[:] = slow[first:] + slow[:first]
        self._end_s = time.monotonic() + self.limit_s

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() >= self._end_s:
            self.left += 1
            pytest.skip("the time of this turn is over")
        self.ran.append(item.nodeid)
        print(f"\nturn {self.turn}: {item.nodeid}", flush=True)


def commits() -> int:
    counted = subprocess.run(["git", "rev-list", "--count", "HEAD"], capture_output=True, text=True)
    return int(counted.stdout or 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turn", type=int, help="default: the number of commits")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds; a test is not cut off")
    parser.add_argument("tests", nargs="*", default=["tests"])
    given = parser.parse_args()
    turn = Turn(commits() if given.turn is None else given.turn, given.limit)
    code = pytest.main(["-s", "-p", "no:cacheprovider", *given.tests], plugins=[turn])
    print(
        f"turn {turn.turn}: {len(turn.ran)} slow tests run, {turn.left} left for other turns "
        f"({given.limit:g} s a turn)"
    )
    return int(code) or int(not turn.ran)


if __name__ == "__main__":
    raise SystemExit(main())
