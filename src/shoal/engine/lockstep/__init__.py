"""A round of all peers, and of several seeds, as a few tensor calls.

lockstep.py  the rounds: work, attack, encode, exchange, conclude
timeline.py  who is alive when, what is slow, lost or cut: faults on tensors of times
traffic.py   when each message of a wave arrives, by the formulas of `world`
checkpoint.py  what rounds have changed, in a file, so that a killed run goes on
"""

from shoal.engine.lockstep.checkpoint import Checkpoint
from shoal.engine.lockstep.lockstep import LockstepSettings, run_lockstep
from shoal.engine.lockstep.pace import round_seconds

__all__ = ["Checkpoint", "LockstepSettings", "round_seconds", "run_lockstep"]
