"""Every error that Shoal raises on purpose.

    ShoalError
    ├── UsageError            a setting, file or call that cannot work; raised at construction
    ├── WireError             bytes on or from the wire
    │   ├── DecodeError         malformed, truncated, wrong type or wrong checksum
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
