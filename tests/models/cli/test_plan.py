"""`jaxquant plan`: what it says is what a run then takes, and no weight is read for it."""

import json

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.storage import checkpoint
from jaxquant_models.readers import registry, room
from jaxquant_models.readers.weights import Weights
from jaxquant_models.runs.seconds import START
from tests.support.command import fails
from tests.support.tiny_llama import FAMILIES, random_tensors, write_folder


def plan(run, *args):
    status, out, err = run("plan", *args, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    "method",
    [("rtn", "--group-size", 8), ("gptq", "--group-size", 8), ("smoothquant",)],
)
def test_the_bytes_are_those_of_the_run(tiny, run, tmp_path, method):
    options = (tiny, "--method", *method, "--calibration-tokens", 1024)
    options += ("--calibration", tiny.parent / "text.txt")
    found = plan(run, *options)
    status, out, _ = run("quantize", *options, "--out", tmp_path / "o", "--json")
    report, stored = json.loads(out), checkpoint.load(tmp_path / "o")
    assert status == 0
    assert found["bytes"] == sum(w.nbytes for _, w in jq.core.path_leaves(stored))
    assert found["bits_per_weight"] == report["bits_per_weight"]
    served = registry.load(tmp_path / "o").params
    assert found["bytes_served"] == sum(w.nbytes for _, w in jq.core.path_leaves(served))


def test_no_weight_is_read(tiny, run, monkeypatch):
    monkeypatch.setattr(Weights, "_joined", None)
    found = plan(run, tiny, "--method", "gptq", "--group-size", 8, "--calibration-tokens", 1024)
    assert 0 < found["peak_memory"] < found["bound"]
    assert found["hidden_states"] == 4 * 3 * 1024 * 24
    assert found["hidden_states_in"] == "memory"


def test_the_time_is_that_of_the_machine_it_names(tiny, run):
    seconds = lambda *options: plan(run, tiny, "--group-size", 8, *options)["seconds"]
    rtn, gptq = seconds("--method", "rtn"), seconds("--method", "gptq")
    assert 0 < rtn < gptq < seconds("--method", "gptq", "--calibration-tokens", 10**8)
    assert rtn == pytest.approx(START, abs=0.01)  # the model is tiny
    assert seconds("--method", "rtn", "--heal-layers") is None
    status, out, _ = run("plan", tiny, "--method", "awq", "--group-size", 8)
    assert status == 0 and "seconds: unknown\nseconds_on: 2 cores" in out


def test_a_method_without_statistics_keeps_no_hidden_states(tiny, run):
    few = plan(run, tiny, "--method", "rtn", "--group-size", 8)
    assert few["hidden_states"] == 0
    assert (
        few["peak_memory"] <= plan(run, tiny, "--method", "gptq", "--group-size", 8)["peak_memory"]
    )


def test_every_tensor_is_listed(tiny, run):
    status, out, _ = run("plan", tiny, "--method", "rtn", "--group-size", 8)
    assert status == 0
    assert "layers/mlp/down/kernel" in out and "bits per quantized weight" in out
    assert "peak_memory:" in out


def test_methods_that_are_still_to_be_chosen(tiny, run):
    budget = ("--target-bits", 7, "--method", "rtn", "--group-size", 8, "--symmetric", "--json")
    status, out, err = run("plan", tiny, *budget)
    assert status == 0 and "bits are nearest to the target" in err
    report = json.loads(out)
    assert 6 <= report["bits_per_weight"] <= 8 and report["methods"] == "nearest to the target"


def test_what_needs_the_whole_model_is_said(tiny, run):
    found = plan(run, tiny, "--method", "rtn", "--group-size", 8, "--heal", 5)
    assert found["whole_model"] == "--heal"
    assert found["peak_memory"] > 4 * found["float_bytes"]


def test_a_rotation_unties_the_embedding(run, tmp_path):
    """Then there is an output matrix, whose bytes count."""
    hf = FAMILIES["llama-tied"]
    model = write_folder(tmp_path / "m", hf, random_tensors(hf))
    options = (model, "--method", "rtn", "--group-size", 8)
    tied = plan(run, *options)
    found = plan(run, *options, "--rotate-residual", "random")
    assert found["bytes"] - tied["bytes"] == 2 * 261 * 24


def test_bad_usage(tiny, run):
    budget = ("--target-bits", 9, "--method", "rtn", "--group-size", 8)
    fails(run("plan", tiny, *budget), 2, "must be above 0 and at most 8")
    budget = ("--target-bits", 2.5, "--method", "rtn", "--group-size", 8)
    fails(run("plan", tiny, *budget), 1, "2.5 bits per weight cannot be reached")
    fails(run("plan", tiny, "--method", "nothing"), 2, "nothing")
    fails(run("plan", tiny / "missing", "--method", "rtn"), 1, "no model")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("quantize", "one layer with its statistics needs"),
        ("heal", "--heal (the whole model at once) needs"),
        ("load", "model in float32 needs"),
    ],
)
def test_too_little_memory_says_how_much_is_needed(
    tiny, run, tmp_path, monkeypatch, command, message
):
    monkeypatch.setattr(room, "available_memory", lambda: 1000)
    options = ["--method", "rtn", "--group-size", 8, "--out", tmp_path / "o"]
    args = {
        "quantize": ("quantize", tiny, *options),
        "heal": ("quantize", tiny, *options, "--heal", 5),
        "load": ("generate", tiny, "--prompt", "a"),
    }[command]
    with Folder(tmp_path / "o.partial", {}) as kept:  # work of another run, which stays
        kept["a"] = {"x": np.ones(1)}
    result = run(*args)
    assert len(list((tmp_path / "o.partial").glob("*.bin"))) == 1
    fails(result, 1, message)
    assert "bytes of memory, but 1,000 are available" in " ".join(result[2].split())
    assert not (tmp_path / "o").exists()
