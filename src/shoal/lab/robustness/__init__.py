"""The robustness matrix: rules x attacks x numbers of liars, for servers and for graphs.

`make.py` plans and runs it, `cases.py` holds its cells, `liars.py` says who lies and what a rule is
told, `breakdown.py` bisects, `matrix.py` is what came out and `page.py` draws it.
"""

from shoal.lab.robustness.cases import parts_named
from shoal.lab.robustness.make import ATTACKS, BELOW, HOSTS, RULES, SHARES, make_matrix
from shoal.lab.robustness.matrix import Breakdown, Entry, Matrix

__all__ = [
    "ATTACKS", "BELOW", "HOSTS", "RULES", "SHARES", "Breakdown", "Entry", "Matrix", "make_matrix",
    "parts_named",
]  # fmt: skip
