"""Shared noise, two-point estimates, numbers in a byte, and the log: closed forms and bits."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import DecodeError, UsageError
from shoal.parts.tasks.digits import Digits
from shoal.parts.tasks.rotated_digits import RotatedDigits, turned
from shoal.parts.zeroth_order import noise as noise_module
from shoal.parts.zeroth_order.machine import Machine
from shoal.parts.zeroth_order.noise import descend_along, noise, noise_rows, walk_in_place
from shoal.parts.zeroth_order.replay import Entry, Log, Rule, apply, pack, unpack
from shoal.parts.zeroth_order.scalars import FourBytes, OneByte
from shoal.parts.zeroth_order.spsa import SPSA, slope_in_place
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny matrices: more threads only wait for each other."""
    with one_thread():
        yield


words = st.integers(-(2**63), 2**63 - 1)


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def keys(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# Noise.


@given(words, st.integers(0, 500), st.integers(1, 300))
def test_any_part_of_noise_is_the_same_in_any_order(key: int, start: int, count: int) -> None:
    whole = noise(keys(key, key + 1 if key < 0 else key - 1), start + count + 7)
    part = noise(keys(key), count, start)
    assert bits(part[0]) == bits(whole[0, start : start + count])
    assert bits(noise_rows([key], count)[0]) == bits(whole[0, :count])


def test_noise_longer_than_a_piece_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise(keys(3), 1000)
    monkeypatch.setattr(noise_module, "PIECE", 64)
    assert bits(noise(keys(3), 1000)) == bits(whole)
    assert bits(noise(keys(3), 900, start=100)) == bits(whole[:, 100:])


def test_distinct_keys_are_uncorrelated_and_normal() -> None:
    dim = 4096
    rule = Rule(run=1, lr=1.0, samples=4)
    entries = [Entry((0, 1, 2), (0, 1, 2), bytes(12)) for _ in range(4)]
    found = torch.cat([rule.steps(t, entry)[0] for t, entry in enumerate(entries)])
    assert len(set(found.tolist())) == 48
    z = noise(found, dim, dtype=torch.float64)
    correlation = (z @ z.T / dim).fill_diagonal_(0.0)
    assert float(correlation.abs().max()) < 5 / math.sqrt(dim)
    everything = z.flatten()
    assert abs(float(everything.mean())) < 5 / math.sqrt(len(everything))
    assert abs(float(everything.var()) - 1.0) < 0.02
    assert abs(float((everything**4).mean()) - 3.0) < 0.1


def test_noise_that_is_kept_is_bounded_and_shared_by_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recent = noise_module._Recent()
    monkeypatch.setattr(noise_module, "_recent", recent)
    monkeypatch.setattr(noise_module, "KEPT_BYTES", 4000)
    wrong: list[int] = []

    def work(first: int) -> None:
        own = [[key, key + 1] for key in range(first, first + 40)]
        wrong.extend(
            pair[0] for pair in own if bits(noise_rows(pair, 100)) != bits(noise(keys(*pair), 100))
        )

    threads = [threading.Thread(target=work, args=(n * 7,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recent._bytes == sum(row.nbytes for row in recent._rows.values()) <= 4000


@given(
    st.integers(1, 70), st.integers(1, 6), st.integers(1, 4), st.integers(0, 6), st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_steps_are_the_same_bits_however_they_are_cut(
    dim: int, count: int, rows: int, cut: int, alike: bool, dtype: torch.dtype
) -> None:
    """Stacked or one by one, in one call or in two, in one vector or in several tensors."""
    draw = torch.Generator().manual_seed(dim * 31 + count)
    params = torch.randn(1 if alike else rows, dim, generator=draw, dtype=dtype).expand(rows, dim)
    many = torch.randint(0, 5, (1 if alike else rows, count), generator=draw).expand(rows, count)
    scales = torch.randn(1 if alike else rows, count, generator=draw).expand(rows, count)
    together = descend_along(params, many, scales)
    assert together.shape == params.shape
    cut = min(cut, count)
    for row in range(rows):
        alone = descend_along(params[row], many[row], scales[row])
        assert bits(together[row]) == bits(alone)
        half = descend_along(params[row], many[row, :cut], scales[row, :cut])
        assert bits(descend_along(half, many[row, cut:], scales[row, cut:])) == bits(alone)
        pieces = [piece.clone() for piece in params[row].split((dim + 1) // 2)]
        walk_in_place(pieces, many[row].tolist(), scales[row].tolist())
        assert bits(torch.cat(pieces)) == bits(alone)


def test_steps_in_pieces_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    params, many, scales = torch.randn(2, 100), keys(1, 2, 3), torch.tensor([0.1, -0.2, 0.3])
    apart = many + torch.tensor([[0], [7]])
    whole, other = descend_along(params, many, scales), descend_along(params, apart, scales)
    monkeypatch.setattr(noise_module, "PIECE", 16)
    assert bits(descend_along(params, many, scales)) == bits(whole)
    assert bits(descend_along(params, apart, scales)) == bits(other)


def test_a_step_is_the_formula() -> None:
    params, many, scales = torch.randn(40).double(), keys(5, 9), torch.tensor([0.25, -2.0])
    first, second = noise(keys(5, 9), 40).double()
    expected = params - 0.25 * first + 2.0 * second
    torch.testing.assert_close(descend_along(params, many, scales), expected, rtol=1e-6, atol=1e-6)


def test_wrong_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="2 keys and 1 scales"):
        descend_along(torch.zeros(3), keys(1, 2), torch.ones(1))
    with pytest.raises(UsageError, match="1 keys and 2 scales"):
        walk_in_place([torch.zeros(3)], [1], [1.0, 2.0])
    with pytest.raises(UsageError, match="not contiguous"):
        walk_in_place([torch.zeros(3, 2).T], [1], [1.0])


# Estimates.


class Linear:
    """loss = c x, whatever the batch: a task as far as an estimate needs one."""

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def batch(self, shard: Any, key: Tensor, size: int) -> Any:
        return None

    def loss(self, params: Tensor, batch: Any) -> Tensor:
        return (params * self.c).sum(-1)


@given(st.integers(1, 200), st.floats(1e-4, 10.0), words)
def test_on_a_linear_loss_the_estimate_is_the_slope(dim: int, eps: float, key: int) -> None:
    draw = torch.Generator().manual_seed(dim)
    c = torch.randn(dim, generator=draw, dtype=torch.float64)
    x = torch.randn(2, dim, generator=draw, dtype=torch.float64)
    own = keys(key, ~key)
    found = SPSA(eps=eps, samples=2).estimate(Linear(c), x, None, own)  # type: ignore[arg-type]
    z = noise(keyed.fold(own.unsqueeze(-1), torch.arange(2)), dim, dtype=torch.float64)
    expected = (z * c).sum(-1)
    # Two sums of about |x| |c| whose difference is divided by 2 eps.
    slack = 1e-12 * (1.0 + float(x.norm() * c.norm()) / eps)
    assert float((found - expected).abs().max()) <= slack


def test_the_mean_of_estimates_is_the_gradient() -> None:
    """E[g z] = c."""
    c = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    own = torch.arange(20_000)
    x = torch.zeros(len(own), 3, dtype=torch.float64)
    found = SPSA(eps=0.1).estimate(Linear(c), x, None, own)[:, 0]  # type: ignore[arg-type]
    z = noise(keyed.fold(own, 0), 3, dtype=torch.float64)
    mean = (found.unsqueeze(-1) * z).mean(0)
    assert float((mean - c).abs().max()) < 5 * float(c.norm()) * math.sqrt(2 / len(own))


def test_stacked_estimates_equal_single_ones() -> None:
    task = Digits(peers=4, hidden=(8,))
    start = task.init(torch.tensor(3)).double()
    own = torch.arange(4)
    spsa = SPSA(samples=3, batch_size=5)
    rows = start + 1e-3 * torch.arange(4).unsqueeze(-1)
    together = spsa.estimate(task, rows, task.shard(own), own)
    assert together.shape == (4, 3)
    for peer in range(4):
        alone = spsa.estimate(task, rows[peer], task.shard(peer), own[peer])
        torch.testing.assert_close(together[peer], alone, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 300), words, st.sampled_from([1e-3, 1e-1, 3.0]))
def test_perturbing_in_place_comes_back(dim: int, key: int, eps: float) -> None:
    """Within a rounding of |x| + eps |z| for each of three steps; exactly with a backup."""
    x = torch.randn(dim, generator=torch.Generator().manual_seed(dim))
    before, z = x.clone(), noise(keys(key), dim)[0]
    slope_in_place(lambda: x.sum(), [x], key, eps)
    reach = before.abs() + eps * z.abs()
    unit = torch.nextafter(reach, torch.tensor(math.inf)) - reach
    assert bool(((x - before).abs() <= 4 * unit).all())
    x = before.clone()
    slope_in_place(lambda: x.sum(), [x], key, eps, backup=True)
    assert bits(x) == bits(before)


def test_in_place_and_in_a_copy_agree() -> None:
    x = torch.randn(60, dtype=torch.float64)
    parts = [x[:13].clone(), x[13:].clone()]
    c = torch.randn(60, dtype=torch.float64)
    found = slope_in_place(lambda: torch.cat(parts) @ c, parts, 11, 1e-3)
    assert found == pytest.approx(float(noise(keys(11), 60, dtype=torch.float64)[0] @ c), rel=1e-9)


@pytest.mark.parametrize("eps", [0.0, -1e-3, math.nan, math.inf])
def test_a_perturbation_must_be_positive(eps: float) -> None:
    with pytest.raises(UsageError, match="eps="):
        SPSA(eps=eps)
    with pytest.raises(UsageError, match="eps="):
        slope_in_place(lambda: torch.zeros(()), [torch.zeros(1)], 1, eps)


def test_an_estimate_needs_samples_and_a_batch() -> None:
    with pytest.raises(UsageError, match="samples=0"):
        SPSA(samples=0)
    with pytest.raises(UsageError, match="batch_size=0"):
        SPSA(batch_size=0)


# Numbers in a byte.

LEAST, MOST = math.exp(-74 / 16), math.exp(52 / 16)


@given(st.floats(LEAST, MOST), st.sampled_from([-1.0, 1.0]))
def test_in_range_a_byte_is_within_three_percent(magnitude: float, sign: float) -> None:
    code = OneByte()
    (back,) = code.decode(code.encode([sign * magnitude]))
    assert abs(back / (sign * magnitude) - 1.0) <= math.exp(1 / 32) - 1 + 1e-12
    assert code.saturated([magnitude]) == 0


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=20))
def test_a_byte_keeps_order_and_signs_and_never_wraps(values: list[float]) -> None:
    code = OneByte()
    values = sorted(values)
    back = code.decode(code.encode(values))
    assert (np.diff(back) >= 0).all()
    assert (np.sign(back) == np.sign(values)).all()
    assert (np.abs(back) <= MOST * (1 + 1e-12)).all()
    out = [v for v in values if v and not LEAST * 0.97 < abs(v) < MOST * 1.03]
    assert code.saturated(out) == len(out)


def test_all_codes_come_back_and_what_is_not_finite_is_dropped() -> None:
    code = OneByte()
    every = bytes(range(256))
    # 128 is a zero with a sign, which is never sent.
    assert code.encode(code.decode(every).tolist()) == every[:128] + b"\0" + every[129:]
    assert code.encode([math.nan, math.inf, -math.inf, 0.0, -0.0]) == bytes(5)
    assert code.saturated([math.nan, math.inf, 0.0]) == 0
    assert OneByte(lowest=0).decode(b"\1")[0] == 1.0
    with pytest.raises(UsageError, match="lowest=5000"):
        OneByte(lowest=5000)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5))
def test_four_bytes_are_float32(values: list[float]) -> None:
    code = FourBytes()
    assert code.decode(code.encode(values)).tolist() == values
    assert len(code.encode(values)) == 4 * len(values)


def test_four_bytes_drop_saturate_and_refuse() -> None:
    code = FourBytes()
    assert code.decode(code.encode([math.nan, 1e300])).tolist() == [
        0.0, float(np.finfo(np.float32).max),
    ]  # fmt: skip
    assert code.saturated([1e300, math.inf, 1.0]) == 1
    with pytest.raises(DecodeError, match="3 bytes"):
        code.decode(b"abc")


# The log.


@st.composite
def logs(draw: Any) -> tuple[Rule, list[Entry], tuple[int, ...]]:
    samples = draw(st.integers(1, 3))
    codec = draw(st.sampled_from([OneByte(), FourBytes()]))
    rule = Rule(draw(st.integers(0, 9)), 0.01, samples, codec, draw(st.booleans()))
    founders = tuple(range(draw(st.integers(1, 10))))
    group, entries = founders, []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            group = tuple(sorted(draw(st.sets(st.integers(0, 2000), min_size=1, max_size=12))))
        some = group if draw(st.booleans()) else tuple(m for m in group if draw(st.booleans()))
        numbers = draw(st.lists(st.floats(-5, 5), min_size=len(some) * samples,
                                max_size=len(some) * samples))  # fmt: skip
        entries.append(Entry(group, some, codec.encode(numbers)))
    return rule, entries, founders


@given(logs())
def test_a_log_survives_its_bytes(made: tuple[Rule, list[Entry], tuple[int, ...]]) -> None:
    rule, entries, founders = made
    log = Log(rule, founders, entries=entries)
    number_bytes = rule.samples * rule.codec.width
    assert unpack(log.pack(), founders, number_bytes) == entries
    for start in range(len(entries) + 1):
        rest = unpack(log.pack(start), log.group_before(start), number_bytes)
        assert rest == entries[start:]
    assert log.group == (entries[-1].group if entries else founders)


@given(logs(), st.integers(0, 6))
def test_replay_is_what_was_applied_one_by_one(
    made: tuple[Rule, list[Entry], tuple[int, ...]], cut: int
) -> None:
    rule, entries, founders = made
    start = torch.randn(33, generator=torch.Generator().manual_seed(1))
    params = start
    for iteration, entry in enumerate(entries):
        params = descend_along(params, *rule.steps(iteration, entry))
    assert bits(Log(rule, founders, entries=entries).replay(start)) == bits(params)
    cut = min(cut, len(entries))
    early = Log(rule, founders, entries=entries[:cut]).replay(start)
    late = Log(rule, founders, cut, entries[cut:])
    assert late.end == len(entries)
    assert bits(late.replay(early)) == bits(params)
    assert bits(apply(early, rule, cut, entries[cut:])) == bits(params)


def test_a_step_is_lr_over_n() -> None:
    code = OneByte()
    codes = code.encode([1.0, math.exp(1.0), 0.0, -1.0])
    entry = Entry((3, 8, 9), (3, 9), codes)
    for mean, count in ((True, 4.0), (False, 2.0)):
        rule = Rule(run=5, lr=0.1, samples=2, mean=mean)
        own, scales = rule.steps(7, entry)
        expected = [0.1 / count * g for g in (1.0, math.e, 0.0, -1.0)]
        assert scales.tolist() == pytest.approx(expected)
        machines = rule.machine_keys(7, 10)
        places = [(3, 0), (3, 1), (9, 0), (9, 1)]
        assert own.tolist() == [int(keyed.fold(machines[m], a)) for m, a in places]


def test_an_entry_of_eight_takes_nine_bytes() -> None:
    group = tuple(range(8))
    assert len(Entry(group, group, bytes(8)).pack(group)) == 9
    assert len(Entry(group, group[1:], bytes(7)).pack(group)) == 9
    assert len(Entry(group, group, bytes(8)).pack(())) == 9 + 2 + 16


@pytest.mark.parametrize(
    "data", [b"\x07", b"\x02\x05", b"\x02\x02\x00\x03\x00\x03\x00ab", b"\x00a"]
)
def test_bytes_that_are_no_log_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="log"):
        unpack(data, (0, 1), 1)


def test_entries_and_rules_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="each once"):
        Entry((0, 1), (1, 1), b"ab")
    with pytest.raises(UsageError, match="each once"):
        Entry((1, 0), (), b"")
    with pytest.raises(UsageError, match="not all in group"):
        Entry((0, 1), (2,), b"a")
    with pytest.raises(UsageError, match="3 bytes for 2 machines"):
        Rule(0, 0.1).steps(0, Entry((0, 1), (0, 1), b"abc"))
    with pytest.raises(UsageError, match="lr=0"):
        Rule(0, 0.0)
    with pytest.raises(UsageError, match="samples=0"):
        Rule(0, 0.1, samples=0)
    assert pack([], ()) == b""


# A machine for weights of one's own.


def test_machines_with_data_of_their_own_hold_the_same_bits_and_learn() -> None:
    start = [torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(4)]
    rule = Rule(run=3, lr=0.02, samples=2)
    data = [torch.randn(3, generator=torch.Generator().manual_seed(2 + m)) for m in range(3)]
    machines = [Machine([t.clone() for t in start], rule, m, eps=1e-2) for m in range(3)]

    def loss(machine: int) -> float:
        weight, bias = machines[machine].tensors
        return float((weight @ data[machine] + bias - 1.0).square().mean())

    before = sum(loss(m) for m in range(3))
    for _ in range(150):
        offers = {m: machines[m].offer(lambda _, m=m: torch.tensor(loss(m))) for m in range(3)}
        entries = {machine.apply(offers) for machine in machines}
        assert len(entries) == 1
        assert len({machine.digest() for machine in machines}) == 1
    assert sum(loss(m) for m in range(3)) < 0.5 * before
    kept = machines[0].digest()
    machines[0].refresh(start)
    assert machines[0].digest() == kept
    flat = torch.cat([t.flatten() for t in start])
    expected = torch.cat([t.flatten() for t in machines[0].tensors])
    assert bits(machines[0].log.replay(flat)) == bits(expected)


def test_without_a_copy_weights_drift_and_are_made_anew() -> None:
    start = torch.randn(50, generator=torch.Generator().manual_seed(1))
    rule = Rule(run=3, lr=0.01)
    exact, cheap = (Machine([start.clone()], rule, 0, backup=backup) for backup in (True, False))
    for _ in range(30):
        told = exact.offer(lambda _: exact.tensors[0].square().sum())
        cheap.offer(lambda _: cheap.tensors[0].square().sum())
        for machine in (exact, cheap):
            machine.apply({0: told})
    assert exact.digest() != cheap.digest()
    torch.testing.assert_close(exact.tensors[0], cheap.tensors[0], rtol=1e-4, atol=1e-5)
    cheap.refresh([start])
    assert exact.digest() == cheap.digest()


def test_a_machine_drops_losses_that_are_not_finite() -> None:
    machine = Machine([torch.ones(2)], Rule(run=1, lr=0.1, samples=2), 4)
    told = machine.offer(lambda sample: torch.tensor(math.nan if sample else 1.0))
    assert told[1] == 0
    assert machine.dropped == 1
    with pytest.raises(UsageError, match="one dtype"):
        Machine([torch.ones(1), torch.ones(1).double()], Rule(run=1, lr=0.1), 0)
    with pytest.raises(UsageError, match="eps="):
        Machine([torch.ones(1)], Rule(run=1, lr=0.1), 0, eps=0.0)


# The task.


def test_turned_digits_keep_their_middle_and_turn_back() -> None:
    task = RotatedDigits(peers=3, pretraining=0)
    images = task.x[:20]
    assert torch.equal(turned(images, 0.0), images)
    torch.testing.assert_close(turned(images, 90.0), images.rot90(1, (2, 3)), rtol=1e-4, atol=1e-4)
    assert 0.7 < float(task.x.std()) < 1.0


def test_the_model_knows_upright_digits_and_not_turned_ones() -> None:
    key = keyed.key_of(0, "init")
    upright, turned_ = (RotatedDigits(peers=2, angle=angle) for angle in (0.0, 25.0))
    start = upright.init(key)
    assert torch.equal(start, turned_.init(key))
    assert float(upright.evaluate(start)["accuracy"]) > 0.93
    assert 0.5 <= float(turned_.evaluate(start)["accuracy"]) <= 0.7
    both = upright.init(torch.stack((key, key + 1)))
    torch.testing.assert_close(both[0], start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"angle": 400.0}, {"pretraining": -1}, {"standardise": True}])
def test_tasks_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="task: "):
        RotatedDigits(peers=2, **settings)
