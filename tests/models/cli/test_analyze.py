"""`jaxquant analyze`: its numbers computed again, killed runs, one clear line for bad input."""

import functools
import json
import math
import shlex
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxquant as jq
from jaxquant.theory.hardware import HARDWARE
from jaxquant.theory.limits.limit import Limit, Suite
from jaxquant_models import load
from jaxquant_models.cli import analyze
from jaxquant_models.cli.commands import main
from jaxquant_models.report import page
from jaxquant_models.runs import stored_entropy
from jaxquant_models.runs.analysis import behavior, request, walls
from jaxquant_models.runs.analysis.analyze import Analyzed
from jaxquant_models.schemas.report import Report
from tests.support.command import fails
from tests.support.stopped import stopped_at
from tests.support.tiny_llama import BASE, random_tensors, write_folder

VARIANTS = (("gptq", 4), ("gptq", 2))
# All matrices of the layers have one shape, for which each method is compiled once.
CONFIG = BASE | {"hidden_size": 32, "intermediate_size": 32, "tie_word_embeddings": True}
CONFIG |= {"num_key_value_heads": CONFIG["num_attention_heads"], "num_hidden_layers": 2}
SMALL = request.Effort(2, 1024, VARIANTS, 1, 200)
# Its tokens hardly repeat, so that the hidden states of most are distinct.
TEXT = "".join(chr(97 + (i * i * 7 + i * 13 + i // 5) % 26) for i in range(1500))
SUITE = Suite((Limit("floor", "A share is wrong.", "theorem", 0.3, 0.25, True),))


def tensors_of(config=CONFIG):
    """Random tensors of two layers with as many heads of keys as of queries."""
    found = {n: w for n, w in random_tensors(config).items() if ".layers.2." not in n}
    for name in [n for n in found if "k_proj" in n or "v_proj" in n]:
        found[name] = np.concatenate([found[name], -found[name][::-1]])
    return found


@pytest.fixture(scope="module", autouse=True)
def small():
    """An effort with few variants, and a suite of limits that takes no time; it has its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(request.EFFORTS, "fast", SMALL)
        patch.setattr(stored_entropy, "FITTED", 10**9)  # no distributions are fitted
        patch.setattr(behavior, "run_suite", lambda *_, **__: SUITE)
        patch.setattr(behavior, "needed_tokens", lambda *_: 100)
        patch.setattr(walls, "HARDWARE", {name: HARDWARE[name] for name in ("v4", "h200", "m4")})
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A float model, a text, and the float model's report."""
    folder = tmp_path_factory.mktemp("analyze")
    write_folder(folder / "model", CONFIG, tensors_of())
    (folder / "text.txt").write_text(TEXT)
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in command(folder, folder / "whole")])
    assert not stop.value.code
    with pytest.MonkeyPatch.context() as patch:  # drawing takes seconds, and has its own tests
        patch.setattr(page, "render", lambda report: "<html></html>")
        yield folder


def command(folder, out, *options, model=None):
    text = folder / "text.txt"
    return (
        "analyze",
        model or folder / "model",
        "--text",
        text,
        "--effort",
        "fast",
        "--out",
        out,
        *options,
    )


def report_in(folder):
    return json.loads((folder / "report.json").read_bytes())


def shared_parts(report):
    """What a report says of the float model alone, and of the versions made of it."""
    frontier = dict(report["frontier"])
    places = ("command", "on_frontier")
    points = [{k: v for k, v in p.items() if k not in places} for p in frontier.pop("points")]
    named = {p["name"]: p for p in points if p["name"] != report["identity"]["model"]}
    dimensions = report["dimensions"]
    return frontier, named, dimensions["reference"] or dimensions["layers"]


def differences(a, b, at=""):
    """Paths at which two JSON values differ by more than rounding errors, and the values."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{at}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{at}/{i}")]
    near = isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-4)
    return [] if a == b or near else [(at, a, b)]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.cache
def log_probabilities(model):
    """On the second halves of the first two chunks, and the tokens after each position."""
    loaded = load(model)
    tokens = np.asarray(loaded.tokenizer.encode(TEXT))[:512].reshape(2, 256)
    logits = loaded.apply_fn(jq.dequantize(loaded.params), tokens)
    return log_softmax(np.asarray(logits, np.float64))[:, 128:255], tokens[:, 129:]


def scores(reference, model):
    """KL divergence, agreement and perplexity."""
    (p, tokens), (q, _) = log_probabilities(str(reference)), log_probabilities(str(model))
    likely = np.take_along_axis(q, tokens[..., None], -1)
    return {
        "kl": np.mean(np.sum(np.exp(p) * (p - q), -1)),
        "top1": np.mean(p.argmax(-1) == q.argmax(-1)),
        "perplexity": np.exp(-np.mean(likely)),
    }


def test_the_report(place):
    report = report_in(place / "whole")
    Report.model_validate(report)
    names = sorted(p.name for p in (place / "whole").iterdir())
    assert names[-2:] == ["report.html", "report.json"]
    assert sorted(p.name for p in place.iterdir()) == ["model", "text.txt", "whole"]
    stages = {"identity", "entropy", "outliers", "dimensions", "frontier", "tensors", "limits"}
    assert stages <= set(report["seconds"])
    assert report["limits"][0]["verdict"] == "holds"
    assert len(report["dimensions"]["layers"]) == CONFIG["num_hidden_layers"]
    assert report["findings"] and report["advice"]
    hot = [t["temperature"] for t in report["tensors"] if t["path"].startswith("layers/")]
    assert len(hot) == 7 and all(hot)
    assert report["identity"]["methods"] == {"float32": 7 * CONFIG["num_hidden_layers"] + 1}
    assert all(t["ideal"] <= t["entropy"] for t in report["tensors"])  # floats: mantissas too


def test_numbers_of_tensors(place):
    tensors = load_file(place / "model" / "model.safetensors")
    rows = {row["path"]: row for row in report_in(place / "whole")["tensors"]}
    stack = np.stack([tensors[f"model.layers.{i}.mlp.down_proj.weight"].T for i in range(2)])
    row = rows["layers/mlp/down/kernel"]
    assert row["shape"] == list(stack.shape) and row["kind"] == "mlp/down"
    assert (row["stored"], row["distortion"], row["gap"]) == (32.0, None, None)
    z = [(w - w.mean()) / w.std() for w in stack.astype(np.float64)]
    np.testing.assert_allclose(row["kurtosis"], np.mean([np.mean(a**4) - 3 for a in z]), atol=1e-4)
    largest = np.mean([np.abs(w).max() / np.sqrt(np.mean(w**2)) for w in stack])
    np.testing.assert_allclose(row["largest"], largest, rtol=1e-5)
    exponents = np.floor(np.log2(np.abs(stack[stack != 0]))).astype(int)
    _, counts = np.unique(exponents, return_counts=True)
    p = counts / counts.sum()
    np.testing.assert_allclose(row["exponent"], -np.sum(p * np.log2(p)), rtol=1e-6)
    found = {h["kind"]: h for h in report_in(place / "whole")["histograms"]}["mlp/down"]
    assert found["first"] == exponents.min() and sum(found["counts"]) == exponents.size


def test_the_chips(place):
    """Bandwidth and the intensity of a prompt, which the figure of the page needs."""
    report = report_in(place / "whole")
    c, t = CONFIG, report["context"]
    assert t == c["max_position_embeddings"]  # fewer than were asked for
    heads = c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"]
    table = c["vocab_size"] * c["hidden_size"]
    layers = sum(np.prod(row["shape"]) for row in report["tensors"][1:])
    operations = 2 * layers * t + 2 * table + 4 * heads * t * (t + 1) / 2
    norms = (2 * c["num_hidden_layers"] + 1) * c["hidden_size"]
    moved = 4 * (layers + table + norms) + 2 * 2 * heads * t  # float32 weights, bfloat16 cache
    bandwidths = {chip.title: chip.bandwidth for chip in HARDWARE.values()}
    for row in report["roofline"]:
        assert row["bandwidth"] == bandwidths[row["chip"]]
        # It counts the stacked scales of norms as products.
        np.testing.assert_allclose(row["prefill_intensity"], operations / moved, rtol=5e-3)


def test_recipes_are_named_from_anywhere(place, tmp_path, monkeypatch):
    """Only the folder of the recipe stands for a place, and a command may be run elsewhere."""
    monkeypatch.chdir(tmp_path)
    report = Report.model_validate(report_in(place / "whole"))
    command = "jaxquant quantize '/a/{out}/m' --recipe {out}/r.json --out r"
    advice = [report.advice[0].model_copy(update={"command": command})]
    report = report.model_copy(update={"advice": advice})
    found = analyze._placed(Analyzed(report, {}), "my report/").report.advice[0].command
    where = str(tmp_path / "my report")
    words = ["jaxquant", "quantize", "/a/{out}/m", "--recipe", f"{where}/r.json", "--out", "r"]
    assert shlex.split(found) == words


def test_numbers_of_the_frontier(place, run, tmp_path):
    """The command of a point makes a model with the bytes, bits, KL and agreement of the point."""
    report = report_in(place / "whole")
    frontier = report["frontier"]
    points = {p["name"]: p for p in frontier["points"]}
    assert {f"{m} {b} bits" for m, b in VARIANTS} <= set(points)
    lighter = next(name for name in points if name.endswith("+ embed 8 bits"))
    knee = points[lighter.partition(" + ")[0]]
    assert points[lighter]["bytes"] < knee["bytes"] and report["advice"][0]["kl"] < 1.1 * knee["kl"]
    assert report["advice"][0]["command"] == points[lighter]["command"]
    assert any("embed/embedding takes" in text for text in report["findings"])
    mixed = next(name for name in points if "mixed" in name)
    for name in (mixed, lighter):
        words = shlex.split(points[name]["command"])
        at = words.index("--out") + 1
        words[at] = str(tmp_path / words[at])
        assert words[0] == "jaxquant" and run(*words[1:], "--calibration-tokens", 1024)[0] == 0
        scored = scores(place / "model", words[at])
        for key, value in scored.items():
            np.testing.assert_allclose(points[name][key], value, rtol=1e-3, atol=1e-6)
        stored = json.loads(run("inspect", words[at], "--json")[1])
        assert stored["bytes"] == points[name]["bytes"]
        np.testing.assert_allclose(stored["bits_per_weight"], points[name]["bits_per_weight"])
    for p in points.values():
        others = [(q["bytes"], q["kl"]) for q in points.values()]
        mine = p["bytes"], p["kl"]
        assert p["on_frontier"] == all(
            b > mine[0] or k > mine[1] for b, k in others if (b, k) != mine
        )


@pytest.fixture(scope="module")
def packed(place):
    with pytest.raises(SystemExit):
        main(
            f"quantize {place}/model --method rtn --bits 4 --group-size 32 "
            f"--calibration-tokens 1024 --out {place}/packed".split()
        )
    yield place / "packed"
    shutil.rmtree(place / "packed")


def test_against_the_float_model(place, packed, run, tmp_path):
    """The run is killed in the midst of its work, and goes on."""
    out = tmp_path / "my report"
    words = command(place, out, "--against", place / "model", "--json", model=packed)
    stopped_at(12, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["my report.partial"]
    status, text, err = run(*words)
    assert status == 0 and "continuing from" in err
    assert [p.name for p in tmp_path.iterdir()] == ["my report"]
    report = report_in(out)
    assert json.loads(text) == report
    assert differences(*(shared_parts(r) for r in (report, report_in(place / "whole")))) == []
    rows = {row["path"]: row for row in report["tensors"]}
    own, truth = (
        dict(jq.core.path_leaves(jq.dequantize(load(m).params))) for m in (packed, place / "model")
    )
    for path in ("layers/attn/q/kernel", "layers/mlp/up/kernel"):
        w, q = np.asarray(truth[path], np.float64), np.asarray(own[path], np.float64)
        distortion = np.mean([np.mean((a - b) ** 2) / a.var() for a, b in zip(w, q, strict=True)])
        row = rows[path]
        np.testing.assert_allclose(row["distortion"], distortion, rtol=1e-4)
        np.testing.assert_allclose(row["shannon"], -0.5 * np.log2(distortion), rtol=1e-4)
        np.testing.assert_allclose(row["gap"], row["stored"] - row["shannon"], rtol=1e-6)
        np.testing.assert_allclose(row["gap_decibels"], row["gap"] * 20 * np.log10(2), rtol=1e-6)
        assert 0 < row["output_distortion"] < 1 and row["entropy"] <= row["stored"]
    points = report["frontier"]["points"]
    mine = next(p for p in points if not p["command"])
    for key, value in scores(place / "model", packed).items():
        np.testing.assert_allclose(mine[key], value, rtol=1e-3, atol=1e-6)
    assert mine["bytes"] == json.loads(run("inspect", packed, "--json")[1])["bytes"]
    rivals = [p for p in points if p["command"] and p["bytes"] <= mine["bytes"]]
    best = min(rivals, key=lambda p: p["kl"])
    (advice,) = report["advice"]
    assert advice["command"] == best["command"]
    assert (advice["kl"], advice["kl_now"]) == (best["kl"], mine["kl"])
    assert advice["kl"] < advice["kl_now"] and advice["bytes"] <= mine["bytes"]


def test_a_quantized_model_alone(place, packed, run, tmp_path):
    status, _, err = run(*command(place, tmp_path / "r", model=packed))
    assert status == 0, err
    report = report_in(tmp_path / "r")
    assert report["frontier"] is None and report["advice"] == []
    assert any("--against" in note for note in report["notes"])


def test_what_is_replaced(place, run, tmp_path):
    out = tmp_path / "report"
    shutil.copytree(place / "whole", out)
    fails(run(*command(place, out)), 2, "exists; give --overwrite to replace it")
    for name in ("thesis.txt", "data.json"):
        (out / name).write_text("precious")
        fails(run(*command(place, out, "--overwrite")), 2, "not a report, and is not touched")
        (out / name).unlink()
    fails(run(*command(place, place / "text.txt")), 2, "is a file; give the name of a folder")


def test_bad_input(place, run, tmp_path):
    out = tmp_path / "out"
    fails(run(*command(place, out, model="/nowhere")), 1, "no model '/nowhere'")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    again = [short if a == place / "text.txt" else a for a in command(place, out)]
    fails(run(*again), 1, "the text has 9 tokens; one chunk needs 256: give a longer --text")
    bare = tmp_path / "bare"
    shutil.copytree(place / "model", bare)
    (bare / "tokenizer.json").unlink()
    fails(run(*command(place, out, model=bare)), 1, "tokenizer")
    broken = tmp_path / "nan"
    shutil.copytree(place / "model", broken)
    tensors = dict(load_file(broken / "model.safetensors"))
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, broken / "model.safetensors")
    fails(run(*command(place, out, model=broken)), 1, "NaN")
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_activations_that_are_not_finite(place, run, tmp_path):
    tensors = tensors_of()
    for name in ("gate", "up"):  # whose product overflows
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= np.float32(1e30)
    write_folder(tmp_path / "wild", CONFIG, tensors)
    fails(run(*command(place, tmp_path / "out", model=tmp_path / "wild")), 1, "NaN or infinite")


def test_references_that_do_not_fit(place, packed, run, tmp_path):
    small = CONFIG | {"intermediate_size": 16}
    write_folder(tmp_path / "small", small, tensors_of(small))
    against = lambda model: run(*command(place, tmp_path / "o", "--against", model, model=packed))
    fails(against(tmp_path / "small"), 1, "different architectures: layers/mlp/down/kernel is")
    fails(against(packed), 1, "is quantized; give the float model")
    other = tmp_path / "other"
    shutil.copytree(place / "model", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    fails(against(other), 1, "different tokenizers or vocabularies")
