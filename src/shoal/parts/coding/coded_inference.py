"""A module applied by workers of whom some are slow, some are gone and some lie.

Peer 0 mixes its inputs into shares (`BerrutCode`), every other peer applies the module to its share
and answers, and peer 0 decodes from what came in time. Nobody but peer 0 knows the code; workers
run any `torch.nn.Module` on arrays of the usual shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.base.errors import Leaving, PeerError, UsageError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Envelope, Peer
from shoal.parts.coding.berrut_code import BerrutCode
from shoal.parts.coding.decode_result import DecodeResult
from shoal.tensor import keyed
from shoal.wire.message import message


@message
class Share:
    """A worker's share of a batch: [samples, *features]."""

    batch: int
    values: Tensor


@message
class Answer:
    """What the module makes of it: [samples, *outputs]."""

    values: Tensor


@message
class Done:
    """There is nothing more to do."""


def applied(shares: Tensor, module: nn.Module, features: int) -> Tensor:
    """The module's outputs for shares [..., samples, *features]; the last `features` axes are one
    sample's."""
    lead = shares.shape[: shares.dim() - features]
    with torch.no_grad():
        out = module(shares.reshape(-1, *shares.shape[len(lead) :]))
    return out.reshape(*lead, *out.shape[1:])


def decoded(values: Tensor, present: Tensor, code: BerrutCode) -> DecodeResult:
    """`BerrutCode.decode_all`, as something to compute."""
    return code.decode_all(values, present)


@dataclass(frozen=True, eq=False)
class CodedInference:
    """`module(inputs)` with the help of peers 1 to N; see the module's text.

    module: maps [samples, *features] to [samples, *outputs], each sample by itself; it is put into
    evaluation mode. inputs: [samples, *features], shared out over `batches` batches of K blocks.
    targets: int64 [samples] for outputs that are scores of classes, or None. liars: peers that add
    `magnitude` times the outputs' size, times a standard normal number, to all that they answer.
    wait_s: how long peer 0 waits for the answers to a batch. params: what peers record as theirs.

    Of the interpolation the module must make something smooth: outputs that jump come back blurred.
    Shares are no secret (see `BerrutCode`).

    Peer 0 records per batch "answers", "left_out", "wrongly_left_out", "residual" and "trusted" (0
    or 1), and at the end "coded_error" (relative, over what was answered), "answered" (share of the
    samples), and with targets "coded_accuracy", "central_accuracy" and "agreement" (share of
    samples of which the coded class is that of the module itself; what was not answered is wrong).
    """

    module: nn.Module
    inputs: Tensor
    code: BerrutCode
    batches: int = 1
    targets: Tensor | None = None
    liars: frozenset[int] = frozenset()
    magnitude: float = 10.0
    wait_s: float = 5.0
    params: Tensor | None = None

    def __post_init__(self) -> None:
        samples = len(self.inputs)
        if not 1 <= self.batches <= samples:
            raise UsageError(
                f"CodedInference: batches={self.batches} of {samples} samples; need 1 to {samples}"
            )
        if not (self.wait_s > 0 and math.isfinite(self.magnitude)):
            raise UsageError(
                f"CodedInference: wait_s={self.wait_s}, magnitude={self.magnitude}; need a time "
                "above 0 and a finite magnitude"
            )
        self.module.eval()

    @property
    def gives_up_s(self) -> float:
        """When a worker that hears nothing more stops."""
        return 2.0 * (self.batches + 1) * self.wait_s

    async def run(self, peer: Peer) -> None:
        if len(peer.roster) != self.code.N + 1:
            raise UsageError(
                f"CodedInference: {len(peer.roster)} peers; need {self.code.N + 1}, one that asks "
                "and N workers"
            )
        if self.params is not None:
            peer.record("params", self.params)
        try:
            if peer.id == 0:
                await self._ask(peer)
            else:
                await self._serve(peer)
        except Leaving:
            return

    # A worker.

    async def _serve(self, peer: Peer) -> None:
        features = self.inputs.shape[1:]

        async def answer(asked: Envelope[Share]) -> Answer:
            share = asked.message.values
            if share.shape[1:] != features:
                # Damaged on its way: an answer that nobody can use.
                return Answer(share[:0])
            values = await peer.compute(
                applied, share.to(self.inputs), static=(self.module, len(features))
            )
            if peer.id in self.liars:
                values = self._lie(peer, values, asked.message.batch)
            return Answer(values)

        end_s = peer.now() + self.gives_up_s
        peer.serve(Share, answer)
        await peer.recv(Done, source=PeerId(0), deadline=end_s)

    def _lie(self, peer: Peer, values: Tensor, batch: int) -> Tensor:
        key = peer.key("lie", batch).to(values.device)
        noise = keyed.normal(keyed.grid(key, values.numel()), dtype=values.dtype)
        size = values.square().mean().sqrt()
        return values + self.magnitude * size * noise.view(values.shape)

    # Peer 0.

    async def _ask(self, peer: Peer) -> None:
        blocks = torch.arange(len(self.inputs), device=self.inputs.device).tensor_split(
            self.batches
        )
        found: list[Tensor | None] = []
        for batch, chosen in enumerate(blocks):
            kept = peer.store.get(f"batch {batch}")
            if kept is None:
                kept = await self._batch(peer, batch, self.inputs[chosen])
                if kept is not None:
                    await peer.store.commit({f"batch {batch}": kept})
            found.append(kept)
        self._report(peer, found, [len(chosen) for chosen in blocks])
        for worker in self._workers(peer):
            await peer.send(worker, Done())

    def _workers(self, peer: Peer) -> list[PeerId]:
        return [other for other in peer.roster if other != 0]

    async def _batch(self, peer: Peer, batch: int, inputs: Tensor) -> Tensor | None:
        """The outputs of a batch, [samples, outputs], or None when fewer than 2 answers came."""
        peer.enter_round(batch)
        K, N, features = self.code.K, self.code.N, inputs.shape[1:]
        samples = math.ceil(len(inputs) / K)
        # The last sample fills up the last block.
        padded = torch.cat([inputs, inputs[-1:].expand(samples * K - len(inputs), *features)])
        shares = self.code.encode(padded.reshape(K, -1)).to(inputs.dtype)
        shares = shares.view(N, samples, *features)
        answers: dict[int, Tensor] = {}
        deadline = peer.now() + self.wait_s
        async with peer.tasks() as group:
            for place, worker in enumerate(self._workers(peer)):
                share = Share(batch, shares[place])
                group.start(self._one(peer, worker, share, deadline, place, answers))
        outputs = applied(inputs[:1], self.module, len(features)).shape[1:]
        values = torch.zeros(
            N, samples * outputs.numel(), dtype=torch.float64, device=inputs.device
        )  # fmt: skip
        present = torch.zeros(N, dtype=torch.bool, device=inputs.device)
        for place, answer in answers.items():
            # Whoever answers in another shape, or with what is no number, has not answered.
            fits = answer.shape == (samples, *outputs) and not answer.is_complex()
            if fits and bool(answer.isfinite().all()):
                values[place] = answer.to(values).reshape(-1)
                present[place] = True
        came = int(present.sum())
        peer.record("answers", float(came))
        if came < 2:
            return None
        result = await peer.compute(
            decoded, values, present, static=(self.code,), batch="never",
            cost=Cost(flops=10.0 * N * N * values.shape[-1]),
        )  # fmt: skip
        self._note(peer, result)
        return result.Y.reshape(K * samples, -1)[: len(inputs)]

    async def _one(
        self, peer: Peer, worker: PeerId, share: Share, deadline: float, place: int,
        answers: dict[int, Tensor],
    ) -> None:  # fmt: skip
        try:
            answer = await peer.request(worker, share, deadline=deadline)
        except PeerError:
            return
        if isinstance(answer, Answer):
            answers[place] = answer.values

    def _note(self, peer: Peer, result: DecodeResult) -> None:
        out = (result.errors.nonzero().flatten() + 1).tolist()
        peer.record("left_out", float(len(out)), who=" ".join(map(str, out)))
        peer.record("wrongly_left_out", float(len(set(out) - self.liars)))
        peer.record("trusted", float(result.trusted))
        if bool(result.residual.isfinite()):
            peer.record("residual", float(result.residual))

    def _report(self, peer: Peer, found: list[Tensor | None], sizes: list[int]) -> None:
        features = self.inputs.dim() - 1
        central = applied(self.inputs, self.module, features).flatten(1).to(torch.float64)
        got = [
            torch.full((size, central.shape[1]), math.nan, dtype=torch.float64, device="cpu")
            if part is None else part.cpu()
            for part, size in zip(found, sizes, strict=True)
        ]  # fmt: skip
        coded, central = torch.cat(got), central.cpu()
        there = ~coded.isnan().any(-1)
        peer.record("answered", float(there.double().mean()))
        if bool(there.any()):
            gap = (coded - central)[there].norm() / central[there].norm()
            peer.record("coded_error", float(gap))
        if self.targets is None:
            return
        targets = self.targets.cpu()
        classes = torch.where(there, coded.nan_to_num().argmax(-1), -1)
        peer.record("coded_accuracy", float((classes == targets).double().mean()))
        peer.record("central_accuracy", float((central.argmax(-1) == targets).double().mean()))
        peer.record("agreement", float((classes == central.argmax(-1)).double().mean()))
