"""Where numbers came from: versions, processor, and a digest of the code that made them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from shoal.base.digest import bytes_digest

_LIBRARIES = ("torch", "numpy", "scipy", "networkx", "msgspec", "scikit-learn", "numba")
# What can change a run's numbers; reports and commands only show them.
_CODE = ("base", "tensor", "wire", "kernel", "world", "rounds", "parts", "engine", "systems")


def version() -> str:
    """The installed version of Shoal."""
    try:
        return importlib.metadata.version("shoal")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def code_digest() -> str:
    """Digest of all source that can change a run's numbers; a changed line is other code."""
    return _code_digest(os.environ.get("SHOAL_SYSTEMS", ""))


@lru_cache(maxsize=8)
def _code_digest(extra: str) -> str:
    root = Path(__file__).parents[1]
    files = sorted(f for name in _CODE for f in (root / name).rglob("*.py"))
    files += [root / "lab" / name for name in ("build.py", "launch.py", "run.py", "faults.py")]
    for folder in filter(None, extra.split(os.pathsep)):
        files += sorted(Path(folder).rglob("*.py"))
    parts = []
    for file in files:
        if file.exists():
            parts += [file.name.encode(), b"\0", file.read_bytes(), b"\0"]
    return bytes_digest(*parts)


def fingerprint() -> dict[str, Any]:
    """What a report says about the machine and the versions. Imports nothing heavy."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    torch = sys.modules.get("torch")
    return {
        "shoal": version(),
        "code": code_digest()[:12],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads() if torch else None,
        **versions,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
