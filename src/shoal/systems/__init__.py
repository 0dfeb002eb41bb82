"""The catalogue: one folder per family, one file per system, each with its card `SYSTEM`.

A system's file holds the idea and ends with `SYSTEM = System(...)`. That is the whole enrolment:
`shoal list`, the documentation, the tests and `shoal reproduce` walk these folders. A family's
shared scenarios are the mapping `SCENARIOS` in its `scenarios.py`. Systems import neither each
other nor engines; what a second system needs moves to `shoal.parts`.
"""
