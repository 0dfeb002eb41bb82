"""The pages are complete and current: what is generated, what they link to, what they name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from doc_pages import PAGES, ROOT, anchors, blocks, commands, links, text_of

import shoal
from shoal import parts
from shoal.lab import discover, pages, reference
from shoal.lab.card import Claim, System, at_most, value
from shoal.lab.experiment import Experiment
from shoal.lab.replay import replay
from shoal.lab.report import Report
from shoal.lab.scenario import Scenario

SYSTEM = '''"""A study for this test."""

from shoal import Claim, Scenario, System, at_most, value


def make(scenario, size: float = 2.0):
    """The square of a size."""
    return {"square": size * size}


SYSTEM = System(
    name="squares",
    kind="study",
    title="Squares | and bars",
    make=make,
    scenario=Scenario("squares", peers=2, rounds=1),
    claims=(
        Claim(
            "small", "the square is small", at_most(5), metric="square", compare=value("squares")
        ),
        Claim(
            "tiny", "the square is tiny", at_most(1), metric="square", compare=value("squares"),
            expected="fails", reason="two squared is four",
        ),
    ),
)
'''


def test_generated_pages_are_current() -> None:
    wrong = [path.relative_to(ROOT).as_posix() for path in pages.stale(ROOT)]
    assert not wrong, f"out of date: {wrong} (run python -m shoal.lab.pages)"


def test_every_public_name_is_in_the_contracts() -> None:
    explained = reference.public_names()
    text = text_of("docs/contracts.md")
    for name in shoal.__all__:
        if name != "__version__":
            assert name in explained or re.search(rf"^\W*{name}\b", text, re.MULTILINE), name


def test_every_system_and_part_has_its_place() -> None:
    readme = text_of("README.md")
    for card in discover.cards():
        assert f"docs/systems/{card.name}.md" in readme
    listed = text_of("docs/parts.md")
    for role in parts.roles():
        for name in parts.names(role):
            assert f"| `{name}` |" in listed or f"| `{role}.{name}` |" in listed


def test_design_names_every_layer() -> None:
    drawn = next(b.code for b in blocks("docs/design.md") if "src/shoal/" in b.code)
    layers = {p.parent.name for p in (ROOT / "src" / "shoal").glob("*/__init__.py")}
    assert {name for name in layers if f"  {name}/" not in drawn} == set()


def test_numbers_of_attacks_and_defences_in_the_readme_are_current() -> None:
    robust = [name for name in parts.names("aggregate") if name != "mean"]
    counts = f"| {len(parts.names('attack'))} / {len(robust)} |"
    assert f"attacks / robust aggregators {counts}" in text_of("README.md")


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository's root with one more system, and its report."""
    family = tmp_path / "more" / "tests"
    family.mkdir(parents=True)
    (family / "squares.py").write_text(SYSTEM, encoding="utf-8")
    monkeypatch.setenv("SHOAL_SYSTEMS", str(tmp_path / "more"))
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    root = tmp_path / "root"
    (root / "docs" / "reports").mkdir(parents=True)
    return root


def test_page_of_a_system_tells_its_claims_and_report(squares: Path) -> None:
    card, system = discover.find("squares"), discover.load("squares")
    before = pages.system_page(card, system, pages.committed(squares, "squares"))
    assert "None yet. `shoal reproduce squares --budget full` makes one." in before
    assert 'Why *tiny* is expected to be "fails": two squared is four' in before
    assert pages.verdicts(system, None) == "2, not measured yet"
    whole = Experiment.of_system("squares").run()
    pages.keep(squares, whole)
    report = pages.committed(squares, "squares")
    after = pages.system_page(card, system, report)
    assert "| tiny | 4 |" in after
    assert after == pages.system_page(card, system, pages.committed(squares, "squares"))
    assert pages.verdicts(system, report) == "1 holds, 1 fails (as the card says)"
    assert report is not None
    assert report.verdicts == whole.verdicts
    assert report.summary() == whole.summary()
    assert all(found.same for found in replay(report))
    whole.budget = "small"
    with pytest.raises(shoal.UsageError, match="need a reproduction in full"):
        pages.keep(squares, whole)


def test_a_verdict_that_the_card_did_not_expect_shows(squares: Path) -> None:
    report = Experiment.of_system("squares").run()
    claims = (Claim("small", "small", at_most(5), metric="square", compare=value("squares")),)
    surprised = System("squares", "study", "Squares", claims=claims)
    report.verdicts = tuple(v for v in report.verdicts if v.name == "small")
    assert pages.verdicts(surprised, report) == "1 holds"
    changed = vars(report.verdicts[0]) | {"verdict": "fails"}
    report.verdicts = (type(report.verdicts[0])(**changed),)
    assert pages.verdicts(surprised, report) == "1 fails (1 not as the card says)"


def test_check_writes_nothing_and_write_mends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "systems").mkdir(parents=True)
    gone = tmp_path / "docs" / "systems" / "of-a-system-that-is-gone.md"
    gone.write_text("old", encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "# x\n<!-- systems: generated -->\n<!-- systems: end -->\n", encoding="utf-8"
    )
    assert pages.main([str(tmp_path), "--check"]) == 1
    assert gone.exists()
    assert "out of date" in capsys.readouterr().out
    assert pages.main([str(tmp_path)]) == 0
    assert not gone.exists()
    assert pages.stale(tmp_path) == []
    with pytest.raises(shoal.UsageError, match="name the repository's root"):
        pages.main([str(tmp_path / "docs")])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target} leads nowhere"
        if anchor and found.suffix == ".md":
            other = found.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(other), f"{page}: {other} has no heading #{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[str] = set()
    waiting = ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.endswith(".md"):
            continue
        seen.add(page)
        for target in links(page):
            path = target.partition("#")[0]
            if path and "://" not in target:
                waiting.append(((ROOT / page).parent / path).resolve().relative_to(ROOT).as_posix())
    assert seen == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = text_of(page)
    for path in set(re.findall(r"\b(?:examples|docs|tests|src)/[\w/.-]+\.\w+", text)):
        if "/reports/" not in path:
            assert (ROOT / path).exists(), f"{page}: {path} does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_have_a_language(page: str) -> None:
    for block in blocks(page):
        assert block.language, f"{page}:{block.line}: name the block's language"


@cache
def command_line() -> Any:
    import typer

    from shoal.cli.app import app

    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Parse `shoal ...` as the command line does, without running it."""
    group = command_line()
    context = group.make_context("shoal", list(words), resilient_parsing=False)
    rest = [*context._protected_args, *context.args]
    if not rest:
        return
    name, command, left = group.resolve_command(context, rest)
    parsed = command.make_context(name, list(left), parent=context)
    check_names(name, parsed.params)


def check_names(command: str, params: dict[str, object]) -> None:
    """Systems and example files that a command line names must exist."""
    if command not in ("run", "show", "compare", "reproduce", "explore"):
        return
    for word in ("what", "name", "names", "system"):
        value = params.get(word) or ()
        for each in (value,) if isinstance(value, str) else tuple(value):  # type: ignore[call-overload]
            if each.endswith(".toml"):
                assert (ROOT / each).exists() or not each.startswith("examples/"), each
            else:
                assert each in discover.names(), f"shoal {command}: no system {each!r}"


def test_command_lines_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    for page in PAGES:
        for line, words, _ in commands(page):
            place = f"{page}:{line}: {' '.join(words)}"
            if words[0] == "make":
                assert set(words[1:]) <= targets, f"{place}: no such target"
            if words[0] != "shoal" or "NAME" in words:
                continue
            seen += 1
            try:
                parse(words[1:])
            except Exception as error:
                raise AssertionError(f"{place}: {error}") from error
    assert seen > 20


def test_a_wrong_command_line_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "dpsgd", "--pears", "3"])
    with pytest.raises(AssertionError, match="no system"):
        parse(["show", "no-such-system"])


@pytest.mark.timeout(240)  # Some pages start processes, which is slow on a busy machine.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(run for _, _, run in commands(page))]
)
def test_console_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a page's ```console blocks, in order, in one empty folder."""
    from typer.testing import CliRunner

    from shoal.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    for line, words, run in commands(page):
        if run:
            assert words[0] == "shoal", f"{page}:{line}: only shoal is run"
            result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{page}:{line}: {result.output}"


def test_scenario_files_on_pages_are_valid(tmp_path: Path) -> None:
    seen = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language != "toml":
                continue
            seen += 1
            file = tmp_path / f"{seen}.toml"
            file.write_text(block.code, encoding="utf-8")
            experiment = Experiment.load(file)
            assert isinstance(experiment.scenario, Scenario)
            assert experiment.cells()
    assert seen


def test_picture_of_a_report_is_small() -> None:
    for target in links("README.md"):
        if target.endswith(".png"):
            data = (ROOT / target).read_bytes()
            assert data.startswith(b"\x89PNG")
            assert len(data) < 300_000


def test_reports_that_are_committed_load() -> None:
    for file in sorted((ROOT / "docs" / "reports").glob("*.json")):
        report = Report.load(file)
        assert report.system == file.stem
