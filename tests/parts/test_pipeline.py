"""Pipelines: stages rebuilt from neighbours, orders, traces, costs, and a trainer against torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from shoal.base.errors import UsageError
from shoal.parts.models.transformer import Transformer
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.pipeline import _work as work
from shoal.parts.pipeline.base import StageState, Unrecoverable
from shoal.parts.pipeline.check_free import RULES, CheckFree, recover_stage
from shoal.parts.pipeline.cost_model import CostModel, Failure, Moment, Replay, drive
from shoal.parts.pipeline.failure_trace import FailureTrace
from shoal.parts.pipeline.plan import Plan
from shoal.parts.pipeline.staged_model import StagedModel
from shoal.parts.pipeline.swap_schedule import SwapSchedule
from shoal.parts.pipeline.topic_text import TopicText
from shoal.parts.pipeline.trainer import Trainer
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread

NUMBERS = st.floats(-1e6, 1e6, width=32)
WEIGHTS = st.floats(0.0, 1e6, exclude_min=True)
SHAPE = Transformer(width=8, layers=4, heads=2, positions="learned", tied=True)
TEXT = TopicText(length=6, held_out=3)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


def plan(swaps: bool = False, stages: int = 4, **recovery: Any) -> Plan:
    module = SHAPE.build((TEXT.length,), TEXT.vocabulary)
    return Plan(
        StagedModel(module, stages), TEXT, SwapSchedule(stages, 2, swaps),
        AdamW(2e-3, weight_decay=0.0), CheckFree(**recovery), batch_size=2,
    )  # fmt: skip


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def same_states(a: list[StageState], b: list[StageState]) -> bool:
    return all(
        same(x.params, y.params)
        and same(x.optimizer.mean, y.optimizer.mean)
        and same(x.optimizer.square, y.optimizer.square)
        and (float(x.optimizer.count), x.scale) == (float(y.optimizer.count), y.scale)
        for x, y in zip(a, b, strict=True)
    )


# A stage from its neighbours.


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8), WEIGHTS, WEIGHTS)
def test_a_rebuilt_stage_lies_between_its_neighbours(
    pairs: list[tuple[float, float]], first: float, second: float
) -> None:
    a, b = (torch.tensor(column) for column in zip(*pairs, strict=True))
    mixed = recover_stage({"w": a}, {"w": b}, (first, second))["w"]
    assert ((torch.minimum(a, b) <= mixed) & (mixed <= torch.maximum(a, b))).all()
    assert same(recover_stage({"w": a}, {"w": a.clone()}, (first, second))["w"] + 0.0, a + 0.0)
    middle = recover_stage({"w": a}, {"w": b}, (first, first))["w"]
    assert torch.equal(middle, ((a.double() + b.double()) / 2).float())


@given(st.floats(0, 1e30), st.floats(0, 1e30), st.floats(0, 4), st.sampled_from(RULES))
def test_weights_sum_to_one(before: float, behind: float, power: float, rule: str) -> None:
    first, second = CheckFree(rule=rule, power=power).weights(before, behind)
    assert first + second == pytest.approx(1.0, abs=1e-12)
    assert min(first, second) >= 0
    if rule == "weighted" and power > 0 and before > behind > 0:
        assert first >= second
    if before == behind:
        assert (first, second) == (0.5, 0.5)


def test_weights_are_squared_norms_by_default_and_any_power_by_choice() -> None:
    assert CheckFree().weights(9.0, 1.0) == pytest.approx((0.9, 0.1))
    assert CheckFree(power=1.0).weights(9.0, 1.0) == pytest.approx((0.75, 0.25))
    assert CheckFree(rule="uniform").weights(9.0, 1.0) == (0.5, 0.5)
    assert CheckFree().weights(0.0, 0.0) == (0.5, 0.5)


def test_neighbours_of_other_shapes_are_refused() -> None:
    one, two = {"w": torch.zeros(2)}, {"w": torch.zeros(3)}
    with pytest.raises(UsageError, match=r"'w' is \(2,\).*\(3,\).*checkpoint"):
        recover_stage(one, two, (1.0, 1.0))
    with pytest.raises(UsageError, match="only one neighbour has 'v'"):
        recover_stage(one, {"w": torch.zeros(2), "v": torch.zeros(1)}, (1.0, 1.0))
    for weights in ((0.0, 0.0), (-1.0, 2.0), (math.nan, 1.0), (math.inf, 1.0)):
        with pytest.raises(UsageError, match="weights="):
            recover_stage(one, one, weights)


@pytest.mark.parametrize(
    ("recovery", "lost", "says"),
    [
        (CheckFree(), [1], "stage 1 of 6 .* one neighbour.*keep_every"),
        (CheckFree(), [6], "stage 6 of 6 .* one neighbour.*plus=True"),
        (CheckFree(), [0], "stage 0 .*nobody holds a copy.*keep_every"),
        (CheckFree(), [3, 4], "stage 3 is lost together with stage 4.*keep_every"),
        (CheckFree(plus=True), [0, 1, 6], "stage 0 is lost together"),
        (CheckFree(plus=True), [5, 6], "stage 5 is lost together with stage 6"),
        (CheckFree(rule="copy"), [2, 3], "stage 3 is lost together with stage 2"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(recovery: CheckFree, lost: list[int], says: str) -> None:
    with pytest.raises(Unrecoverable, match=says):
        recovery.check(lost, 6)


@given(st.booleans(), st.sampled_from(RULES), st.integers(4, 12), st.data())
def test_a_stage_is_rebuilt_from_others_next_to_it(
    plus: bool, rule: str, stages: int, data: st.DataObject
) -> None:
    recovery = CheckFree(plus, rule)
    stage = data.draw(st.integers(1 + (not plus), stages - (not plus)))
    sources = recovery.sources(stage, stages)
    assert stage not in sources
    assert all(1 <= source <= stages and abs(source - stage) == 1 for source in sources)
    if plus and stage in (1, 2, stages - 1, stages):
        assert sources == (SwapSchedule(stages, 2, True).partner(stage),)
    # Not one of the others than those next to it may matter.
    recovery.check([stage], stages)


def test_plus_holds_part_0_twice_and_needs_one_of_them() -> None:
    recovery = CheckFree(plus=True)
    assert recovery.holders(6) == (1, 6)
    recovery.check([0, 6], 6)
    recovery.check([0, 3], 6)
    assert CheckFree(plus=True, pairs=False).sources(2, 6) == (1, 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CheckFree(rule="mean"), "rule='mean'"),
        (lambda: CheckFree(power=-1.0), "power=-1.0"),
        (lambda: CheckFree(lr_boost=0.0), "lr_boost=0.0"),
        (lambda: SwapSchedule(3, 2, True), "stages=3.*4 stages"),
        (lambda: SwapSchedule(4, 1, True), "micro=1"),
        (lambda: SwapSchedule(0), "stages=0"),
        (lambda: FailureTrace(4, ((1, 5),)), "stage 5 in iteration 1"),
        (lambda: FailureTrace(4, ((1, 2), (1, 3))), "stages 2 and 3 fail together in iteration 1"),
        (lambda: FailureTrace.bernoulli(1.5, stages=4, iterations=1, seed=0), "rate=1.5"),
        (lambda: FailureTrace.per_iteration(1.0, 9.0), "hourly=1.0"),
        (lambda: CostModel(every=0), "every=0"),
        (lambda: CostModel(stall=-1.0), "stall=-1.0"),
        (lambda: TopicText(length=1), "length=1"),
        (lambda: StagedModel(SHAPE.build((6,), 9), 3), "4 blocks in 3 stages"),
        (lambda: StagedModel(torch.nn.Linear(2, 2), 1), "Linear has no 'embedding'"),
        (lambda: plan(plus=True), "plus without swaps"),
        (lambda: replace(plan(), batch_size=0), "batch_size=0"),
        (lambda: replace(plan(), schedule=SwapSchedule(3)), "4 stages and a schedule for 3"),
    ],
)
def test_bad_settings_say_what_to_do(make: Callable[[], object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


# Orders and traces.


@given(st.integers(4, 20), st.integers(2, 9))
def test_every_stage_sees_every_microbatch_once_in_the_stated_place(stages: int, m: int) -> None:
    schedule = SwapSchedule(stages, m, swaps=True)
    normal = tuple(range(1, stages + 1))
    for micro in range(m + 2):
        order = schedule.order(micro)
        assert sorted(order) == list(normal)
        if not schedule.swapped(micro):
            assert order == normal
            continue
        assert order[:2] == (2, 1)
        assert order[-2:] == (stages, stages - 1)
        assert order[2:-2] == normal[2:-2]
    assert sum(schedule.swapped(micro) for micro in range(m)) == m // 2
    # What is evaluated takes the normal order.
    assert not schedule.swapped(m + 1)


@given(
    st.floats(0, 1), st.integers(1, 8), st.integers(0, 60), st.integers(0, 99), st.integers(0, 9)
)
def test_a_drawn_trace_keeps_to_the_failure_model(
    rate: float, stages: int, iterations: int, seed: int, first: int
) -> None:
    def draw(length: int) -> FailureTrace:
        return FailureTrace.bernoulli(
            rate, stages=stages, iterations=length, seed=seed, first=first
        )

    trace = draw(iterations)
    for iteration in range(iterations):
        lost = trace.at(iteration)
        assert all(b - a > 1 for a, b in itertools.pairwise(lost))
        assert not lost or iteration >= first
    longer = [each for each in draw(iterations + 5).failures if each[0] < iterations]
    assert tuple(longer) == trace.failures
    if rate == 1:
        assert trace.at(first) in ((), tuple(range(0, stages + 1, 2)))


def test_a_drawn_trace_has_its_rate_and_fewer_stages_the_same_failures() -> None:
    def draw(among: range | None) -> FailureTrace:
        return FailureTrace.bernoulli(0.01, stages=9, iterations=5000, seed=4, among=among)

    everywhere, middle = draw(None), draw(range(2, 9))
    expected = 5000 * 10 * 0.01
    assert abs(len(everywhere.failures) - expected) < 5 * expected**0.5
    # A neighbour drawn in the same iteration may have spared one, in one of a hundred cases.
    missing = set(everywhere.failures) - set(middle.failures)
    assert sum(2 <= stage < 9 for _, stage in missing) == 0
    assert {stage for _, stage in middle.failures} == set(range(2, 9))


def test_a_trace_survives_a_file(tmp_path: Path) -> None:
    trace = FailureTrace(6, ((4, 2), (1, 6)))
    trace.save(tmp_path / "trace.json")
    assert FailureTrace.load(tmp_path / "trace.json") == trace
    (tmp_path / "bad.json").write_text('{"failures": 3}')
    for name in ("bad.json", "none.json"):
        with pytest.raises(UsageError, match=r"need stages and a list|none.json"):
            FailureTrace.load(tmp_path / name)


# The trainer.


def test_training_in_stages_is_training() -> None:
    """Against one module, torch's own Adam and one backward pass over all microbatches."""
    trainer = Trainer(plan(), seed=5)
    module: Any = SHAPE.build((TEXT.length,), TEXT.vocabulary)
    outer = trainer.plan.model.spec(0).views(trainer.parts[0].params)
    state = {name: value.clone() for name, value in outer.items()}
    for stage in range(1, 5):
        views = trainer.plan.model.spec(stage).views(trainer.parts[stage].params)
        for name, value in views.items():
            state[name.replace("blocks.0", f"blocks.{stage - 1}")] = value.clone()
    state["head.weight"] = state["embedding.weight"]
    module.load_state_dict(state)
    adam = torch.optim.Adam(module.parameters(), lr=2e-3)
    for step in range(4):
        keys = [keyed.key_of(5, "peer", 0, "batch", step, micro) for micro in range(2)]
        batches = [trainer.plan.batch(key) for key in keys]
        losses = [
            functional.cross_entropy(module(x).flatten(0, 1), y.flatten()) for x, y in batches
        ]
        loss = torch.stack(losses).mean()
        adam.zero_grad()
        loss.backward()
        norms = [
            sum(float(p.grad.double().square().sum()) for p in block.parameters())
            for block in module.blocks
        ]
        adam.step()
        assert trainer.iterate() == pytest.approx(float(loss.detach()), rel=1e-5)
        assert [s.square for s in trainer.parts[1:]] == pytest.approx(norms, rel=1e-4)
    views = trainer.plan.model.spec(3).views(trainer.parts[3].params)
    theirs = dict(module.blocks[2].named_parameters())
    for name, value in views.items():
        assert torch.allclose(value, theirs[name.removeprefix("blocks.0.")], atol=2e-5)
    windows = TEXT.validation
    whole = functional.cross_entropy(
        module(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
    )
    assert trainer.loss() == pytest.approx(float(whole.detach()), rel=1e-4)


def test_swaps_change_the_course_and_recorded_norms_are_those_before_clipping() -> None:
    plain, swapped = Trainer(plan(), 1), Trainer(plan(swaps=True), 1)
    clipped = Trainer(replace(plan(), clip=1e-3), 1)
    for trainer in (plain, swapped, clipped):
        trainer.iterate()
    assert not same(plain.parts[1].params, swapped.parts[1].params)
    assert [s.square for s in clipped.parts] == [s.square for s in plain.parts]
    gradient = torch.tensor([3.0, 4.0])
    state = AdamW().init(gradient)
    _, moved, square = work.updated(gradient, state, (gradient,), AdamW(), 1.0, 1.0)
    assert float(square) == 25.0
    assert torch.allclose(moved.mean, 0.1 * gradient / 5)


def record(
    training: Any, method: str, trace: FailureTrace, iterations: int, every: int = 3
) -> tuple[list[tuple[int, float, float]], list[Failure]]:
    moments: list[tuple[int, float, float]] = []
    failures: list[Failure] = []

    def moment(now: Moment) -> None:
        moments.append((now.done, now.time_s, training.loss()))

    drive(training, method, trace, iterations, CostModel(every=every), moment=moment,
          failure=failures.append)  # fmt: skip
    return moments, failures


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict[int, float], list[StageState]]:
    """Losses and last states of seven iterations in which nothing fails."""
    with one_thread():
        trainer = Trainer(plan(), 2)
        losses = {0: trainer.loss()}
        while trainer.done < 7:
            trainer.iterate()
            losses[trainer.done] = trainer.loss()
    return losses, trainer.parts


def test_without_failures_checkfree_is_plain_training(undisturbed: Any) -> None:
    losses, parts = undisturbed
    for rule in RULES:
        trainer = Trainer(plan(rule=rule), 2)
        moments, failures = record(trainer, "check_free", FailureTrace(4), 7)
        assert [loss for _, _, loss in moments] == [losses[n] for n in range(1, 8)]
        assert [time_s for _, time_s, _ in moments] == [float(n) for n in range(1, 8)]
        assert not failures
        assert same_states(trainer.parts, parts)


TRACES = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 4)), max_size=4).map(
    lambda all_: FailureTrace(4, tuple({t: (t, s) for t, s in all_}.values()))
)


@settings(max_examples=8, deadline=None)
@given(TRACES, st.integers(1, 4))
def test_checkpointing_repeats_what_was_done_since_and_ends_where_it_would(
    undisturbed: Any, trace: FailureTrace, every: int
) -> None:
    losses, parts = undisturbed
    trainer = Trainer(plan(), 2)
    moments, failures = record(trainer, "checkpoint", trace, 7, every)
    # Its replay is the same.
    assert (moments, failures) == record(Replay(losses), "checkpoint", trace, 7, every)
    assert same_states(trainer.parts, parts)
    # Counted by hand: a failed iteration comes to nothing, and so does what followed a checkpoint.
    done = executed = saves = 0
    repeated = []
    while done < 7:
        if trace.at(executed):
            repeated.append(done % every)
            done -= done % every
        else:
            done += 1
            saves += done % every == 0 and done < 7
        executed += 1
    assert [failure.repeated for failure in failures] == repeated
    units = executed + 2.0 * len(repeated) + 0.5 * saves
    assert moments[-1][1] == pytest.approx(units + 0.5 * (7 % every == 0))


@settings(max_examples=8, deadline=None)
@given(TRACES)
def test_redundant_computation_never_leaves_the_course(
    undisturbed: Any, trace: FailureTrace
) -> None:
    losses, parts = undisturbed
    trainer = Trainer(plan(), 2, shadows=True)
    moments, _ = record(trainer, "redundant", trace, 7)
    assert moments == record(Replay(losses), "redundant", trace, 7)[0]
    assert moments[-1][1] == pytest.approx(7 * 1.65)
    assert same_states(trainer.parts, parts)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(RULES), st.integers(2, 3), st.integers(0, 2))
def test_only_the_failed_stage_is_touched(rule: str, stage: int, iterations: int) -> None:
    trainer = Trainer(plan(rule=rule), 3)
    for _ in range(iterations):
        trainer.iterate()
    before = list(trainer.parts)
    trainer.lose([stage])
    after = trainer.parts
    for part in {0, 1, 2, 3, 4} - {stage}:
        assert after[part] is before[part]
    rebuilt = after[stage]
    assert rebuilt.scale == 1.1
    assert float(rebuilt.optimizer.count) == 0
    assert not rebuilt.optimizer.mean.any()
    if rule == "copy":
        assert same(rebuilt.params, before[stage - 1].params)
    if rule == "zero":
        x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(work.forwarded(rebuilt.params, x, trainer.plan.model), x)
    if rule == "random":
        assert not same(rebuilt.params, before[stage].params)
    if rule in ("weighted", "uniform"):
        weights = trainer.plan.recovery.weights(before[stage - 1].square, before[stage + 1].square)
        one, other = before[stage - 1].params, before[stage + 1].params
        assert torch.allclose(rebuilt.params, weights[0] * one + weights[1] * other, atol=1e-6)
    # The optimiser's first step after it is as large as any first step of Adam, and 1.1 times.
    trainer.iterate()
    moved = (trainer.parts[stage].params - rebuilt.params).abs().max()
    assert float(moved) == pytest.approx(1.1 * 2e-3, rel=1e-3)


def test_part_0_comes_back_bit_for_bit_and_ends_from_their_partners() -> None:
    trainer = Trainer(plan(swaps=True, plus=True), 3)
    trainer.iterate()
    before = list(trainer.parts)
    trainer.lose([0])
    assert same(trainer.parts[0].params, before[0].params)
    assert float(trainer.parts[0].optimizer.count) == 0
    for stage, partner in ((1, 2), (2, 1), (3, 4), (4, 3)):
        trainer.parts = list(before)
        trainer.lose([stage])
        assert same(trainer.parts[stage].params, before[partner].params)
    with pytest.raises(Unrecoverable, match="stage 1"):
        Trainer(plan(), 3).lose([1])


# Costs.


def test_expected_iterations_of_checkpointing_are_those_of_the_formula() -> None:
    for probability, expected in ((0.028, 112), (0.024, 99), (0.016, 77), (0.008, 62)):
        assert round(CostModel().expected_iterations(probability)) == expected
    assert CostModel().expected_iterations(0.0) == 50
    trace = FailureTrace.bernoulli(0.024, stages=1, iterations=60_000, seed=3, among=(1,))
    last: list[Moment] = []
    drive(Replay({}), "checkpoint", trace, 20_000, CostModel(stall=0.0, restore=0.0),
          moment=last.append, failure=lambda _: None)  # fmt: skip
    assert last[-1].time_s / 400 == pytest.approx(99, rel=0.05)


def test_replays_and_methods_that_do_not_go_together_are_refused() -> None:
    trace = FailureTrace(4, ((0, 2),))
    nothing: Any = lambda _: None  # noqa: E731
    with pytest.raises(UsageError, match="leaves the course"):
        drive(Replay({}), "check_free", trace, 2, CostModel(), moment=nothing, failure=nothing)
    with pytest.raises(UsageError, match="method='bamboo'"):
        drive(Replay({}), "bamboo", trace, 2, CostModel(), moment=nothing, failure=nothing)
    with pytest.raises(UsageError, match="no loss after 0 iterations"):
        Replay({1: 2.0}).loss()


def test_windows_are_drawn_by_key_from_the_text_in_front_of_the_validation() -> None:
    text = TopicText(length=6, held_out=5)
    batch = text.batch(keyed.key_of(1, "a"), 4)
    assert torch.equal(batch, text.batch(keyed.key_of(1, "a"), 4))
    assert batch.shape == (4, 7)
    assert not torch.equal(batch, text.batch(keyed.key_of(1, "b"), 4))
    assert int(text.validation.max()) < text.vocabulary
    assert len({tuple(row) for row in text.validation.tolist()}) == 5
