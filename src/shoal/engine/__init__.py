"""Interpreters of peer programs: `event` (virtual time), `lockstep` (one tensor), `live` (sockets).

executor.py  where arithmetic runs: in this process or in a spawned pool
"""
