"""The process of one bench: `python -m shoal.lab.bench NAME [--tiny]`, JSON Lines on stdout."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any


def main(name: str, tiny: bool) -> None:
    """Run one bench; numbers measured at the smallest sizes are not judged."""
    import torch

    from shoal.lab.bench import find

    torch.set_num_threads(1)

    def say(what: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    for row in find(name).measure(tiny, lambda text: say({"note": text})):
        say((replace(row, bound=None, holds=None) if tiny else row).to_json())


if __name__ == "__main__":
    main(sys.argv[1], "--tiny" in sys.argv)
