"""Just One Byte: fine-tuning in which machines tell each other one byte per gradient.

A machine measures how steep its loss is along a random direction, from two losses of one batch, and
sends that number as a byte. Everybody can make the direction again from (iteration, machine,
sample), so a byte is a gradient of the whole model. All of a group apply the same bytes in the same
order and hold the same weights, bit for bit; initial weights and the log of bytes are a checkpoint.

Which bytes count in an iteration is agreed on: a sequencer orders what it has from most of the
group, and any member takes its place when it dies. Machines come and go meanwhile; a newcomer gets
the log, or the weights where these are less. The same text runs in virtual time and on sockets.

Zelikman et al. 2023 (arXiv 2306.10015); Malladi et al. 2023, algorithm 1 (arXiv 2305.17333).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import Leaving, UsageError
from shoal.base.limits import check_positive
from shoal.kernel.peer import Cost, Peer
from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most
from shoal.parts.transform.identity import Identity
from shoal.parts.zeroth_order.replay import Rule
from shoal.parts.zeroth_order.scalars import FourBytes, OneByte
from shoal.parts.zeroth_order.spsa import SPSA
from shoal.rounds.workload import Workload
from shoal.systems.compression import _just_one_byte_claims as measured
from shoal.systems.compression._just_one_byte_peer import Node
from shoal.systems.compression._just_one_byte_replica import estimate
from shoal.tensor import keyed
from shoal.tensor.flops import count_flops

NOISE_FLOPS = 50.0
"""What a number of the noise takes: three hashes, a logarithm, a root and a cosine."""


@dataclass(frozen=True)
class JustOneByte:
    """One byte per gradient; see the module's text. A round is an iteration.

    lr: of the step lr / N * g * z over the N numbers of an iteration (mean=False: lr / sqrt(N), as
    the published code does); eps: length of the perturbation; samples, batch_size: per machine and
    iteration. number: "byte" or "float", in which a gradient travels; lowest: 16 ln of the least
    magnitude that a byte holds.
    founders: how many peers of the roster, the first ones, make up the first group (None = all);
    others are newcomers, and so is who starts later than founding_s or starts again. newcomers:
    what they get, "log", "weights" or whichever is less ("auto").
    wait_s: how long the sequencer waits for the others once most of the group have offered;
    silence_s: silence after which a member is dropped, or the sequencer replaced; retry_s: how long
    an answer may take before it is asked for again; give_up_s: how long a peer goes on without an
    iteration. check_every: iterations between comparisons of the weights' digests (0 = never);
    audit: record what the invariants compare.

    Assumes that most of the first group begin within founding_s, that most of the group live at any
    time, that who loses its store within founding_s stays away until then, and that the loss is a
    function of the weights and the batch alone. For weights of your own, over any transport, see
    `shoal.parts.zeroth_order.machine`.

    >>> JustOneByte(lr=6e-3, samples=16).number
    'byte'
    """

    lr: float = 6e-3
    eps: float = 1e-3
    samples: int = 1
    batch_size: int = 32
    mean: bool = True
    number: str = "byte"
    lowest: int = -74
    founders: int | None = None
    founding_s: float = 5.0
    newcomers: str = "auto"
    wait_s: float = 0.5
    silence_s: float = 2.0
    retry_s: float = 0.5
    give_up_s: float = 30.0
    check_every: int = 64
    audit: bool = False

    def __post_init__(self) -> None:
        SPSA(self.eps, self.samples, self.batch_size)
        Rule(0, self.lr, self.samples)
        OneByte(self.lowest)
        if self.number not in ("byte", "float"):
            raise UsageError(f"just-one-byte: number={self.number!r}; need byte or float")
        if self.newcomers not in ("auto", "log", "weights"):
            raise UsageError(
                f"just-one-byte: newcomers={self.newcomers!r}; need auto, log or weights"
            )
        names = ("founding_s", "wait_s", "silence_s", "retry_s", "give_up_s")
        check_positive("just-one-byte", self, *names, finite=True)
        if self.check_every < 0:
            raise UsageError(
                f"just-one-byte: check_every={self.check_every}; need 0 (never) or more iterations"
            )

    def bind(self, workload: Workload) -> Bound:
        """The program for a task: what depends on the number of peers is settled here."""
        peers = workload.task.peers
        founders = peers if self.founders is None else self.founders
        if not 1 <= founders <= peers:
            raise UsageError(
                f"just-one-byte: founders={founders} of {peers} peers; need 1 to all of them"
            )
        if workload.rounds is None:
            raise UsageError(
                "just-one-byte: no rounds; a run needs a number of iterations (set rounds)"
            )
        if not isinstance(workload.transform, Identity):
            raise UsageError(
                f"just-one-byte: transform {type(workload.transform).__name__}; only bytes travel, "
                "and no vectors that could be transformed (leave it out)"
            )
        codec = OneByte(self.lowest) if self.number == "byte" else FourBytes()
        rule = Rule(workload.seed, self.lr, self.samples, codec, self.mean)
        spsa = SPSA(self.eps, self.samples, self.batch_size)
        key = keyed.key_of(workload.seed, "cost", device=workload.initial.device)
        shard = workload.task.shard(0)
        flops = count_flops(estimate, workload.initial, shard, key, workload.task, spsa)
        return Bound(self, workload, rule, spsa, founders, workload.rounds, flops)


@dataclass(frozen=True, eq=False)
class Bound:
    """Just One Byte with its task: the program that peers run."""

    settings: JustOneByte
    workload: Workload
    rule: Rule
    spsa: SPSA
    founders: int
    iterations: int
    loss_flops: float

    @property
    def number_bytes(self) -> int:
        """What a machine tells in an iteration."""
        return self.rule.samples * self.rule.codec.width

    def cost(self, steps: int, ahead: bool) -> Cost:
        """Of so many directions to step along, and (ahead) of a machine's own numbers."""
        directions = steps + (self.spsa.samples if ahead else 0)
        noise = NOISE_FLOPS * directions * self.workload.task.spec.dim
        return Cost(flops=noise + (self.loss_flops if ahead else 0.0))

    async def run(self, peer: Peer) -> None:
        node = Node(self, peer)
        async with peer.tasks() as group:
            life = group.start(node.live())
            try:
                await life.join()
            except Leaving:
                life.cancel()
                await node.leave()


INVARIANTS = (
    measured.one_history,
    measured.log_is_the_model,
    measured.applies_what_was_made_once,
)
"""What every run keeps, whatever its faults: for fault fuzzing."""


SYSTEM = System(
    name="just-one-byte",
    kind="program",
    title="Fine-tuning with one byte per gradient, from losses alone and shared randomness",
    make=JustOneByte,
    source=Source(
        "Zelikman et al. 2023",
        "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model "
        "Finetuning Using Shared Randomness",
        arxiv="2306.10015",
    ),
    scenario="compression.rotated_digits",
    uses={"topology": None, "exchange": None},
    arms={
        "byte": Arm(),
        "float": Arm(system="just-one-byte-calm", set={"number": "float"}),
        "single": Arm(system="just-one-byte-calm", set={"lr": 2e-3}, scenario={"peers": 1}),
        "churn": Arm(set={"founders": 8}, prepare=measured.two_go_and_two_come),
        "exact": Arm(
            set={"founders": 4, "audit": True}, scenario={"rounds": 200, "eval_every": 20},
            prepare=measured.one_comes_and_the_sequencer_dies,
        ),
        "lists": Arm(set={"samples": 16}, scenario={"rounds": 40, "eval_every": 10}),
        "dense": Arm(
            system="dpsgd", set={"steps": 1, "batch_size": 32, "lr": 0.1},
            scenario={"topology": "full", "rounds": 300, "eval_every": 10},
        ),
    },
    claims=(
        Claim(
            "payload", "A machine tells 1,000 times less per iteration than data-parallel SGD does",
            holds=at_least(1000.0), measure=measured.payload_saved, statistic="min",
            at="abstract",
        ),
        Claim(
            "wire",
            "In lists of 16 a gradient takes at most 4 bytes on the wire, headers included, per "
            "machine that it reaches",
            holds=at_most(4.0), measure=measured.wire_bytes, statistic="max",
        ),
        Claim(
            "exact",
            "With one machine that comes and a sequencer that dies all replicas hold the same bits "
            "in every iteration, and the log of bytes replayed gives the model",
            holds=at_least(1.0), measure=measured.exact, statistic="min", at="section 2",
        ),
        Claim(
            "quantised", "The final loss with one byte is at most 1.05 times that with float32",
            holds=at_most(1.05), measure=measured.byte_over_float, scale="full",
        ),
        Claim(
            "machines",
            "Eight machines reach the final loss of one in at most half of the iterations",
            holds=at_most(0.5), measure=measured.share_of_iterations, scale="full",
            at="section 3",
        ),
        Claim(
            "fine-tuning", "Accuracy rises by at least 0.15 over the pretrained model's",
            holds=at_least(0.15), measure=measured.accuracy_gained, scale="full",
        ),
        Claim(
            "churn",
            "Killing two of eight, the sequencer among them, and adding two changes the final loss "
            "by at most 10%",
            holds=at_most(0.1), measure=measured.changed_by_churn, scale="full",
            at="section 2",
        ),
    ),
    deviations=(
        "turned digits and an MLP of 4,810 parameters that knows upright ones in place of language "
        "models; estimates from two losses are too noisy to learn from random weights, and the "
        "bytes do not depend on the model",
        "a number is one byte with its sign (7 bits of the logarithm); the published code keeps "
        "the sign apart",
        "the set that an iteration applies is agreed on with the log of Raft; published code "
        "applies whatever arrives, so that machines which hear different ones part",
        "steps are divided by N by default, as in MeZO, not by its square root (mean=False)",
        "perturbations are made in a copy, so weights never drift by being put back; the learnt "
        "eps and per-tensor scales of the published code are left out",
        "learning rates were chosen on seed 100, which is none of the reproduction's, by the "
        "final loss: for 8 machines 6e-3 of 2e-3, 6e-3, 1e-2 and 2e-2, for one 2e-3 of "
        "6e-4, 1e-3, 2e-3 and 6e-3; float32 uses that of the byte, and data-parallel SGD, of which "
        "only the bytes are compared, 0.1",
        "final losses are medians of the last six evaluations",
    ),
    small=Budget(seeds=1, scenario={"rounds": 200, "eval_every": 20}),
    full=Budget(seeds=3),
)  # fmt: skip
