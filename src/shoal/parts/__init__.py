"""Algorithms by role, one method per file, found by name.

`parts/<role>/<name>.py` defines the class `<Name>` in camel case: `trimmed_mean.py` holds
`TrimmedMean`. That is the whole registry: scenario files, the command line and the contract suites
walk the folders. A file that starts with an underscore, and `base.py`, holds what several share.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from shoal.base.errors import UsageError

# Abbreviations that a class name keeps in capitals.
_CAPITALS = {
    "mnist": "MNIST",
    "mlp": "MLP",
    "cnn": "CNN",
    "nnm": "NNM",
    "nna": "NNA",
    "alie": "ALIE",
    "mda": "MDA",
    "smea": "SMEA",
    "caf": "CAF",
    "arc": "ARC",
    "sgd": "SGD",
    "adamw": "AdamW",
    "diloco": "DiLoCo",
    "fashion": "Fashion",
    "fedzip": "FedZip",
    "transformer": "Transformer",
    "smollm2": "SmolLM2",
}


# A walk through the folders takes milliseconds, and rules that wrap others ask in each round.
@cache
def roles() -> tuple[str, ...]:
    """Every role that has parts."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg))


@cache
def names(role: str) -> tuple[str, ...]:
    """The parts of a role by name, such as `names("aggregate")`."""
    if role not in roles():
        raise UsageError(f"parts: no role {role!r}; there are {', '.join(roles())}")
    package = importlib.import_module(f"{__name__}.{role}")
    return tuple(
        sorted(
            m.name
            for m in pkgutil.iter_modules(package.__path__)
            if not m.ispkg and not m.name.startswith("_") and m.name != "base"
        )
    )


def class_name(name: str) -> str:
    """The class that a file of this name holds.

    >>> class_name("trimmed_mean")
    'TrimmedMean'
    """
    return "".join(_CAPITALS.get(part, part.capitalize()) for part in name.split("_"))


def find(role: str, name: str) -> type[Any]:
    """The class of a part, such as `find("aggregate", "trimmed_mean")`."""
    known = names(role)
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(f"parts: no {role} named {name!r}{hint}; there are {', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{role}.{name}")
    return getattr(module, class_name(name))
