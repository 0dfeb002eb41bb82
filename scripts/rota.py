"""The bounded rota of CI: a third of the systems at the small budget, one system in full.

Which ones follows from the number of commits, so that all have their turn. A verdict
that is not the one that the card expects ends the run with exit code 1: an honest `fails` does not
block, a changed verdict does. At the small budget a claim may also be out of scale.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TURNS = 3
"""In how many turns every system is reproduced at the small budget."""

SHOAL = str(Path(sys.executable).with_name("shoal"))


def lines(*command: str) -> list[dict[str, object]]:
    """What a command prints as JSON Lines; `reproduce` exits with 1 when a claim fails."""
    done = subprocess.run([SHOAL, *command, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"shoal {' '.join(command)} ended with exit code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(name: str, budget: str) -> list[str]:
    """Reproduce one system; the claims whose verdict is not the expected one."""
    found = lines("reproduce", name, "--budget", budget, "--fresh")
    if not found:
        return [f"{name}: no report"]
    (report,) = found
    wrong = []
    for claim in report["claims"]:  # type: ignore[attr-defined]
        right = claim["verdict"] == claim["expected"]
        right |= budget == "small" and claim["verdict"] == "out of scale"
        mark = "  " if right else "! "
        print(
            f"{mark}{name} ({budget}) {claim['name']}: {claim['verdict']} "
            f"({claim['measured']}, bound {claim['bound']})",
            flush=True,
        )
        if not right:
            wrong.append(f"{name}, {claim['name']}: {claim['verdict']}")
    print(f"  {name}: {report['seconds']} s", flush=True)
    return wrong


def main() -> int:
    names = [card["name"] for card in lines("list") if card["paper"]]
    commits = subprocess.run(["git", "rev-list", "--count", "HEAD"], capture_output=True, text=True)
    turn = int(commits.stdout or 0)
    whole = names[turn % len(names)]
    part = [name for name in names[turn % TURNS :: TURNS] if name != whole]
    wrong = check(str(whole), "full")
    for name in part:
        wrong += check(str(name), "small")
    print(
        f"turn {turn}: {1 + len(part)} of {len(names)} systems reproduced; verdicts other than "
        f"expected: {len(wrong)}"
    )
    for text in wrong:
        print(f"  {text}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
