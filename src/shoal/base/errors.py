"""Every error that Shoal raises on purpose.

    ShoalError
    ├── UsageError            a setting, file or call that cannot work; raised at construction
    ├── WireError             bytes on or from the wire
    │   ├── DecodeError         malformed, truncated, wrong type or wrong checksum
    │   │   └── Forged            not what the other end of the session sent, or not in that order
    │   ├── HandshakeError      no session with the other side, and why
    │   └── MessageTooLarge     over the frame or mailbox limit
    ├── PeerError             another peer did not do its part
    │   ├── DeadlineExceeded    no answer in time
    │   └── PeerUnreachable     no way to that peer
    ├── ProgramError          a peer program broke a rule of the kernel
    │   ├── MutatedAfterSend    a tensor was written while the kernel still held it
    │   └── UndeclaredMessage   a class that is no `@message` was sent
    └── SimulationError       the run itself cannot go on
        ├── Stalled             live peers wait and nothing is left that could wake them
        └── LimitReached        more events, bytes or peers than the run allows

Messages give the value, the rule and the repair. Expected outcomes are values, not errors:
`recv` returns None at its deadline, a claim gets a verdict, an absent row is a mask.

`Cancelled` and `Leaving` are no errors: they are how a task is told to stop, so they derive from
`BaseException` and pass through `except Exception`.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Root of the tree; catch this to catch everything that Shoal raises on purpose."""


class UsageError(ShoalError, ValueError):
    """A setting, file or call that cannot work."""


class WireError(ShoalError):
    """Bytes that cannot be sent or were received broken."""


class DecodeError(WireError, ValueError):
    """Malformed, truncated or corrupted bytes."""


class Forged(DecodeError):
    """Bytes that the other end of a session did not send, or not in this order."""


class HandshakeError(WireError):
    """The two sides cannot have a session.

    reason: one of "malformed", "clear" (the other side does not encrypt), "downgraded" (no cipher
    that both offer), "altered" (changed on the way, or a replay), "reflected", "identity" (a static
    key that the claimed identity did not sign), "wrong key" (a proven identity, but another than
    that peer's), "not allowed", "peer" (another peer than called), "schemas" (another run or other
    declared messages), "refused" (the other side said so).
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class MessageTooLarge(WireError):
    """A message over the frame or mailbox limit."""


class PeerError(ShoalError):
    """Another peer did not do its part; also carries the text of a handler's exception."""


class DeadlineExceeded(PeerError):
    """No answer before the deadline."""


class PeerUnreachable(PeerError):
    """There is no way to that peer."""


class ProgramError(ShoalError):
    """A peer program broke a rule of the kernel."""


class MutatedAfterSend(ProgramError):
    """A tensor was changed in place while the kernel still held it."""


class UndeclaredMessage(ProgramError, TypeError):
    """A class that is no `@message` was sent or received."""


class SimulationError(ShoalError):
    """The run cannot go on."""


class Stalled(SimulationError):
    """Peers wait, and nothing is left that could wake them."""


class LimitReached(SimulationError):
    """The run exceeded a stated limit."""


class Cancelled(BaseException):
    """Thrown into a task that was cancelled; let it pass."""


class Leaving(BaseException):
    """Thrown into a peer's tasks when it leaves; they may await for the grace period."""
