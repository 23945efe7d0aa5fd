"""Commands on a model that does not fit in memory, which is made to seem small."""

import json

import pytest

from jaxquant_models.readers import room
from jaxquant_models.readers.weights import Weights
from jaxquant_models.runs import passes
from tests.support.command import fails
from tests.support.tiny_llama import BASE, random_tensors


@pytest.fixture
def small(monkeypatch):
    """Memory for a layer, and not for the model."""
    monkeypatch.setattr(room, "available_memory", lambda: 100_000)

    def whole(*_):
        raise AssertionError("the whole model was read")

    monkeypatch.setattr(Weights, "whole", whole)


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_eval_scores_it_layer_by_layer(tiny, run, monkeypatch, request, in_memory):
    monkeypatch.setattr(passes, "IN_MEMORY", in_memory)
    options = ("--text", tiny.parent / "text.txt", "--ctx", 64, "--chunks", 3, "--json")
    want = json.loads(run("eval", tiny, *options)[1])
    request.getfixturevalue("small")
    status, out, err = run("eval", tiny, *options, "--against", tiny)
    assert status == 0, err
    assert "does not fit in memory, so its layers are read one by one" in " ".join(err.split())
    found = json.loads(out)
    assert found["perplexity"] == pytest.approx(want["perplexity"], rel=1e-5)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["top1_agreement"] == 1
    assert {n: found[n] for n in ("bytes", "bits_over_all_weights")} == {
        n: want[n] for n in ("bytes", "bits_over_all_weights")
    }


def test_inspect_reads_headers(tiny, run, small):
    status, out, _ = run("inspect", tiny, "--json")
    rows = {row["path"]: row for row in json.loads(out)["tensors"]}
    assert status == 0
    assert rows["layers/mlp/up/kernel"]["shape"] == [3, 24, 40]


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "a"),
        ("eval", "--text", "builtin", "--kv-bits", 4),
        ("inspect", "--outliers", "--text", "builtin"),
    ],
)
def test_what_needs_the_whole_model_says_how_much_memory(tiny, run, small, command):
    size = 4 * sum(a.size for a in random_tensors(BASE).values())
    message = f"needs {size:,} bytes of memory, but 100,000 are available: quantize the model"
    fails(run(command[0], tiny, *command[1:]), 1, message)


def test_memory_of_this_machine_is_known():
    assert 10**8 < room.available_memory() < 10**14
