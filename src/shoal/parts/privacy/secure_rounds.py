"""Any strategy under a hub that sees the sum of its clients' vectors and no summand.

In each round the hub sends its parameters; while clients work on their own data they agree on keys
and share secrets; they send their vectors under masks, and those that are still there open what the
sum of the vectors that came needs. A client may drop out in any phase. Its vector is in the sum if
it came; if not, its masks are taken off. Against a hub that may lie, keys are signed by identities,
and witnesses sign whose vectors came before anything is opened (`signed_round`).

The vector is what the strategy's own `local` gives, on the levels of an integer transform (such as
`fixed_point`), times the client's weight; weights and extras travel in the same sum. `apply` runs
at the hub on the weighted mean. The hub must add, so the rule is the mean, and a strategy must not
combine by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from shoal.base.errors import Leaving, UsageError
from shoal.base.limits import check_positive
from shoal.kernel.peer import Cost, Peer
from shoal.parts.privacy._secure_client import Client
from shoal.parts.privacy._secure_hub import Hub
from shoal.parts.privacy.mask_graph import Assumed, MaskGraph
from shoal.parts.privacy.mask_stream import SECRET_BYTES, Cipher
from shoal.parts.privacy.signed_round import Roster, SignedRound, told
from shoal.rounds import method as phases
from shoal.rounds.method import Method
from shoal.rounds.transform import Transform

ASSUMED = Assumed()
"""A fifth corrupt, a fifth dropped, sigma = 40, eta = 30, a hub that may lie."""


@dataclass(frozen=True)
class Masking:
    """How a sum is masked.

    assumed: sets the number of neighbours and the threshold. cipher: "aes" or "chacha20". heaviest:
    the largest weight of a client; weights are whole numbers (of samples, for instance) and cost
    bits. secrets: "run" draws them by the run's seed, so that a run can be repeated and whoever
    knows the seed knows everything; "system" asks the operating system, for real use. work_s: how
    long a hub waits for vectors, phase_s: for keys, shares, signatures and openings. audit: record
    a linear check of every client's codes, from which invariants tell that sums are exact; it gives
    away one number of each vector.
    signing: clients sign their keys, and check those of others (see `signed_round`); a hub that may
    lie (`assumed.lying`) implies it, and has the survivors signed as well. identities: "run" makes
    key pairs from the run's seed, for runs that can be repeated; else the folder of a roster
    (`Roster.of_folder`), the same on all machines. session: a word that no other run with these
    identities and this seed has.

    Assumes, where keys are not signed, that the hub passes them on unchanged: one that puts its own
    in their place reads along.
    """

    assumed: Assumed = ASSUMED
    cipher: Cipher = "aes"
    heaviest: int = 1
    secrets: str = "run"
    work_s: float = 60.0
    phase_s: float = 15.0
    audit: bool = False
    signing: bool = False
    identities: str = "run"
    session: str = ""

    def __post_init__(self) -> None:
        check_positive("Masking", self, "heaviest", "work_s", "phase_s", finite=True)
        if self.secrets not in ("run", "system") or self.cipher not in ("aes", "chacha20"):
            raise UsageError(
                f"Masking: secrets={self.secrets!r}, cipher={self.cipher!r}; need 'run' or "
                "'system', and 'aes' or 'chacha20'"
            )
        if self.secrets == "system" and self.signs and self.identities == "run":
            raise UsageError(
                "Masking: secrets='system' with identities that follow from the run's seed, in "
                "whose name the hub can sign (set identities to the folder of a roster, or "
                "lying=false for a hub that follows the protocol)"
            )

    @property
    def signs(self) -> bool:
        """Whether keys are signed."""
        return self.signing or self.agrees

    @property
    def agrees(self) -> bool:
        """Whether clients go by one set of survivors."""
        return self.assumed.lying

    @property
    def round_s(self) -> float:
        """The longest that a round takes, but for the way to and from the hub."""
        return self.work_s + (4.0 if self.agrees else 3.0) * self.phase_s

    def secret(self, peer: Peer, round: int) -> bytes:
        """A peer's 32 secret bytes of a round."""
        if self.secrets == "system":
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            return AESGCM.generate_key(8 * SECRET_BYTES)
        words = [int(peer.key("masking", round, i)) for i in range(SECRET_BYTES // 8)]
        return b"".join(word.to_bytes(8, "little", signed=True) for word in words)


@dataclass(frozen=True, eq=False)
class SecureRounds:
    """The program. method: its exchange has a hub that does not work, its transform has integer
    codes for enough clients. UsageError for what does not go together.
    """

    method: Method
    masking: Masking = field(default_factory=Masking)

    def __post_init__(self) -> None:
        method, name = self.method, type(self.method.strategy).__name__
        hub = method.exchange.hub
        if hub is None or bool(method.active(0)[hub]):
            raise UsageError(
                "SecureRounds: needs a hub without data of its own (exchange = 'star', "
                "exchange.hub_works = false)"
            )
        if method.combines:
            raise UsageError(
                f"SecureRounds: {name} combines what clients send by itself, and a hub that sees "
                "the sum alone cannot (take a strategy that averages)"
            )
        codec: Any = method.transform
        if not hasattr(codec, "decode_sum"):
            raise UsageError(
                f"SecureRounds: {type(codec).__name__} gives no whole numbers that could be added "
                "(set transform = 'fixed_point')"
            )
        most = max(self.clients) * self.masking.heaviest
        if codec.clients < most:
            raise UsageError(
                f"SecureRounds: a transform for {codec.clients} clients, and {max(self.clients)} "
                f"of weight up to {self.masking.heaviest} take part (set transform.clients to "
                f"{most})"
            )
        for count in self.clients:
            self.masking.assumed.needed(count)

    @cached_property
    def clients(self) -> tuple[int, ...]:
        """How many clients rounds have; the first round and the next tell."""
        method = self.method
        rounds = range(min(2, method.rounds))
        return tuple(sorted({sum(method.working(round)) for round in rounds}))

    @property
    def hub(self) -> int:
        hub = self.method.exchange.hub
        assert hub is not None
        return hub

    @property
    def bits(self) -> int:
        """Of an entry: sums are modulo 2^bits."""
        return self.method.transform.width  # type: ignore[attr-defined]

    @property
    def gives_up_s(self) -> float:
        """How long a client waits for a hub of which nothing is heard."""
        sampled = max(self.clients) < self.method.peers - 1
        return 2.0 * self.masking.round_s * (self.method.rounds if sampled else 1)

    def graph(self, round: int) -> MaskGraph:
        """Who shares masks with whom; drawn by all from the run's seed."""
        found = self._graphs.get(round)
        if found is None:
            method = self.method
            taking = [p for p, on in enumerate(method.working(round)) if on]
            found = MaskGraph.of(taking, self.masking.assumed, method.seed, "mask graph", round)
            self._graphs[round] = found
            self._graphs.pop(round - 8, None)
        return found

    @cached_property
    def _graphs(self) -> dict[int, MaskGraph]:
        return {}

    @cached_property
    def roster(self) -> Roster:
        """Who is who; UsageError for a folder that does not say."""
        masking, method = self.masking, self.method
        if masking.identities == "run":
            return Roster.of_run(method.seed, masking.session)
        return Roster.of_folder(masking.identities, method.peers, method.seed, masking.session)

    def signed(
        self, me: int, round: int, params: Tensor, extra: Mapping[str, Tensor]
    ) -> SignedRound | None:
        """What a peer signs and checks in a round that begins with this; None: nothing."""
        if not self.masking.signs:
            return None
        return SignedRound(self.roster, self.graph(round), round, me, told(params, extra))

    @cached_property
    def layout(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the strategy's extras, from one client's work."""
        method = self.method
        client = self.graph(0).peers[0]
        shard, key = method.task.shard(client), method.keys(0)[client]
        state = method.strategy.init(method.initial)
        extra = phases.local(state, shard, key, method, 0)[3]
        return tuple([(name, tuple(extra[name].shape)) for name in sorted(extra)])

    @cached_property
    def entries(self) -> int:
        """Of a masked vector: the strategy's vector, its extras, and the weight."""
        return self.method.task.spec.dim + sum(_size(shape) for _, shape in self.layout) + 1

    @cached_property
    def loose(self) -> Transform:
        """The transform for vectors of any layout."""
        return replace(self.method.transform)  # type: ignore[type-var]

    def mask_cost(self, masks: int) -> Cost:
        """Of adding so many masks: each is made and added, 4 or 8 bytes an entry."""
        word = 4 if self.bits <= 32 else 8
        return Cost(bytes=float(3 * word * self.entries * max(masks, 1)))

    def whole(self, weight: Tensor | None) -> int:
        """A client's weight as a whole number; UsageError where it is none, or too heavy."""
        number = 1.0 if weight is None else float(weight)
        if number != round(number) or not 0 <= number <= self.masking.heaviest:
            raise UsageError(
                f"SecureRounds: a client weighs {number}; need a whole number from 0 to "
                f"{self.masking.heaviest} (raise heaviest, or let clients weigh the same)"
            )
        return int(number)

    def mean(self, total: Tensor) -> tuple[Tensor, dict[str, Tensor]] | None:
        """(vector, extras) from the sum of weighted codes [entries]; None if nobody weighs."""
        weight = int(total[-1])
        if weight == 0:
            return None
        dim = self.method.task.spec.dim
        like = self.method.initial
        codec: Any = self.method.transform
        vector = codec.decode_sum(total[:dim], weight).to(like)
        extra, at = {}, dim
        for name, shape in self.layout:
            piece = total[at : at + _size(shape)]
            extra[name] = codec.decode_sum(piece, weight).to(like).reshape(shape)
            at += len(piece)
        return vector, extra

    async def run(self, peer: Peer) -> None:
        try:
            await (Hub(self, peer) if peer.id == self.hub else Client(self, peer)).live()
        except Leaving:
            return


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
