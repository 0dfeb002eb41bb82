"""Traversal between Linux network namespaces with the kernel's own NAT, by real processes.

The results must equal those of the NAT model for the same program text.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import missing, world
from traversal_programs import Cross, outcomes

from shoal.engine.event import simulate
from shoal.world.links import Links
from shoal.world.nat import PUBLIC, NatBox
from shoal.world.network import Network
from shoal.world.record import Run

WHY = missing() if sys.platform == "linux" else "Linux only"
pytestmark = [pytest.mark.live, pytest.mark.skipif(bool(WHY), reason=WHY)]

KINDS = (PUBLIC, PUBLIC, PUBLIC, "port-restricted", "port-restricted", "symmetric", "symmetric")
TURNS = (((3, 4), (5, 6)), ((3, 5), (2, 4)), ((5, 4), (3, 2)), ((5, 2), (6, 3)), ((2, 6),))
DIRECT = {(3, 4), (2, 4), (3, 2), (5, 2), (2, 6)}
PORT = 7100


def in_namespaces(
    program: Cross, kinds: tuple[str, ...], folder: Path, carriers: tuple[str, ...] = ("tcp",)
) -> list[Run]:
    """The program by one process per peer, each in its network."""
    with world(*kinds) as made:
        plan = folder / "plan"
        plan.write_bytes(pickle.dumps((program, [lan.host for lan in made.lans], PORT, carriers)))
        here = Path(__file__).parent
        script, paths = here / "namespace_peer.py", [str(here), *sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        running = [
            subprocess.Popen(
                made.command(p, sys.executable, *map(str, (script, p, plan, folder / f"{p}"))),
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for p in range(len(kinds))
        ]  # fmt: skip
        try:
            for process in running:
                said, _ = process.communicate(timeout=program.until_s + 60.0)
                assert process.returncode == 0, said
        finally:
            for process in running:
                process.kill()
                process.communicate()
    runs = []
    for peer in range(len(kinds)):
        rows, dropped = pickle.loads((folder / f"{peer}").read_bytes())
        runs.append(Run("live", 0, len(kinds), rows=rows, dropped=dropped))
    return runs


def on_the_virtual_network(program: Cross, kinds: tuple[str, ...]) -> Run:
    nats = tuple(
        NatBox.classic(kind, (peer,), messages=True)
        for peer, kind in enumerate(kinds)
        if kind != PUBLIC
    )
    return simulate(program, Network(len(kinds), links=Links(latency_s=0.002), nats=nats))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_kernel_s_nat_lets_meet_whom_the_model_lets_meet(tmp_path: Path) -> None:
    real = in_namespaces(Cross(("203.0.113.10", "203.0.113.11"), TURNS), KINDS, tmp_path)
    model = on_the_virtual_network(Cross(("198.18.0.0", "198.18.0.1"), TURNS), KINDS)
    expected = outcomes(model)
    # What the model says is what the specification of the cells says.
    paths = {(peer, int(to)): v for (name, peer, to), v in expected.items() if name == "path"}
    assert paths == {call: call in DIRECT for turn in TURNS for call in turn}
    assert all(v for (name, _, _), v in expected.items() if name in ("answered", "asked back"))
    assert outcomes(*real) == expected


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_quic_passes_the_kernel_s_nat_where_punches_do(tmp_path: Path) -> None:
    kinds = (PUBLIC, PUBLIC, "port-restricted", "port-restricted", "symmetric")
    program = Cross(("203.0.113.10", "203.0.113.11"), (((2, 3),), ((3, 4),)))
    real = outcomes(*in_namespaces(program, kinds, tmp_path, ("quic",)))
    for (caller, called), meets in {(2, 3): True, (3, 4): False}.items():
        assert real["path", caller, str(called)] == meets
        assert real["messages", caller, str(called)] == meets
        assert real["answered", caller, str(called)] == 1
        assert real["asked back", called, str(caller)] == 1
