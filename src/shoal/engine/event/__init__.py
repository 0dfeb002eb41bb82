"""Virtual time: one heap of events, coroutines resumed in a fixed order.

simulation.py  the loop, the `Host` of every runtime, faults
delivery.py    from send to mailbox: latency, bandwidth, loss, partitions, strict wire
batching.py    computations of many peers as one call
"""

from shoal.engine.event.simulation import EventSettings, Observer, simulate

__all__ = ["EventSettings", "Observer", "simulate"]
