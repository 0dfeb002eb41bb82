"""What a client and its server say to each other."""

from __future__ import annotations

from torch import Tensor

from shoal.wire.message import Packed, message


@message(checked=True)
class Call:
    """A client hands in a work, or asks for a model, or both.

    number: of the work, from 1; of a request alone, the work that the model is for (0 = the client
    does not know). origin: of the server's store as the client knows it (0 = it does not).
    version: of the model that the work began from; steps: local steps made; weight: of the client's
    data; payload: empty in a request alone.
    """

    number: int
    work: bool
    asks: bool
    origin: int
    version: int
    steps: int
    weight: float
    payload: Packed


@message(checked=True)
class Answer:
    """What became of the work `about`, and the model for the next one if there is one to give.

    number: the client's next work; steps: how many local steps it should make of it, 0 = as it
    likes. verdict: see `desk`; "held" when a model will come later, "" when nothing was settled.
    """

    about: int
    verdict: str
    number: int
    origin: int
    version: int
    steps: int
    params: Tensor | None


@message(checked=True)
class Finished:
    """There will be no more versions; params is the last one."""

    version: int
    params: Tensor


@message
class Bye:
    """The client knows that it is over."""

    version: int
