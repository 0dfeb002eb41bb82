"""Finding cards by source text and by import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.card_text import read_card


def test_cards_are_read_without_running_them(catalogue: Path) -> None:
    (catalogue / "fakes" / "explosive.py").write_text(
        'raise RuntimeError\n\nSYSTEM = System(\n    name="boom", kind="study",\n'
        '    title="one" " two",\n)\n'
    )
    card = next(c for c in discover.cards("fakes") if c.name == "boom")
    assert card.title == "one two"
    assert card.summary()["paper"] is None


def test_text_and_import_agree(catalogue: Path) -> None:
    for name in ("alpha", "beta-x"):
        text, live = discover.find(name), discover.load(name)
        assert (text.name, text.kind, text.title) == (live.name, live.kind, live.title)
        assert text.source == live.source
        assert text.arms == tuple(live.all_arms())
        assert text.deviations == live.deviations
        assert [c.name for c in text.claims] == [c.name for c in live.claims]
        assert [c.bound for c in text.claims] == [">= 0.01", "<= 1.1", "<= 2.0", ">= 0.99"]
        assert text.claims[2].expected == "fails"
        assert dict(text.settings)["note"] == "'plain'"
        assert text.doc.endswith("It exists for tests.")


def test_the_short_reading_equals_the_whole_one(catalogue: Path) -> None:
    file = catalogue / "fakes" / "alpha.py"
    whole = read_card(file.read_text(), "f", "fakes", catalogue)
    short = read_card(file.read_text(), "f", "fakes", catalogue, whole=False)
    assert whole is not None
    assert short is not None
    assert (short.summary(), short.claims) == (whole.summary(), whole.claims)


def test_unknown_names_come_with_near_ones(catalogue: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'alpha'"):
        discover.load("alhpa")
    with pytest.raises(UsageError, match="no family 'fake'"):
        discover.cards("fake")
    assert discover.scenario("fakes.tiny").peers == 6
    with pytest.raises(UsageError, match=r"did you mean 'fakes\.tiny'"):
        discover.scenario("fakes.tinny")


def test_names_are_unique(catalogue: Path) -> None:
    text = (catalogue / "fakes" / "alpha.py").read_text()
    (catalogue / "fakes" / "again.py").write_text(text)
    with pytest.raises(UsageError, match="'alpha' exists already"):
        discover.cards()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SYSTEM = 3\n", "must be a literal System"),
        ("SYSTEM = System(\n", "not Python"),
        ('SYSTEM = System(name="x", kind="study", title=make())\n', "no literal title"),
    ],
)
def test_broken_cards_are_named(catalogue: Path, text: str, message: str) -> None:
    (catalogue / "fakes" / "broken.py").write_text(text)
    with pytest.raises(UsageError, match=rf"broken\.py.*{message}"):
        discover.cards()


def test_the_package_and_the_list_load_no_torch() -> None:
    code = (
        "import sys, time, shoal\n"
        "start = time.process_time()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from shoal.lab import discover\n"
        "discover.cards()\n"
        "from shoal import Scenario, System, UsageError, Part, load\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'networkx', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(start, time.process_time())\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    imported, listed = map(float, found)
    # CPU seconds, since other work on the machine stretches the wall clock.
    assert imported < 0.3
    assert listed < 0.5


def test_every_public_name_resolves() -> None:
    import shoal

    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
    assert set(shoal.__all__) == {*shoal._WHERE, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shoal.nothing  # noqa: B018
