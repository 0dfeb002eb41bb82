"""Private local steps: against a loop over records, on the ladder, and what they claim to spend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts import find
from shoal.parts.aggregate.mean import Mean
from shoal.parts.exchange.gossip import Gossip
from shoal.parts.privacy.ledger import Ledger
from shoal.parts.privacy.poisson_sampling import dealt
from shoal.parts.privacy.sampled_gaussian import GaussianRelease
from shoal.parts.privacy.tree_noise import TreeRelease
from shoal.parts.strategy.private_steps import PrivateSteps
from shoal.parts.tasks.digits import Digits
from shoal.rounds.method import Method
from shoal.rounds.strategy import Heard, Step
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network

PEERS = 5


def digits(hidden: tuple[int, ...] = (6,), **settings) -> Digits:
    return Digits(peers=PEERS, hidden=hidden, train_samples=120, **settings)


def step_of(task: Digits, round: int) -> Step:
    keys = keyed.fold(keyed.key_of(5), torch.arange(PEERS), "round", round)
    return Step(round, task, task.shard(torch.arange(PEERS)), keys, torch.ones(PEERS).bool())


def one_by_one(
    task: Digits, params: torch.Tensor, positions: list[int], clip: float
) -> torch.Tensor:
    """The sum of clipped gradients, record by record, by autograd on the module."""
    total = torch.zeros_like(params)
    for place in positions:
        leaf = params.clone().requires_grad_()
        output = torch.func.functional_call(
            task.module, task.spec.views(leaf), (task.x[place : place + 1].to(params.dtype),)
        )
        loss = torch.nn.functional.cross_entropy(output, task.y[place : place + 1])
        (gradient,) = torch.autograd.grad(loss, leaf)
        total += gradient * min(1.0, clip / float(gradient.norm()))
    return total


@pytest.mark.parametrize("batching", ["stacked", "vmap"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_steps_are_those_of_a_loop_over_records(batching: str, model: str) -> None:
    task = digits(batching=batching, model=model, split="dirichlet", alpha=0.5)
    strategy = PrivateSteps(lr=0.7, sampling=0.3, clip=0.5, noise=0.0, steps=2)
    params = task.init(keyed.key_of(1)).double().expand(PEERS, -1).clone()
    step = step_of(task, 0)
    _, parcel = strategy.local(strategy.init(params), step)
    for peer in range(PEERS):
        own, size = params[peer], int(step.shard.size[peer])
        for number in range(2):
            key = keyed.fold(step.key[peer], number)
            coins = keyed.uniform(
                keyed.fold(key, "records").unsqueeze(-1), torch.arange(step.shard.index.shape[-1])
            )
            drawn = [int(step.shard.index[peer, i]) for i in range(size) if coins[i] < 0.3]
            own = own - 0.7 / (0.3 * size) * one_by_one(task, own, drawn, 0.5)
        torch.testing.assert_close(parcel.vector[peer], own, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mechanism", ["fresh", "tree"])
def test_a_pass_over_the_parts_uses_every_record_once(mechanism: str) -> None:
    task = digits()
    strategy = PrivateSteps(
        lr=1.0, sampling=0.25, noise=0.0, clip=1e6, draws="parts", mechanism=mechanism, records=4
    )
    params = task.init(keyed.key_of(1)).expand(PEERS, -1).clone()
    state = strategy.init(params)
    for round in range(4):
        before = state.params
        step = step_of(task, round)
        state, _ = strategy.local(state, step)
        peer, size = 2, int(step.shard.size[2])
        positions = [int(step.shard.index[peer, i]) for i in range(size) if i % 4 == round]
        expected = before[peer] - one_by_one(task, before[peer], positions, 1e6)
        torch.testing.assert_close(state.params[peer], expected, rtol=1e-4, atol=1e-5)
    assert state.taken.tolist() == [4] * PEERS


def test_parts_of_a_shard_are_a_partition_whatever_its_labels() -> None:
    index = torch.arange(22).view(2, 11)
    shard = Shard(index, torch.tensor([11, 6]), labels=index * 10)
    for row, size in ((0, 11), (1, 6)):
        found = []
        for part in range(4):
            some = dealt(shard, torch.full((2,), part), 4)
            kept = some.index[row, : int(some.size[row])]
            assert some.labels is not None
            assert some.labels[row, : len(kept)].tolist() == (kept * 10).tolist()
            found += kept.tolist()
        assert sorted(found) == index[row, :size].tolist()
    each = dealt(shard, torch.tensor([1, 2]), 4)
    assert each.index[0, :3].tolist() == [1, 5, 9]
    assert each.index[1, : int(each.size[1])].tolist() == [13]


@pytest.mark.parametrize("mechanism", ["fresh", "tree"])
def test_noise_has_its_size_and_is_another_one_for_each_peer_and_step(mechanism: str) -> None:
    task = digits(hidden=(64,))
    strategy = PrivateSteps(
        lr=1.0, sampling=0.5, clip=0.2, noise=3.0, draws="parts", mechanism=mechanism, records=100
    )
    params = task.init(keyed.key_of(1)).expand(PEERS, -1).clone()
    state, quiet = strategy.init(params), replace(strategy, noise=0.0)
    noises = []
    for round in range(2):
        step = step_of(task, round)
        alone, _ = quiet.local(replace(state, sums=quiet.init(params).sums), step)
        state, _ = strategy.local(state, step)
        noises.append(((alone.params - state.params) * 0.5 * 100).double())
    if mechanism == "tree":
        # The second step's noise takes the first node out and puts that over both terms in.
        noises = [noises[0], noises[1] + noises[0]]
    whole = torch.cat(noises)
    assert float(whole.std()) == pytest.approx(0.6, rel=0.02)
    across = torch.corrcoef(whole)
    assert (across - torch.eye(len(across))).abs().max() < 0.2


def test_a_record_moves_a_step_by_a_clip_at_most_and_no_other_record() -> None:
    task = digits()
    strategy = PrivateSteps(lr=1.0, sampling=0.5, clip=0.3, noise=1.0, records=20)
    params = task.init(keyed.key_of(2)).expand(PEERS, -1).clone()
    step = step_of(task, 0)
    fewer = replace(step, shard=replace(step.shard, size=step.shard.size - 1))
    with_it, _ = strategy.local(strategy.init(params), step)
    without, _ = strategy.local(strategy.init(params), fewer)
    moved = (with_it.params - without.params).norm(dim=-1) * (0.5 * 20)
    assert (moved <= 0.3 * (1 + 1e-4)).all()
    # It was drawn by some of the peers.
    assert 0 < int((moved > 0.1).sum()) < PEERS
    last = [int(step.shard.index[p, int(step.shard.size[p]) - 1]) for p in range(PEERS)]
    for peer in range(PEERS):
        if moved[peer] > 0.1:
            expected = one_by_one(task, params[peer], [last[peer]], 0.3).norm()
            assert float(moved[peer]) == pytest.approx(float(expected), rel=1e-3)


def test_a_peer_without_records_stays_where_it_is() -> None:
    task = digits(holders=(0, 1))
    strategy = PrivateSteps(noise=1.0)
    params = task.init(keyed.key_of(2)).expand(PEERS, -1).clone()
    state, parcel = strategy.local(strategy.init(params), step_of(task, 0))
    assert parcel.vector[2:].equal(params[2:])
    assert not parcel.vector[:2].equal(params[:2])
    heard = Heard(params, torch.full((PEERS,), PEERS))
    assert strategy.apply(state, heard, step_of(task, 0)).taken.tolist() == [1] * PEERS


@pytest.mark.parametrize(
    "settings",
    [{"steps": 2}, {"draws": "parts", "sampling": 0.25},
     {"draws": "parts", "sampling": 0.25, "mechanism": "tree", "records": 24}],
)  # fmt: skip
def test_engines_agree(settings: dict) -> None:
    task = digits()
    strategy = PrivateSteps(lr=0.2, noise=0.3, **settings)
    exchange = Gossip(find("topology", "ring")(PEERS))
    codec = find("transform", "identity")().bind(task.spec)
    method = Method(strategy, task, exchange, Mean(), codec, 4, 5.0, seed=2)
    check_strategy(method, Network(PEERS, links=Links(latency_s=0.05), device=Device(1e8)))


def test_what_is_claimed_is_what_is_counted() -> None:
    assert PrivateSteps(sampling=0.1, noise=2.0, steps=3).ledger(10) == Ledger().after(
        GaussianRelease(2.0, 0.1), 30
    )
    parts = PrivateSteps(sampling=0.25, noise=2.0, draws="parts")
    once = GaussianRelease(2.0, draws="parts")
    assert [parts.ledger(rounds) for rounds in (0, 1, 4, 5, 8)] == [
        Ledger().after(once, times) for times in (0, 1, 1, 2, 2)
    ]
    tree = replace(parts, mechanism="tree")
    assert tree.ledger(11) == Ledger().after(TreeRelease(2.0, 4), 2).after(TreeRelease(2.0, 3), 1)
    # A tree as long as the pass costs log2(parts) + 1 times the divergence of fresh noise.
    ratio = tree.ledger(4).curve([3.0])[0] / parts.ledger(4).curve([3.0])[0]
    assert ratio == pytest.approx(3.0)
    assert PrivateSteps(noise=0.0).epsilon(5, 1e-5) == math.inf
    assert PrivateSteps().epsilon(0, 1e-5) == 0.0
    for strategy in (PrivateSteps(), parts, tree):
        noisy = strategy.calibrated(3.0, 1e-5, rounds=40)
        assert noisy.epsilon(40, 1e-5) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize(
    "settings", [{"steps": 3}, {"draws": "parts", "sampling": 0.25},
                 {"draws": "parts", "sampling": 0.25, "mechanism": "tree"}],
)  # fmt: skip
def test_no_step_exceeds_the_budget(settings: dict) -> None:
    """The last step within it is made, the next one is not, whatever the peers do or lose."""
    task = digits(hidden=())
    free = PrivateSteps(noise=3.0, records=20, **settings)
    # Enough for two rounds and a bit.
    strategy = replace(free, budget=free.epsilon(8, 1e-4) * 0.999, delta=1e-4)
    allowed = strategy.allowed
    assert 0 < allowed < 8 * strategy.steps
    state = strategy.init(task.init(keyed.key_of(1)).expand(PEERS, -1).clone())
    moved = []
    for round in range(9):
        before = state.params
        # A peer that lost its state has spent what it spent.
        state = replace(state, taken=state.taken * 0) if round == 4 and free.steps > 1 else state
        state, parcel = strategy.local(state, step_of(task, round))
        assert parcel.vector.equal(state.params)
        moved.append(not before.equal(state.params))
    worked = -(-allowed // strategy.steps)
    assert moved == [True] * worked + [False] * (9 - worked)
    assert strategy.epsilon(1000, 1e-4) <= strategy.budget
    assert free._spent(allowed + 1).epsilon(1e-4) > strategy.budget
    assert replace(strategy, noise=0.0).allowed == 0
    assert replace(strategy, budget=None).allowed > 10**9
    # Of noise that is asked for the budget is no part.
    assert strategy.calibrated(3.0, 1e-5, rounds=1).epsilon(1, 1e-5) <= 3.0


def test_it_learns_at_a_price() -> None:
    """More noise, less accuracy; averaging with others gives some of it back."""
    task = Digits(peers=PEERS, hidden=())

    def accuracy(noise: float, mix: bool) -> float:
        strategy = PrivateSteps(lr=2.0, sampling=0.1, noise=noise)
        state = strategy.init(task.init(keyed.key_of(0)).expand(PEERS, -1).clone())
        for round in range(40):
            step = step_of(task, round)
            state, parcel = strategy.local(state, step)
            if mix:
                mean = parcel.vector.mean(0).expand(PEERS, -1)
                state = strategy.apply(state, Heard(mean, torch.full((PEERS,), PEERS)), step)
        return float(task.evaluate(state.params)["accuracy"].mean())

    free, alone, together = accuracy(0.0, True), accuracy(1.5, False), accuracy(1.5, True)
    assert free > 0.85
    assert free > together > alone + 0.02


def test_samples_of_a_masked_batch_are_never_seen() -> None:
    """What `clipped_sum` leaves to the task: records beyond the size have no part in the sum."""
    task = digits()
    own = task.shard(0)
    batch = Batch(task.x[own.index], task.y[own.index], torch.arange(own.index.shape[0]) < 3)
    params = task.init(keyed.key_of(3))
    found = task.clipped_grad_sum(params, batch, 0.4)
    expected = one_by_one(task, params, own.index[:3].tolist(), 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": 0.0}, "sampling=0.0"),
        ({"sampling": 0.3, "draws": "parts"}, "need 1 over a whole number"),
        ({"draws": "epochs"}, "draws='epochs'"),
        ({"mechanism": "laplace"}, "mechanism='laplace'"),
        ({"mechanism": "tree"}, "a tree's accountant counts"),
        ({"steps": 0}, "steps=0; need at least 1"),
        ({"clip": 0.0}, "clip=0.0; need a finite norm above 0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"records": 0}, "records=0"),
        ({"budget": -1.0}, "budget=-1.0; need at least 0"),
        ({"delta": 1.0}, "delta=1.0; need a chance"),
        ({"secrets": "seed"}, "secrets='seed'; need 'run'"),
    ],
)
def test_errors_name_the_argument(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrivateSteps(**settings)
    with pytest.raises(UsageError, match="rounds=-1"):
        PrivateSteps().ledger(-1)
