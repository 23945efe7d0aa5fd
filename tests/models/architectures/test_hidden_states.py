"""Residual streams and attention against an independent NumPy forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant_models import load
from jaxquant_models.architectures.hidden_states import hidden_states
from jaxquant_models.runs.quantization import quantize_model
from tests.support.tiny_llama import FAMILIES, LAYERS, VOCAB, forward, random_tensors, write_folder

TOKENS = np.random.default_rng(1).integers(0, VOCAB, 24)
FIRST = 7


def of(model, params):
    run = jax.jit(jq.quantized(hidden_states(model.config, first_query=FIRST)))
    return run(params, jnp.asarray(TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_numpy(family, tmp_path):
    hf, want = FAMILIES[family], []
    tensors = random_tensors(hf)
    model = load(write_folder(tmp_path, hf, tensors))
    forward(hf, tensors, TOKENS, want)
    for params in (model.params, jq.ptq.unstack(model.params, "layers")):
        got = of(model, params)
        assert got.residual.shape == (LAYERS, 24, 24)
        for i, (h, attention) in enumerate(want):
            np.testing.assert_allclose(got.residual[i], h, atol=1e-4)
            mass = attention[:, FIRST:].mean((0, 1))
            np.testing.assert_allclose(got.attention[i], mass, atol=1e-5)
    np.testing.assert_allclose(got.attention.sum(1), 1, atol=1e-5)
    # The twin: over all queries it is another.
    assert np.abs(got.attention[0] - want[0][1].mean((0, 1))).max() > 1e-3


@pytest.mark.parametrize("apart", [False, True])
def test_of_packed_weights(apart, tmp_path):
    hf = FAMILIES["qwen3"]
    model = load(write_folder(tmp_path, hf, random_tensors(hf)))
    if apart:
        model = dataclasses.replace(model, params=jq.ptq.unstack(model.params, "layers"))
    recipe = jq.Recipe([("layers/*kernel", jq.rtn(4, 8)), ("*", jq.KEEP)])
    packed = quantize_model(model, recipe, None).params
    got, want = of(model, packed), of(model, jq.dequantize(packed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
    assert np.abs(got.residual - of(model, model.params).residual).max() > 1e-2
    run = hidden_states(model.config, first_query=FIRST)
    assert jq.explain(run, packed, jnp.asarray(TOKENS)).materialised == ()


def test_a_short_text(tmp_path):
    hf = FAMILIES["llama"]
    model = load(write_folder(tmp_path, hf, random_tensors(hf)))
    with pytest.raises(ValueError, match="expected more than 64 tokens, got 24"):
        hidden_states(model.config)(model.params, jnp.asarray(TOKENS))
