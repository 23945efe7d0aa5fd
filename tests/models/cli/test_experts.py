"""The commands on a mixture of experts: what the plan says, and what the packed model does."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.storage import checkpoint
from jaxquant_models import load
from tests.support.command import TEXT
from tests.support.tiny_llama import FAMILIES, random_tensors, write_folder

ROUTER = "layers/mlp/router/kernel"
UP = "layers/mlp/experts/up/kernel"
pytestmark = pytest.mark.filterwarnings("ignore:.*tokens reached")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    place = tmp_path_factory.mktemp("moe")
    (place / "text.txt").write_text(TEXT)
    hf = FAMILIES["qwen3_moe"]
    return write_folder(place / "model", hf, random_tensors(hf))


def options(moe, method, *more):
    text = moe.parent / "text.txt"
    own = ("--bits", 4, "--group-size", 8, "--calibration-tokens", 1024, "--calibration", text)
    return (moe, "--method", method, *own, *more)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_commands(moe, run, tmp_path, method):
    plan = json.loads(run("plan", *options(moe, method, "--json"))[1])
    status, out, err = run("quantize", *options(moe, method, "--out", tmp_path / "o", "--json"))
    assert status == 0, err
    stored = checkpoint.load(tmp_path / "o")
    leaves = dict(jq.core.path_leaves(stored))
    assert plan["bytes"] == sum(w.nbytes for w in leaves.values())
    assert plan["bits_per_weight"] == json.loads(out)["bits_per_weight"]
    assert leaves[UP].shape == (3, 6, 24, 16) and leaves[UP].method == method
    assert not isinstance(leaves[ROUTER], jq.QTensor) and leaves[ROUTER].shape == (3, 24, 6)
    text = moe.parent / "text.txt"
    args = ("--text", text, "--ctx", 64, "--against", moe, "--json")
    report = json.loads(run("eval", tmp_path / "o", *args)[1])
    assert 0 < report["kl"] < 1 and report["top1_agreement"] > 0.5
    args = ("--prompt", "the quick", "--max-tokens", 8, "--json")
    status, out, err = run("generate", tmp_path / "o", *args)
    assert status == 0 and json.loads(out)["tokens"] <= 8, err
    model, tokens = load(tmp_path / "o"), jnp.arange(40)[None]
    got = jax.jit(jq.quantized(model.apply_fn))(model.params, tokens)
    want = model.apply_fn(jq.dequantize(model.params), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_bits_are_allocated_to_experts(moe, run, tmp_path):
    args = ("--target-bits", 5, "--symmetric", "--out", tmp_path / "o", "--json")
    text = moe.parent / "text.txt"
    given = ("--method", "rtn", "--group-size", 8, "--calibration", text)
    status, out, err = run("quantize", moe, *given, "--calibration-tokens", 512, *args)
    assert status == 0, err
    assert 4 < json.loads(out)["bits_per_weight"] <= 5
    leaves = dict(jq.core.path_leaves(checkpoint.load(tmp_path / "o")))
    assert isinstance(leaves[UP], jq.QTensor) and not isinstance(leaves[ROUTER], jq.QTensor)
