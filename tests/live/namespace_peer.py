"""`python namespace_peer.py PEER PLAN RESULT`: one peer of a plan, in whatever network this is."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from traversal_programs import Cross, key

from shoal.engine.live import LiveSettings
from shoal.engine.live.join import Joining, join_live
from shoal.world.network import Network


def main(peer: int, plan: Path, result: Path) -> None:
    program, hosts, port, carriers = pickle.loads(plan.read_bytes())
    assert isinstance(program, Cross)
    joining = Joining(
        listen=(hosts[peer], port), peer=peer, identity=key(peer),
        bootstrap=() if peer == 0 else ((hosts[0], port),),
    )  # fmt: skip
    settings = LiveSettings(horizon_s=program.until_s + 5.0, carriers=carriers)
    run = join_live(program, Network(len(hosts)), joining, settings=settings)
    result.write_bytes(pickle.dumps((run.rows, run.dropped)))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
