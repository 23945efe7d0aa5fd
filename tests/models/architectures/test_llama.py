"""The model against an independent NumPy forward pass, and its cuts and caches against itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxquant.core.programs import program_memory
from jaxquant_models import Llama, LlamaConfig, blockwise, init_cache, load
from jaxquant_models.architectures.config import Llama3Scaling
from jaxquant_models.architectures.llama import Embed
from jaxquant_models.architectures.rope import frequencies
from jaxquant_models.readers.huggingface_config import config_from_hf
from jaxquant_models.readers.weights import param_shapes
from tests.support.tiny_llama import (
    BASE,
    FAMILIES,
    LAYERS,
    LLAMA3,
    VOCAB,
    forward,
    random_tensors,
    write_folder,
)

TOKENS = np.random.default_rng(1).integers(0, VOCAB, 20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    hf = FAMILIES["llama-tied"]
    return load(write_folder(tmp_path_factory.mktemp("m") / "m", hf, random_tensors(hf)))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_numpy(family, tmp_path):
    hf = FAMILIES[family]
    tensors = random_tensors(hf)
    model = load(write_folder(tmp_path, hf, tensors))
    got = jax.jit(model.apply_fn)(model.params, jnp.asarray([TOKENS, TOKENS[::-1]]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], forward(hf, tensors, TOKENS), atol=2e-4)
    np.testing.assert_allclose(got[1], forward(hf, tensors, TOKENS[::-1]), atol=2e-4)


@pytest.mark.parametrize("change", [{"rope_theta": 60.0}, {"rope_scaling": None}])
def test_a_wrong_rope_is_seen(change, tmp_path):
    hf = FAMILIES["llama-llama3"]
    tensors = random_tensors(hf)
    model = load(write_folder(tmp_path, hf, tensors))
    wrong = Llama(dataclasses.replace(model.config, **change))
    got = jax.jit(wrong.apply)({"params": model.params}, jnp.asarray(TOKENS)[None])[0]
    assert np.abs(got - forward(hf, tensors, TOKENS)).max() > 1e-2


def test_llama3_scaling_has_three_regimes():
    base = frequencies(config_from_hf(BASE | {"head_dim": 32}))
    ratio = frequencies(config_from_hf(BASE | {"head_dim": 32, "rope_scaling": LLAMA3})) / base
    assert ratio[0] == 1 and np.isclose(ratio[-1], 1 / 8)
    assert np.any((ratio > 1 / 8 + 1e-3) & (ratio < 1 - 1e-3))


def test_parameter_paths():
    shapes = param_shapes(Llama(config_from_hf(FAMILIES["qwen3"])))
    assert shapes == {
        "embed/embedding": (261, 24),
        "layers/attn/q/kernel": (3, 24, 32),
        "layers/attn/k/kernel": (3, 24, 16),
        "layers/attn/v/kernel": (3, 24, 16),
        "layers/attn/o/kernel": (3, 32, 24),
        "layers/attn/q_norm/scale": (3, 8),
        "layers/attn/k_norm/scale": (3, 8),
        "layers/attn_norm/scale": (3, 24),
        "layers/mlp_norm/scale": (3, 24),
        "layers/mlp/gate/kernel": (3, 24, 40),
        "layers/mlp/up/kernel": (3, 24, 40),
        "layers/mlp/down/kernel": (3, 40, 24),
        "norm/scale": (24,),
        "head/kernel": (24, 261),
    }


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_chained_pieces_equal_apply(family, tmp_path):
    hf = FAMILIES[family]
    model = load(write_folder(tmp_path, hf, random_tensors(hf)))
    tokens = jnp.asarray(TOKENS)[None]
    parts = blockwise(model.config)
    h, block = parts.embed(model.params, tokens), jax.jit(parts.block)
    for i in range(LAYERS):
        h = block(jax.tree.map(lambda leaf, i=i: leaf[i], model.params["layers"]), h)
    whole = jax.jit(model.apply_fn)(model.params, tokens)
    np.testing.assert_allclose(parts.head(model.params, h), whole, atol=1e-5)


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 1, 12]])
def test_cached_decoding_equals_full_forward(tiny, cuts):
    tokens = jnp.asarray([TOKENS, TOKENS[::-1]])
    step = jax.jit(tiny.apply_cached)
    cache, at, got = init_cache(tiny.config, 2, 32), 0, []
    for n in cuts:
        logits, cache = step(tiny.params, tokens[:, at : at + n], cache)
        got.append(logits)
        at += n
    assert int(cache.length) == 20
    whole = jax.jit(tiny.apply_fn)(tiny.params, tokens)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), whole, atol=1e-5)


def test_too_many_tokens_for_the_cache(tiny):
    with pytest.raises(ValueError, match="20 tokens do not fit in a cache of size 16"):
        tiny.apply_cached(tiny.params, jnp.asarray(TOKENS)[None], init_cache(tiny.config, 1, 16))


def test_remat_changes_no_gradient(tiny):
    tokens = jnp.asarray(TOKENS)[None]

    def loss(params, remat):
        return jnp.mean(Llama(tiny.config, remat=remat).apply({"params": params}, tokens) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (gradient(tiny.params, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_a_narrow_embedding_is_never_widened_as_a_whole():
    taken = {}
    for kind in (Embed, nn.Embed):
        table = kind(32768, 64, dtype=jnp.float32)
        params = {"embedding": jax.ShapeDtypeStruct((32768, 64), jnp.float16)}
        look_up = jax.jit(lambda p, t, table=table: table.apply({"params": p}, t))
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        assert look_up.eval_shape(params, tokens).dtype == jnp.float32

        def steps(p, t, look_up=look_up):  # as a generation does
            return jax.lax.fori_loop(0, t[0, 0], lambda i, s: s + look_up(p, t + i).sum(), 0.0)

        taken[kind] = program_memory(jax.jit(steps), params, tokens)
    assert taken[Embed] < 32768 * 64 * 4 <= taken[nn.Embed]
    table = {"embedding": jnp.asarray(np.random.default_rng(0).normal(size=(40, 8)), jnp.float16)}
    tokens = jnp.asarray([[3, 39, 0]])
    got, want = (k(40, 8, dtype=jnp.float32).apply({"params": table}, tokens) for k in taken)
    np.testing.assert_array_equal(got, want)


def test_bfloat16_is_close_and_logits_stay_float32(tiny):
    tokens = jnp.asarray(TOKENS)[None]
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params)
    got = jax.jit(Llama(tiny.config, jnp.bfloat16).apply)({"params": low}, tokens)
    whole = jax.jit(tiny.apply_fn)(tiny.params, tokens)
    assert got.dtype == jnp.float32
    error = jnp.linalg.norm(got - whole) / jnp.linalg.norm(got)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("scaling", [None, 2.0, (1.0, 2.0, 4.0, 8.0), Llama3Scaling(8.0, 1, 4, 64)])
def test_config_json_round_trip(scaling):
    config = dataclasses.replace(config_from_hf(BASE), rope_scaling=scaling)
    assert LlamaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert hash(config) == hash(LlamaConfig.from_json(config.to_json()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral.*got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type must be .* got 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "type 'llama3' lacks 'factor'"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads must be a multiple of .*, got 4 and 3",
        ),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"model_type": "mistral", "sliding_window": 64}, "window 64 < 256"),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True},
            "sliding-window attention is not supported",
        ),
    ],
)
def test_unsupported_hf_configs(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(BASE | change)


def test_transformers_5_rope_parameters():
    rope = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2}}
    config = config_from_hf({k: v for k, v in BASE.items() if k != "rope_theta"} | rope)
    assert (config.rope_theta, config.rope_scaling) == (7.0, 2.0)


@pytest.mark.parametrize("bad", [{"surprise": 1}, {"vocab_size": None}])
def test_bad_json_config(bad):
    with pytest.raises(ValueError, match="LlamaConfig|vocab_size"):
        LlamaConfig.from_json(config_from_hf(BASE).to_json() | bad)
