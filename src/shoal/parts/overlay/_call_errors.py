"""How a remote call can fail, as types that a program can tell apart.

PeerError
├── DeadlineExceeded    no answer in time (of `shoal.base.errors`)
└── CallError
    ├── NoSuchMethod      nobody serves a method of that name there
    ├── HandlerFailed     the handler raised; `kind` is the name of the exception's class
    ├── CallCancelled     the other side gave the call up
    ├── AnswerUnreadable  the other side answered what is no answer: damaged, too long or unknown
    ├── CallRefused       the other side did not take it, and did not run it
    └── OutcomeUnknown    the other peer restarted: whether the call ran, nobody can say
"""

from __future__ import annotations

from shoal.base.errors import PeerError


class CallError(PeerError):
    """A remote call that has no result. `kind`: a name for programs, '' if there is none."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class NoSuchMethod(CallError):
    """Nobody serves a method of that name."""


class HandlerFailed(CallError):
    """The handler raised an exception, of the class named `kind`."""


class CallCancelled(CallError):
    """The handler was cancelled, since its peer stopped serving or its own deadline passed."""


class CallRefused(CallError):
    """It was not run: the payload is over the other side's limit, or cannot be read there."""


class AnswerUnreadable(CallError):
    """What came in answer cannot be read; `kind` is the name of the error's class. The call ran."""


class OutcomeUnknown(CallError):
    """The other peer restarted between two attempts, of which the first may have run."""
