"""The console script `shoal`.

Exit codes: 0 all well; 1 a claim fails or is inconclusive, a replay differs, or a run broke down;
2 misuse (a wrong name, setting, file or option); 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from shoal.cli.console import explain


def main() -> None:
    """Run the command line of this process; ends it with the exit code."""
    try:
        if sys.argv[1:] in (["list"], ["list", "--json"]):
            raise SystemExit(_list(json="--json" in sys.argv))
        from shoal.cli.app import app

        try:
            app(prog_name="shoal")
        except SystemExit:
            # The option parser ends with 1 when a pipe breaks; this wrapper is what it leaves.
            if type(sys.stdout).__name__ != "PacifyFlushWrapper":
                raise
            raise BrokenPipeError from None
    except BrokenPipeError:
        # The reader of a pipe (`shoal list | head`) has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _list(json: bool) -> int:
    """The bare `shoal list`, without the 0.3 s that the option parser takes to load.

    People type it first and shells complete with it; with any option it goes the usual way.
    """
    from shoal.cli.listing import print_list

    try:
        print_list(None, json)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("SHOAL_DEBUG"):
            raise
        return explain(error)
    sys.stdout.flush()
    return 0
