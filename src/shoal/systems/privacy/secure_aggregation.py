"""Secure aggregation: a hub averages what its clients send and sees none of it, whoever drops out.

Clients hide their vectors under masks that cancel in the sum: one of their own, and one with each
of k neighbours, by keys that only the two of them can make. Shares of the secrets behind all masks
lie with the neighbours, so that the hub can take off what a client that drops out leaves behind,
and nothing else: of each client it is told either the own mask or the key, never both, and fewer
than t neighbours together know nothing. k and t follow from what is assumed of the clients (see
`shoal.parts.privacy.mask_graph`), and k grows with the logarithm of their number.

Any strategy that averages under a hub can be carried (`strategy`, with its settings). Its vectors
are clipped to [-clip, clip] and rounded at random to one of `levels` levels; whole numbers add up
exactly. Peer 0 is the hub and has no data.

With `lying` (the default) the hub may do as it likes. Clients sign their keys of each round with
their Ed25519 identities and check those of others against a roster; k witnesses, drawn by key for
the round, sign whose vectors came and which parameters they were sent, and clients open only what
t of them signed alike (see `shoal.parts.privacy.signed_round`). With no more corrupt clients than
are assumed on its side, such a hub learns sums over disjoint sets of clients, each with at least
`Needed.honest` honest ones: 23 of 100 with the defaults, where k = 62 and t = 42. It can always
spoil a round. This costs a round trip, 64 bytes for each key that a client hears, n / 8 bytes for
the set of survivors, and t signatures. With `lying=false` the hub follows the protocol and only
looks; nothing is signed then, unless `signing` is set.

By default secrets and identities follow from the run's seed, so that runs can be repeated: that
protects nobody. For real use `--set secrets=system` draws secrets from the operating system, and
`--set identities=keys` takes key pairs and roster from the folder `keys`: the file roster.txt,
equal on all machines, has the public key of each peer in hexadecimal digits, a line each, and
peer-3.key is the own key of peer 3 (`Roster.write` makes all of it where peers share a machine).
The hub must have no say in the roster, or it fills it with its own, nor in the seed, from which
neighbours follow. No two runs may have the same identities, seed and `session`, or keys of the
first could be replayed in the second.

A client may still send what it likes: nobody looks at its vector, and a sum knows no robust rule
(`secure_momentum` of DP-BREM+ proves norms, at far greater cost).

Where lockstep is wanted, a star with the transform `fixed_point` and `exchange.hub_works = false`
computes the same sums with vectors of the same size, and knows of no drop-out between phases.

Bell et al. 2020 (doi 10.1145/3372297.3417885), after Bonawitz et al. 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab.card import (
    Arm,
    Budget,
    Claim,
    Source,
    System,
    at_least,
    at_most,
    between,
    difference,
)
from shoal.lab.chart import Chart
from shoal.parts import find
from shoal.parts.aggregate.mean import Mean
from shoal.parts.exchange.star import Star
from shoal.parts.privacy.mask_graph import Assumed
from shoal.parts.privacy.mask_stream import Cipher
from shoal.parts.privacy.secure_rounds import Masking, SecureRounds
from shoal.parts.transform.fixed_point import FixedPoint
from shoal.parts.transform.identity import Identity
from shoal.rounds.method import Method
from shoal.rounds.workload import Workload
from shoal.systems.privacy import _secure_aggregation_claims as measured

FEDAVG: Mapping[str, Any] = {"name": "local_steps", "lr": 0.5, "steps": 5}


@dataclass(frozen=True)
class SecureAggregation:
    """What is carried, how it is rounded, and what is assumed of clients; see the module's text.

    strategy: a part's name with its settings, or from Python the strategy itself. sample: how many
    clients take part in a round, drawn by key. clip, levels: of the rounding, unless the scenario's
    transform gives whole numbers itself (rqm, pbm). heaviest: the largest weight of a client, where
    the strategy weighs (by samples, for instance); weights are whole numbers.
    corrupt, dropout: parts of the clients; sigma, eta: see `Assumed`; lying: the hub may do as it
    likes, and so keys and survivors are signed. cipher: of the masks; secrets, audit, work_s,
    phase_s, signing, identities, session: see `Masking`.

    Assumes, where nothing is signed, that the hub passes on public keys unchanged.

    >>> SecureAggregation(corrupt=0.1, dropout=0.2).assumed.needed(100).degree
    52
    """

    strategy: Any = field(default_factory=lambda: tuple(FEDAVG.items()))
    sample: int | None = None
    clip: float = 4.0
    levels: int = 65535
    heaviest: int = 1
    corrupt: float = 0.2
    dropout: float = 0.2
    sigma: float = 40.0
    eta: float = 30.0
    lying: bool = True
    cipher: Cipher = "aes"
    secrets: str = "run"
    audit: bool = False
    work_s: float = 60.0
    phase_s: float = 15.0
    signing: bool = False
    identities: str = "run"
    session: str = ""

    def __post_init__(self) -> None:
        _ = self.masking, FixedPoint(self.clip, self.levels)

    @property
    def assumed(self) -> Assumed:
        """Of which degree and threshold follow."""
        return Assumed(self.corrupt, self.dropout, self.sigma, self.eta, self.lying)

    @property
    def masking(self) -> Masking:
        """How sums are masked."""
        return Masking(
            self.assumed, self.cipher, self.heaviest, self.secrets, self.work_s, self.phase_s,
            self.audit, self.signing, self.identities, self.session,
        )  # fmt: skip

    @property
    def carried(self) -> Any:
        """The strategy."""
        if hasattr(self.strategy, "apply"):
            return self.strategy
        given = {"name": self.strategy} if isinstance(self.strategy, str) else dict(self.strategy)
        if "name" not in given:
            raise UsageError(
                f"secure-aggregation: strategy={self.strategy!r}; need a name (add name = "
                "'local_steps')"
            )
        return find("strategy", given.pop("name"))(**given)

    def bind(self, workload: Workload) -> SecureRounds:
        """The program for a task. UsageError for what does not go together."""
        if workload.rounds is None:
            raise UsageError("secure-aggregation: a run without rounds (set rounds)")
        if not (isinstance(workload.aggregator, Mean) and workload.aggregator.weighted):
            raise UsageError(
                f"secure-aggregation: aggregator {type(workload.aggregator).__name__}; a hub that "
                "sees a sum can take its mean (leave the aggregator out)"
            )
        star: Any = Star(workload.task.peers, sample=self.sample, hub_works=False)
        transform: Any = workload.transform
        if isinstance(transform, Identity):
            most = (self.sample or star.clients) * self.heaviest
            transform = FixedPoint(self.clip, self.levels, most).bind(workload.task.spec)
        method = Method(
            self.carried, workload.task, star, workload.aggregator, transform, workload.rounds,
            self.masking.round_s, workload.seed, report_every=workload.report_every,
            independent=workload.independent,
        )  # fmt: skip
        return SecureRounds(method, self.masking)


INVARIANTS = (
    measured.sums_are_exact,
    measured.never_both_kinds,
    measured.enough_are_summed,
)
"""What every run keeps, whatever its faults: for fault fuzzing."""

_STAR: Mapping[str, Any] = {"exchange": {"name": "star", "hub_works": False}}
_ROUNDED: Mapping[str, Any] = {"transform": {"name": "fixed_point", "clients": 20}}
_PLAIN: Mapping[str, Any] = {"lr": 0.5, "steps": 5}

SYSTEM = System(
    name="secure-aggregation",
    kind="program",
    title="A hub averages what it cannot see, whoever drops out",
    make=SecureAggregation,
    source=Source(
        "Bell et al. 2020",
        "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
        doi="10.1145/3372297.3417885",
        venue="CCS",
    ),
    scenario="privacy.digits_silos",
    uses={"topology": None, "exchange": None},
    arms={
        "secure": Arm(set={"audit": True}),
        "star": Arm(system="dpsgd", set=_PLAIN, scenario={**_STAR, **_ROUNDED}),
        "plain": Arm(system="dpsgd", set=_PLAIN, scenario=_STAR),
        "dropping": Arm(
            set={"audit": True, "work_s": 30.0, "phase_s": 5.0},
            scenario={"device.flops_per_s": 1e5}, prepare=measured.dropping,
        ),
    },
    claims=(
        Claim(
            "exact", "With a fifth of the clients dropping out in all phases, every sum is that of "
            "the vectors that came, to the last bit",
            at_most(0.0), measure=measured.wrong_sums, statistic="max",
        ),
        Claim(
            "opened", "and no round is lost",
            at_most(0.0), measure=measured.lost_rounds, statistic="max",
        ),
        Claim(
            "in-every-phase", "where clients did drop out before and after they had shared",
            at_least(1.0), measure=measured.phases_hit, statistic="min",
        ),
        Claim(
            "same-model", "The model is that of a plain star with the same rounding",
            between(-1e-5, 1e-5), "loss", difference("secure", "star"),
        ),
        Claim(
            "uniform", "A masked vector is uniform to whoever lacks one of its masks: p-value of a "
            "chi-square test over 2^12 cells",
            at_least(1e-3), measure=measured.uniformity, statistic="min",
        ),
        Claim(
            "not-uniform", "and the same test finds a vector without its masks out",
            at_most(1e-12), measure=measured.uniformity_unmasked, statistic="max",
        ),
        Claim(
            "threshold", "t - 1 neighbours know nothing: their shares fit every secret alike",
            at_least(1.0), measure=measured.secrets_left, statistic="min",
        ),
        Claim(
            "logarithmic", "Keys and shares of a client grow by less than half from 1,000 to "
            "1,000,000 clients (a hub that only looks, 5% corrupt, a third dropping out)",
            at_most(1.5), measure=measured.growth, at="abstract",
        ),
        Claim(
            "overhead", "Of 1,000,000 parameters among 100 clients, keys and shares are at most 1% "
            "of what a client moves in a plain star",
            at_most(0.01), measure=measured.overhead,
        ),
        Claim(
            "smaller", "and rounded vectors under masks are smaller than plain ones",
            at_most(0.8), measure=measured.uplink,
        ),
    ),
    charts=(
        Chart("Neighbours needed", "curves", measured.degrees, x="log10 of clients", y="k"),
    ),
    deviations=(
        "who is whose neighbour is drawn by everybody from the run's seed: it need not be sent, "
        "and the hub cannot choose it unless it chooses the seed; the paper's clients choose, once "
        "they are bound to their keys",
        "a commitment to the own mask travels with the keys, so that wrong shares are found and "
        "corrected (Reed-Solomon) and their holders named; the paper's clients are semi-honest",
        "against a hub that lies, k witnesses of each round sign one set of survivors for all, and "
        "the parameters with it; in Bonawitz et al. everybody signs, in the paper clients do for "
        "their neighbours",
        "weights are whole numbers that multiply the codes, and are summed under the same masks",
        "keys and shares are agreed on while clients work; still a round takes up to five round "
        "trips where a plain star takes one, 4.3 times as long here, where there is little work "
        "(3.4 times where nothing is signed)",
    ),
    small=Budget(seeds=1, scenario={"rounds": 12, "eval_every": 4}),
    full=Budget(seeds=3, scenario={"rounds": 60}),
)  # fmt: skip
