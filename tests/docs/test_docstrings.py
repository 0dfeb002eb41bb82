"""The examples in docstrings run, and everything in the public face says what it is."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
from doc_pages import ROOT

import shoal

SOURCE = ROOT / "src"
WITH_EXAMPLES = tuple(
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted((SOURCE / "shoal").rglob("*.py"))
    if ">>>" in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    tried = 0
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        tried += runner.run(example, out=said.append).attempted
    assert tried, f"{name}: its examples are found by nobody (put them into a docstring)"
    assert not runner.failures, "".join(said)


def test_every_public_name_says_what_it_is() -> None:
    for name in shoal.__all__:
        if name != "__version__":
            doc = inspect.getdoc(getattr(shoal, name)) or ""
            assert len(doc) > 15, name
            assert doc.split("\n\n")[0].rstrip().endswith((".", ":")), f"{name}: no sentence"
