"""Every page is true: its links, its commands, its Python, and the tables that are generated."""

import json
import os
import re

import pytest
from click.testing import CliRunner

from jaxquant_models.cli.commands import cli
from pallas_kernels.cpu import native
from tests.benchmarks import record, report
from tests.documents import commands, pages, support_table
from tests.support.pods import BYTES_WITHIN

PAGES = pages.found()
HISTORY = pages.ROOT / "CHANGELOG.md"  # which speaks of what was
NAMES = [str(page.relative_to(pages.ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def run_blocks(page, kinds):
    """Execute the Python of a page in one namespace; an error names the page's line."""
    names = {"__name__": page.stem}
    for block in pages.blocks(page):
        if block.info in kinds:
            text = "\n" * block.line + block.text
            exec(compile(text, str(page.relative_to(pages.ROOT)), "exec"), names)


@each_page
def test_links_lead_somewhere(page):
    wrong = [pages.broken_link(page, target) for target in pages.links(page)]
    assert not any(wrong), list(filter(None, wrong))


@each_page
def test_files_that_a_page_names_are_there(page):
    wrong = [pages.missing_path(page, span) for span in pages.spans(page)]
    assert page == HISTORY or not any(wrong), list(filter(None, wrong))


@each_page
def test_blocks_are_of_a_known_kind(page):
    unknown = {b.info for b in pages.blocks(page)} - {"", "python", "python model", "sh"}
    assert not unknown, f"tests/documents/pages.py says which kinds there are, not {unknown}"


@each_page
def test_commands_are_there(page):
    if page == HISTORY:
        return
    for block in pages.blocks(page):
        if block.info == "sh":
            for line in commands.lines(block.text):
                commands.check(line)
    for span in filter(commands.BEGINS.match, pages.spans(page)):
        commands.check(span, whole=False)


WITH_PYTHON = [p for p in PAGES if any(b.info.startswith("python") for b in pages.blocks(p))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda p: str(p.relative_to(pages.ROOT)))
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page, {"python"})


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "page",
    [p for p in WITH_PYTHON if any(b.info == "python model" for b in pages.blocks(p))],
    ids=lambda p: str(p.relative_to(pages.ROOT)),
)
def test_python_of_a_page_with_a_model_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page, {"python", "python model"})


@pytest.mark.parametrize("name", [*cli.commands, None])
def test_every_command_explains_itself(name):
    shown = CliRunner().invoke(cli, [*filter(None, [name]), "--help"])
    assert shown.exit_code == 0 and "Usage" in shown.output


def test_the_readme_is_short_and_prints_what_it_says(capsys, tmp_path, monkeypatch):
    readme = pages.ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 200
    first = next(b for b in pages.blocks(readme) if b.info == "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(first.text, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "4.3125" in out and "packed matmul" in out


@pytest.mark.parametrize("name", ["models/README.md", "tests/benchmarks/README.md"])
def test_pages_say_how_near_the_planned_bytes_are_as_the_test_checks_it(name):
    """In the unit of the pages, which is percent."""
    found = re.findall(r"differ[^.]* by less than ([\d.]+) %", (pages.ROOT / name).read_text())
    assert [float(percent) for percent in found] == [pytest.approx(100 * BYTES_WITHIN)]


# --- what is generated


@pytest.mark.parametrize(
    "page", support_table.REGIONS, ids=lambda p: str(p.relative_to(pages.ROOT))
)
def test_what_serves_each_method_is_up_to_date(page):
    """The page agrees with `jq.explain` for every method and backend."""
    if reason := native.load():
        pytest.skip(f"no native kernels here: {reason}")
    _, inside, _ = support_table.region(page)
    assert inside == support_table.REGIONS[page](), "run python -m tests.documents.support_table"


def test_the_page_of_results_is_up_to_date():
    assert report.PAGE.read_text() == report.page(), "run python -m tests.benchmarks.report"


def test_every_file_of_results_is_on_the_page():
    listed = [name for names in report.SECTIONS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert {f.stem for f in report.RESULTS.glob("*.json")} == {*listed, report.CURVE}


def test_a_record_keeps_sentences_and_replaces_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "TEXT", "--json", "x.json", "--bits", "2"])
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"title": "A title", "note": "Kept.", "commit": "0", "rows": [[1]]}))
    rows = record.Record(str(file), "bits", "loss")
    rows.add(2, 1 / 3)
    found = json.loads(file.read_text())
    assert found["rows"] == [["2", "0.33333"]] and found["columns"] == ["bits", "loss"]
    assert (found["title"], found["note"]) == ("A title", "Kept.") and "commit" not in found
    assert found["command"].endswith("TEXT --bits 2")
    with pytest.raises(ValueError, match="expected 2 cells"):
        rows.add(2)


# --- the tests above can fail


@pytest.fixture
def page(tmp_path):
    made = tmp_path / "page.md"
    made.write_text("# A title, `x`\n\n## Twice\n\n## Twice\n\n[b](page.md#twice-1) [c](no.md)\n")
    return made


@pytest.mark.parametrize(
    ("target", "wrong"),
    [("page.md#a-title-x", None), ("#twice-1", None), ("https://example.org/x", None),
     ("#twice-2", "heading"), ("no.md", "file"), ("page.md#no", "heading")],
)  # fmt: skip
def test_a_broken_link_is_seen(page, target, wrong):
    found = pages.broken_link(page, target)
    assert found is None if wrong is None else wrong in found


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("jaxquant quantize MODEL --out DIR --bits 4", None),
        ("jaxquant quantize MODEL --bits 4", "Missing option '--out'"),
        ("jaxquant quantize MODEL --out DIR --bit 4", "No such option"),
        ("jaxquant quantize MODEL --out DIR --bits four", "not a valid float"),
        ("jaxquant publish MODEL", "no command 'publish'"),
        ("JAX_PLATFORMS=cpu make demo TEXT=FILE  # minutes", None),
        ("make coffee", "no target"),
        ("python -m tests.benchmarks.decode --coded DIR", None),
        ("python -m tests.benchmarks.decode --decoded DIR", "no option"),
        ("python -m tests.benchmarks.nothing", "there is no"),
        ("pip install '.[models]'", None),
        ("pip install '.[nothing]'", "no extra"),
        ("rm -rf /", "no rule"),
    ],
)
def test_a_wrong_command_is_seen(command, wrong):
    if wrong is None:
        return commands.check(command)
    with pytest.raises(ValueError, match=re.escape(wrong)):
        commands.check(command)
    return None


def test_a_wrong_option_in_a_sentence_is_seen():
    commands.check("jaxquant inspect --outliers", whole=False)
    with pytest.raises(ValueError, match="no option"):
        commands.check("jaxquant inspect --inliers", whole=False)


def test_an_error_in_a_block_names_the_line(tmp_path, monkeypatch):
    made = tmp_path / "page.md"
    made.write_text("text\n\n```python\n1 / 0\n```\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    with pytest.raises(ZeroDivisionError) as error:
        run_blocks(made, {"python"})
    assert error.traceback[-1].lineno + 1 == 4
    assert os.fspath(error.traceback[-1].path).endswith("page.md")
