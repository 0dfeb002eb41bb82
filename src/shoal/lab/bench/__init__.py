"""Speed and memory, measured on the machine at hand and held against bounds: `shoal bench`.

One file, one bench: a module without a leading underscore that holds

    def measure(tiny: bool, note: Note) -> Iterator[Row]

and whose docstring begins with its title. Every bench runs in a process of its own with one thread
of arithmetic; what is compared is measured side by side, taking turns, and a row holds medians.
`tiny` asks for the smallest sizes, at which the code is tried out and nothing is judged.
"""

from shoal.lab.bench._row import Note, Row, bounded, missing
from shoal.lab.bench._run import find, names, run, title

__all__ = ["Note", "Row", "bounded", "find", "missing", "names", "run", "title"]
