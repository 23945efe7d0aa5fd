"""The encoder against an independent NumPy forward pass, and a real one if it is installed."""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxquant as jq
from jaxquant_models.architectures.bert import FOLDS
from jaxquant_models.readers.encoder import (
    NAMED,
    Encoder,
    bert_config_from_hf,
    load_encoder,
)
from jaxquant_models.readers.packages import packaged_file
from tests.support.tiny_bert import HF, random_tensors, write

ROWS = [[2, 17, 33, 4, 3], [2, 9, 3]]  # token ids
TOKENS = np.array([ROWS[0], [*ROWS[1], 0, 0]])
LEFT = ["The new movie is awesome", "The cat sits outside", "A man is playing guitar"]
RIGHT = ["The dog plays in the garden", "The new movie is so great", "A woman watches TV"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bert"))


def forward(hf, tensors, tokens):
    """The vector, float64 [d], of one sentence without padding; a loop over heads and tokens."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    heads, eps = hf["num_attention_heads"], hf["layer_norm_eps"]
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    places = w["embeddings.position_embeddings.weight"][: len(tokens)]
    words, types = (w[f"embeddings.{n}_embeddings.weight"] for n in ("word", "token_type"))
    h = norm(words[tokens] + places + types[0], "embeddings.LayerNorm")
    for i in range(hf["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        q, k, v = (linear(h, f"{at}.attention.self.{n}") for n in ("query", "key", "value"))
        mixed = np.zeros_like(q)
        for part in np.split(np.arange(q.shape[1]), heads):
            for t in range(len(tokens)):
                p = np.exp(k[:, part] @ q[t, part] / np.sqrt(len(part)))
                mixed[t, part] = p / p.sum() @ v[:, part]
        h = norm(
            h + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
        )
        up = linear(h, f"{at}.intermediate.dense")
        gelu = up * 0.5 * (1 + np.vectorize(math.erf)(up / np.sqrt(2)))
        h = norm(h + linear(gelu, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return h.mean(0) / np.linalg.norm(h.mean(0))


def test_vectors_equal_numpy(folder):
    """Of a padded sentence too: padding is seen by no token, and is in no mean."""
    encoder = load_encoder(folder)
    got = jax.jit(encoder.apply_fn)(encoder.params, TOKENS)
    want = [forward(HF, random_tensors(), row) for row in ROWS]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_tokens_are_padded_and_cut(folder):
    got = load_encoder(folder).tokens(["17 33 4", "9", "5 6 7 8 9 10"])
    assert got.tolist() == [ROWS[0], [2, 9, 3, 0, 0], [2, 5, 6, 7, 3]]
    with pytest.raises(ValueError, match="expected sentences, got none"):
        load_encoder(folder).tokens([])


def test_factors_fold_into_values(folder):
    """The layers are a stack that globs of recipes and of folds find."""
    encoder = load_encoder(folder)
    stats = jq.calibrate(encoder.apply_fn, encoder.params, [TOKENS[:1]], gram=False)
    recipe = jq.Recipe([("layers/attn/o/kernel", jq.smoothquant()), ("*", jq.KEEP)])
    params, recipe, _ = jq.ptq.fold(encoder.params, recipe, stats, FOLDS)
    assert dict(recipe.rules)["layers/attn/o/kernel"].input is None
    o, old = (tree["layers"]["attn"]["o"]["kernel"] for tree in (params, encoder.params))
    assert np.max(np.abs(o - old)) > 0.1
    want = encoder.apply_fn(encoder.params, TOKENS)
    np.testing.assert_allclose(encoder.apply_fn(params, TOKENS), want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type must be bert, got 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act must be gelu"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of .*, got 24 and 5"),
    ],
)
def test_unsupported_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        bert_config_from_hf(HF | change)
    with pytest.raises(ValueError, match="lacks 'hidden_size'"):
        bert_config_from_hf({k: v for k, v in HF.items() if k != "hidden_size"})


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    if importlib.util.find_spec(NAMED["minilm"].module) is None:
        pytest.skip("the sentence encoder's package is not installed")
    return load_encoder("minilm")


@pytest.mark.model
@pytest.mark.slow
def test_minilm_equals_numpy(minilm):
    at = packaged_file(NAMED["minilm"])
    hf, tensors = json.loads((at / "config.json").read_text()), load_file(at / "model.safetensors")
    tokens = minilm.tokens(LEFT)
    got = jax.jit(minilm.apply_fn)(minilm.params, tokens)
    want = [forward(hf, tensors, row[row != 0]) for row in tokens]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.model
@pytest.mark.slow
def test_minilm_gives_the_published_cosines(minilm):
    """Tokenizer and pooling too: those of sbert.net, Semantic Textual Similarity."""
    left, right = (minilm.apply_fn(minilm.params, minilm.tokens(s)) for s in (LEFT, RIGHT))
    want = [[0.0543, 0.8939, -0.0502], [0.2838, -0.0029, 0.1310], [0.2277, -0.0136, -0.0327]]
    np.testing.assert_allclose(left @ right.T, want, atol=1e-4)
