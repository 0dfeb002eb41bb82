"""A client's side of the server's books: pull a model, push a work, each settled exactly once.

A program of its own may call `pull` and `push` whenever it likes; `worker` has the usual loop. A
work is committed before it is sent and sent again until the server has told what became of it, also
after a crash. Requests and answers may be lost or come twice; numbers tell which is which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.base.errors import PeerError, UsageError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.asynchronous._messages import Answer, Call
from shoal.parts.asynchronous.desk import TAKEN
from shoal.rounds.workload import Workload
from shoal.tensor.types import Vector
from shoal.wire.message import Packed

_OUTBOX = "outbox"


class ServerLost(PeerError):
    """The server has not answered for `give_up_s`."""


@dataclass(frozen=True, eq=False)
class Model:
    """What a client begins a work from: params [dim] of this version.

    steps: how many local steps the server wants, 0 = as many as the client likes.
    """

    number: int
    origin: int
    version: int
    steps: int
    params: Vector = field(repr=False)


class Client:
    """A client of `server`; works go through the workload's transform.

    patience_s: after that long without an answer the same is said again; give_up_s: after that long
    without any answer `ServerLost` is raised, and the call may be made again. One call at a time.

    Assumes that the server is a peer that runs `Server`. A transform's memory (error feedback) does
    not outlive a crash.
    """

    def __init__(
        self, peer: Peer, workload: Workload, server: int = 0, *, patience_s: float = 5.0,
        give_up_s: float = 120.0,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.workload = workload
        self.server = PeerId(server)
        self.patience_s = patience_s
        self.give_up_s = give_up_s
        self.model: Model | None = None
        """the model that was pulled last"""
        self.verdict = ""
        """what became of the work that was pushed last: see `desk`, "settled" when it was told
        without the verdict, "lost" with the server's store"""
        self._number = 0
        self._origin = 0
        self._codec = workload.transform.init(workload.initial)

    async def resume(self) -> None:
        """Hand in what an earlier life had finished, if there is anything; call this first."""
        call = self.peer.store.get(_OUTBOX)
        if call is not None:
            await self._deliver(msgspec.structs.replace(call, asks=False))

    async def pull(self) -> Model:
        """The newest model, or the one that the server gives when it is this client's turn."""
        request = Call(self._number, False, True, self._origin, 0, 0, 0.0, Packed(b""))
        answer = await self._ask(request, self._is_model)
        return self._take(answer)

    async def push(
        self, vector: Vector, model: Model, *, steps: int = 1, weight: float = 1.0,
        again: bool = False,
    ) -> Model | None:  # fmt: skip
        """Hand in a work [dim] that began from `model`; returns once the server has settled it.

        steps: local steps made; weight: of this client's data. again: ask for the next model with
        the same message, which is then returned; else None.
        """
        if steps < 1 or not 0 <= weight < float("inf"):
            raise UsageError(
                f"push: steps={steps}, weight={weight}; need at least 1 step and a finite weight "
                ">= 0"
            )
        if vector.shape != model.params.shape:
            raise UsageError(
                f"push: a vector of shape {tuple(vector.shape)} for a model of "
                f"{tuple(model.params.shape)} (push all of it)"
            )
        payload = self._encode(vector, model.number)
        call = Call(
            model.number, True, again, model.origin, model.version, steps, weight, Packed(payload)
        )
        await self.peer.store.commit({_OUTBOX: call})
        self.peer.record("made", model.number, work=_name(self.peer, call))
        answer = await self._deliver(call)
        if not again:
            return None
        return self._take(answer) if self._is_model(answer) else await self.pull()

    async def _deliver(self, call: Call) -> Answer:
        """Send a work until it is settled."""

        def settles(answer: Answer) -> bool:
            # A model that came twice is about this work as well, but was sent before it was made.
            told = answer.about == call.number and answer.verdict not in ("", "held")
            return answer.origin != call.origin or told or answer.number > call.number

        answer = await self._ask(call, settles)
        lost = answer.origin != call.origin
        self.verdict = "lost" if lost else answer.verdict or "settled"
        if self.verdict == TAKEN:
            self.peer.record("handed_in", call.number, work=_name(self.peer, call))
        self._number, self._origin = answer.number, answer.origin
        return answer

    async def _ask(self, call: Call, fits: Any) -> Answer:
        """Say something until an answer fits."""
        peer = self.peer
        heard_s = peer.now()
        while True:
            await peer.send(self.server, call)
            until_s = peer.now() + self.patience_s
            while True:
                envelope = await peer.recv(Answer, source=self.server, deadline=until_s)
                if envelope is None:
                    break
                heard_s = peer.now()
                if fits(envelope.message):
                    return envelope.message
            if peer.now() - heard_s >= self.give_up_s:
                raise ServerLost(
                    f"server {self.server}: no answer for {self.give_up_s} s (start it, or raise "
                    "give_up_s)"
                )

    def _is_model(self, answer: Answer) -> bool:
        """Whether it has a model that is not for an earlier work, and is one."""
        params, like = answer.params, self.workload.initial
        if params is None or params.shape != like.shape or params.dtype != like.dtype:
            return False
        late = answer.origin == self._origin and answer.number < self._number
        return not late and bool(params.isfinite().all())

    def _take(self, answer: Answer) -> Model:
        assert answer.params is not None
        self._number, self._origin = answer.number, answer.origin
        self.model = Model(
            answer.number, answer.origin, answer.version, answer.steps,
            self.workload.there(answer.params),
        )  # fmt: skip
        return self.model

    def _encode(self, vector: Vector, number: int) -> Any:
        payload, self._codec = self.workload.transform.encode(
            vector, self._codec, self.workload.there(self.peer.key("encode", number))
        )
        return payload


def _name(peer: Peer, call: Call) -> str:
    """As `Delta.name`."""
    return f"{call.origin}.{peer.id}.{call.number}"
