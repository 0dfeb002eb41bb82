"""Training in step: closed forms of both forms, newcomers, deaths, and fault lists with ballots."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.engine.event.simulation import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.parts.collective._errors import CollectiveError, RevisionViolation, TooFewPeers
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master
from shoal.parts.collective.quantised import Quantised
from shoal.parts.collective.ring import Ring
from shoal.parts.collective.training import Common, InStep
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.optimise.sgd import SGD
from shoal.world.faults import Crash, Hold, Join, Loss, Partition, Slow
from shoal.world.links import Links
from shoal.world.network import Network

DIM = 30
WORKERS = 5
NESTEROV = SGD(0.2, momentum=0.9, nesterov=True)


def centre(peer: int, dim: int = DIM) -> torch.Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(peer), dtype=torch.float64)


@dataclass(frozen=True)
class Pulls:
    """Every peer pulls towards a centre of its own; peer 0 keeps the group together."""

    in_step: InStep
    optimizer: Any = NESTEROV
    work_s: float = 0.2
    patience_s: float = 15.0
    dim: int = DIM
    piece_bytes: int = 64
    end: dict[int, Any] = field(default_factory=dict, compare=False)
    log: list[Any] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        if peer.id == 0:
            await Master(diverged_s=4.0, linger_s=3.0).run(peer)
            return
        common = Common(torch.zeros(self.dim, dtype=torch.float64), self.optimizer)
        common.load(peer.store.get)
        until_s = peer.now() + self.patience_s
        group: Communicator

        async def work(params: torch.Tensor, step: int) -> torch.Tensor:
            await peer.sleep_until(peer.now() + self.work_s)
            return params - centre(peer.id, self.dim)

        async def applied(average: torch.Tensor, ballots: torch.Tensor) -> None:
            nonlocal until_s
            until_s = peer.now() + self.patience_s
            self.log.append(
                (
                    peer.id,
                    common.steps,
                    group.committed,
                    common.digest(),
                    tuple(ballots.tolist()),
                    peer.now(),
                )
            )
            await peer.store.commit(common.items())

        while common.steps < self.in_step.steps and peer.now() < until_s:
            try:
                ring = Ring(stall_s=0.5, piece_bytes=self.piece_bytes)
                async with Communicator(peer, 0, ring=ring, master_timeout_s=3.0) as group:
                    await self.in_step.run(group, common, work, applied)
            except TooFewPeers:
                break
            except CollectiveError as error:
                if isinstance(error, RevisionViolation):
                    common.shared.revision = 0
                await peer.sleep_until(peer.now() + 0.3)
        self.end[peer.id] = (common.steps, common.digest(), common.params.clone())


def run(program: Pulls, faults: tuple[Any, ...] = (), seed: int = 0, workers: int = WORKERS):
    links = Links(latency_s=0.01, uplink_bytes_per_s=1e5)
    settings = EventSettings(strict=True, horizon_s=400.0)
    return simulate(
        program, Network(workers + 1, links=links, faults=faults), seed=seed, settings=settings
    )


def sequential(steps: int, optimizer: Any, late: bool, workers: int = WORKERS) -> torch.Tensor:
    """One peer that knows every centre."""
    mean = torch.stack([centre(p) for p in range(1, workers + 1)]).mean(0)
    params = torch.zeros(DIM, dtype=torch.float64)
    state, before = optimizer.init(params), params
    for _ in range(steps):
        gradient = (before if late else params) - mean
        before = params
        params, state = optimizer.step(params, gradient, state)
    return params


def check(program: Pulls) -> None:
    """One state for each step; everybody in a ring is in its average exactly once."""
    states, voters = defaultdict(set), defaultdict(set)
    for peer, step, operation, digest, ballots, _ in program.log:
        # A step may be made again where all that knew it have died: by another operation.
        states[step, operation].add(digest)
        if ballots:
            voters[step, operation].add(ballots)
            share = 1.0 / sum(b > 0 for b in ballots)
            assert all(b == 0 or abs(b - share) < 1e-12 for b in ballots), "lost or doubled"
            assert ballots[peer] > 0
    assert all(len(found) == 1 for found in states.values())
    assert all(len(found) == 1 for found in voters.values())


@pytest.mark.parametrize("optimizer", [NESTEROV, SGD(0.5), AdamW(0.05)], ids=["n", "sgd", "adamw"])
@pytest.mark.parametrize("late", [False, True])
def test_a_group_steps_as_one_peer_that_has_all_the_data(late: bool, optimizer: Any) -> None:
    program = Pulls(InStep(9, WORKERS, asynchronous=late, ballots=WORKERS + 1), optimizer)
    assert run(program).finished
    check(program)
    assert {steps for steps, _, _ in program.end.values()} == {9}
    assert len({digest for _, digest, _ in program.end.values()}) == 1
    want = sequential(9, optimizer, late)
    torch.testing.assert_close(program.end[1][2], want, rtol=1e-9, atol=1e-12)


def test_a_late_ring_turns_behind_the_work() -> None:
    """A ring takes half as long as the work: hidden but for the last."""
    took = {}
    for late in (False, True):
        in_step = InStep(12, WORKERS, asynchronous=late)
        program = Pulls(in_step, work_s=4.0, dim=3000, piece_bytes=1 << 14)
        slow = Links(latency_s=0.01, uplink_bytes_per_s=2e4)
        assert simulate(program, Network(WORKERS + 1, links=slow)).finished
        took[late] = max(entry[-1] for entry in program.log) / (12 * 4.0)
    assert took[False] > 1.4
    assert took[True] < 1.1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        Join(who=(5,), at=1.3), Join(who=(4, 5), at=2.05), Crash(who=(2,), at=1.33),
        Crash(who=(2, 3, 4), at=1.5), Crash(who=(2,), at=1.37, until=2.4),
        Partition(who=(3,), at=1.41, until=3.0), Crash(who=(1, 2, 3, 4, 5), at=1.6, until=2.0),
    ],
    ids=repr,
)  # fmt: skip
def test_peers_come_and_go(fault: Any, late: bool) -> None:
    least = WORKERS - len(fault.who) if isinstance(fault, Join) else WORKERS
    program = Pulls(InStep(10, least, asynchronous=late, ballots=WORKERS + 1))
    assert run(program, (fault,)).finished
    check(program)
    there = [p for p in program.end if not (isinstance(fault, Crash) and p in fault.who)]
    ended = {program.end[p][:2] for p in there}
    assert len(ended) <= 1
    if fault.until is not None or isinstance(fault, Join):
        assert len(program.end) == WORKERS
        assert {program.end[p][0] for p in program.end} == {10}
        assert len({program.end[p][1] for p in program.end}) == 1


def test_newcomers_receive_what_was_computed_before_they_came() -> None:
    """More newcomers than members: they have no vote on a step that they have not seen."""
    program = Pulls(InStep(14, 2, asynchronous=True, ballots=WORKERS + 1))
    assert run(program, (Join(who=(3, 4, 5), at=1.5),)).finished
    check(program)
    steps = defaultdict(set)
    for peer, step, *_ in program.log:
        steps[peer].add(step)
    # Nothing that the members had applied was undone: each step once, in order.
    assert steps[1] == steps[2] == set(range(1, 15))
    assert len(steps[3]) < 14
    assert len({end[:2] for end in program.end.values()}) == 1


def test_alone_a_peer_waits_and_then_gives_up() -> None:
    program = Pulls(InStep(10, 2, patience_s=3.0))
    assert run(program, (Crash(who=(2,), at=1.0),), workers=2).finished
    steps = program.end[1][0]
    assert 0 < steps < 10
    program = Pulls(InStep(10, 2, patience_s=6.0))
    assert run(program, (Crash(who=(2,), at=1.0, until=4.0),), workers=2).finished
    assert program.end[1][:2] == program.end[2][:2]
    assert program.end[1][0] == 10


def fault_list(seed: int) -> tuple[Any, ...]:
    """One to three faults on one or two of the workers."""

    def draw(*key: int | str) -> float:
        return keyed.uniform(seed, *key)

    made = []
    for k in range(1 + int(3 * draw("faults"))):
        order = sorted(range(1, WORKERS + 1), key=lambda peer: draw("who", k, peer))
        who = tuple(order[: 1 + int(2 * draw("victims", k))])
        at = round(3 * draw("at", k), 3)
        end = round(at + 0.05 + 2.5 * draw("until", k), 3)
        until = end if draw("ends", k) < 0.5 else None
        made.append(
            (
                Crash(who=who, at=at, until=until), Crash(who=who, at=at, until=end),
                Partition(who=who, at=at, until=end), Loss(who=who, at=at, until=end,
                                                           probability=0.3),
                Hold(who=who, at=at, until=end), Slow(who=who, at=at, until=end),
                Join(who=who, at=at),
            )[int(7 * draw("kind", k))]
        )  # fmt: skip
    return tuple(made)


@pytest.mark.parametrize("late", [False, True])
def test_no_fault_list_hangs_a_group_or_parts_it(late: bool) -> None:
    complete = 0
    for seed in range(40):
        program = Pulls(InStep(6, 3, asynchronous=late, ballots=WORKERS + 1, patience_s=8.0))
        made = run(program, fault_list(seed), seed)
        assert made.finished, f"seed {seed} hangs"
        check(program)
        # Peers that were away until the others had gone make the rest of the steps by themselves.
        complete += any(end[0] == 6 for end in program.end.values())
    assert complete >= 35, "most groups should reach the end"


@pytest.mark.live
@pytest.mark.parametrize("late", [False, True])
def test_the_same_text_on_real_sockets(late: bool) -> None:
    program = Pulls(InStep(6, 3, asynchronous=late), work_s=0.01)
    made = run_live(program, Network(4), settings=LiveSettings(horizon_s=30.0))
    assert made.finished
    check(program)
    want = sequential(6, NESTEROV, late, workers=3)
    for steps, _, params in program.end.values():
        assert steps == 6
        # The order of the ring, and so of its sums, is that of arrival.
        torch.testing.assert_close(params, want, rtol=1e-9, atol=1e-12)


def test_eager_work_goes_on_from_ones_own_gradient() -> None:
    """Written out: each peer's next gradient is taken where its last one alone leads."""
    program = Pulls(InStep(7, WORKERS, asynchronous=True, eager=True), SGD(0.4))
    assert run(program).finished
    centres = torch.stack([centre(p) for p in range(1, WORKERS + 1)])
    params, own = torch.zeros(DIM, dtype=torch.float64), torch.zeros_like(centres)
    gradient = params - centres
    for _ in range(6):
        own, waiting = gradient, gradient.mean(0)
        gradient = params - own - centres
        params = params - 0.4 * waiting
    params = params - 0.4 * gradient.mean(0)
    torch.testing.assert_close(program.end[1][2], params, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_quantised_is_refused() -> None:
    program = Pulls(InStep(8, WORKERS, quantise=Quantised()), SGD(0.3))
    with pytest.raises(UsageError, match="float32"):
        run(program)


def test_a_state_survives_the_store() -> None:
    first = Common(torch.zeros(3), AdamW(0.1))
    first.apply(torch.tensor([1.0, -1.0, 0.5]))
    second = Common(torch.ones(3), AdamW(0.1))
    assert second.digest() != first.digest()
    second.load(first.items().get)
    assert second.digest() == first.digest()
    assert (second.steps, second.shared.revision) == (1, 1)
    for each in (first, second):
        each.apply(torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(first.params, second.params)
    second.load({}.get)
    assert second.steps == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps=0"), ({"steps": 3, "least": 1}, "least=1"),
        ({"steps": 3, "ballots": 4, "quantise": Quantised()}, "ballots=4"),
        ({"steps": 3, "patience_s": 0.0}, "patience_s=0.0"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        InStep(**settings)
