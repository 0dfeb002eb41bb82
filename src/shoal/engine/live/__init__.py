"""Peer programs on real sockets: the same text as on the event engine, in real time.

driver.py     the peers of one process; the `Host` of their runtimes over an asyncio loop
delivery.py   from `send` to a connection, through the faults of links (proxy.py)
transport.py  one peer's listener and connections (outgoing.py, incoming.py): TCP, one per ordered
              pair of peers; turns.py: whose connection is read next
schedule.py   faults of peers and clocks: what happens when; timers.py: deadlines
compute.py    local work in a thread (worker.py), so that the loop keeps answering
memory.py     what survives a crash, in memory or in files (store.py)
launch.py     `run_live`: one process or several (member.py), from the announced start to the
              merged `Run`; control.py: what they say to each other
join.py       `join_live`: one peer of a run that nobody launches (joining.py, its settings); it
              keeps up with the others by circle.py, desk.py and book.py, and comes back from a
              crash as who it was (membership.py)
settings.py   how the engine works

What is real here is not simulated: `network.links` and `network.device` give no latency, bandwidth
or computing time (the machine has its own); only the links' `loss` and the fault list are applied,
with the same keyed draws as in simulation.
"""

from shoal.engine.live.launch import run_live
from shoal.engine.live.settings import LiveSettings

__all__ = ["LiveSettings", "run_live"]
