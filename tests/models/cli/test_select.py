"""`jaxquant select`: what it selects and reports, resumed runs, one clear line for bad input."""

import json

import pytest

from jaxquant.selection import zip_selection
from jaxquant.selection.compression import compression_ratio
from jaxquant_models.runs.selecting import text_of
from tests.support.command import fails
from tests.support.stopped import stopped_at
from tests.support.text_pools import pool_of_texts

TEXTS, SOURCES = pool_of_texts(each=40)
STAGES = ("--k1", 40, "--k2", 20, "--k3", 10)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    file = tmp_path_factory.mktemp("select") / "pool.jsonl"
    rows = [json.dumps({"id": i, "text": text, "tags": []}) for i, text in enumerate(TEXTS)]
    file.write_text("\n\n".join(rows) + "\n")
    return file


def written(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_is_selected_and_reported(pool, run, tmp_path):
    out = tmp_path / "out.jsonl"
    status, text, err = run("select", pool, "--budget", 2000, "--out", out, "--json", *STAGES)
    assert status == 0 and "error" not in err
    report, rows = json.loads(text), written(out)
    assert all(row["text"] == TEXTS[row["id"]] for row in rows)  # the lines, unchanged
    texts = [row["text"] for row in rows]
    assert report["items"] == len(rows) and report["items_of_pool"] == 80
    assert report["tokens"] == sum(-(-len(t) // 4) for t in texts) <= 2000
    assert report["compression_ratio"] == compression_ratio(texts, serialize="text")
    assert report["compression_ratio_of_pool"] == compression_ratio(TEXTS, serialize="text")
    lowest = report["lowest_compression_ratio_of_random_draws"]
    assert report["compression_ratio"] < lowest <= report["compression_ratio_of_random_draws"]
    assert report["repeated_items"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    sources = [SOURCES[row["id"]] for row in rows]
    assert len(set(sources)) == len(sources)


def test_faithful_selects_items_of_whole_lines(pool, run, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ("select", pool, "--budget", 15, "--faithful", "--out", out, *STAGES)
    status, text, _ = run(*command)
    assert status == 0 and "items: 20\n" in text
    values = [json.loads(line) for line in pool.read_text().split("\n\n")]
    picks = zip_selection.zip_select(values, 15, faithful=True, k1=40, k2=20, k3=10).indices
    assert written(out) == [values[i] for i in picks]


def test_a_tokenizer_and_a_field(pool, tiny, run, tmp_path):
    found = {}
    for name, folder in (("model", tiny), ("tokenizer", tmp_path / "only")):
        if name == "tokenizer":
            folder.mkdir()
            (folder / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
        options = ("--tokenizer", folder, "--field", "text", "--budget", 3000, "--json")
        status, text, _ = run("select", pool, "--out", tmp_path / name, *options, *STAGES)
        assert status == 0
        found[name] = json.loads(text)
        assert found[name]["tokens"] == sum(len(r["text"]) for r in written(tmp_path / name))
    assert (tmp_path / "model").read_bytes() == (tmp_path / "tokenizer").read_bytes()


def test_text_of_a_line():
    assert text_of({"a": ["b", {"c": "d"}], "e": 3, "f": None}) == "b\nd"
    assert text_of("x") == "x" and text_of(3) == ""


def test_a_budget_that_covers_the_file(pool, run, tmp_path):
    out = tmp_path / "out.jsonl"
    status, text, err = run("select", pool, "--budget", 10**6, "--out", out)
    assert status == 0 and "every item is selected" in err and "items: 80\n" in text
    assert [row["id"] for row in written(out)] == list(range(80))


def test_one_item_constant_data_and_lines_without_text(run, tmp_path):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('"only one"\n')
    assert run("select", file, "--budget", 2, "--out", out)[0] == 0
    assert written(out) == ["only one"]
    file.write_text('"the same"\n' * 30 + "3\n")
    status, text, _ = run("select", file, "--budget", 9, "--out", out, "--overwrite", "--json")
    report = json.loads(text)
    assert status == 0 and written(out) == ["the same"] * 4
    assert report["tokens"] == 8 and report["repeated_items"] == 3
    assert report["repeated_items_of_pool"] == 29


@pytest.mark.parametrize("count", [2, 40, 84])  # the sizes, scores, a round
def test_a_killed_run_goes_on(pool, run, tmp_path, monkeypatch, count):
    monkeypatch.setattr(zip_selection, "SAVE_EVERY", 0.0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ("select", pool, "--budget", 2000, *STAGES)
    assert run(*command, "--out", whole)[0] == 0
    stopped_at(count, *command, "--out", cut)
    assert not cut.exists()
    status, _, err = run(*command, "--out", cut)
    assert status == 0 and ("continuing from" in err) == (count > 2)
    assert cut.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_killed_after_the_output_was_written(pool, run, tmp_path, monkeypatch):
    """The same command ends well; without the folder, the file is not replaced."""
    out = tmp_path / "out.jsonl"
    command = ("select", pool, "--out", out, *STAGES, "--budget")
    with monkeypatch.context() as patch:
        patch.setattr("jaxquant.durable.store.Folder.remove", _stop)
        fails(run(*command, 2000), 1, "the disk is gone")
    assert len(list(tmp_path.iterdir())) == 2
    kept = out.read_bytes()
    assert run(*command, 2000)[0] == 0 and out.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    fails(run(*command, 2000), 2, "exists; give --overwrite to replace it")
    assert run(*command, 1000, "--overwrite")[0] == 0 and out.read_bytes() != kept


def _stop(folder):
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"", "", "holds no items: expected one JSON value per line"),
        (b'{"a": "b"}\n{"a": \n', "", "line 2 is not JSON"),
        (b'"a"\n"\xff"\n', "", "line 2 is not UTF-8 text"),
        (b"3\n[4]\n", "", "no item of"),
        (b'"a text of more"\n', "--budget 1", "the smallest has 4; give a larger --budget"),
        (b'{"a": "b"}\n', "--field b", "line 1 has no field 'b'; its fields: 'a'"),
        (b'["a"]\n', "--field b", "line 1 must be an object"),
        (b'"a"\n', "--tokenizer /nowhere", "no model '/nowhere'"),
    ],
)
def test_bad_files(run, tmp_path, data, options, message):
    file = tmp_path / "in.jsonl"
    file.write_bytes(data)
    options = (*options.split(), *(() if "--budget" in options else ("--budget", 9)))
    fails(run("select", file, "--out", tmp_path / "out", *options), 1, message)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--out {pool} --budget 5 --overwrite", 2, "which is read; give another file"),
        ("--out {tmp} --budget 5", 2, "is a directory; give the name of a file"),
        ("--out {pool} --budget 5", 2, "exists; give --overwrite"),
        ("--out {tmp}/x --budget 0", 2, "not in the range"),
        ("--out {tmp}/x --budget 5 --k2 300 --k3 301", 2, "--k1 >= --k2 >= --k3 >= 1"),
        ("--out {tmp}/x --budget 5 --faithful --codec lzma", 2, "--faithful needs --codec zlib"),
        ("--out {pool}/x --budget 5", 2, "is not a writable directory"),
    ],
)
def test_bad_usage(pool, run, tmp_path, options, status, message):
    options = options.format(pool=pool, tmp=tmp_path).split()
    fails(run("select", pool, *options), status, message)
    fails(run("select", "/nowhere", "--budget", 5, "--out", tmp_path / "x"), 1, "cannot read")
