"""Mixtures of experts: against Transformers, and the routing against theory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.paths import matches
from jaxquant_models import Llama, load
from jaxquant_models.architectures.experts import routed
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.readers.huggingface_config import config_from_hf
from jaxquant_models.readers.weights import param_shapes
from jaxquant_models.runs.rotation import random_rotation, rotate_model
from tests.support.tiny_llama import FAMILIES, VOCAB, random_tensors, write_folder

QWEN3 = FAMILIES["qwen3_moe"]
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 20)
# The first logits of the last token by Transformers 5.24 (torch 2.13, float32), and the sum of the
# magnitudes of all logits, of AutoModelForCausalLM.from_pretrained on the folder of the test.
TRANSFORMERS = {
    "qwen3_moe": (QWEN3, [-0.21432, -0.9978, 0.09746, 0.19171, 0.99727, 0.03429], 4307.137),
    "not normalized": (
        QWEN3 | {"norm_topk_prob": False},
        [-0.54543, -0.04123, 0.31014, -0.45096, 1.58245, 1.1433],
        4221.006,
    ),
    "mixtral": (
        FAMILIES["mixtral"],
        [-0.62419, 1.33782, -0.01707, -0.76837, -0.34394, 0.4072],
        4787.325,
    ),
}


def logits(model, tokens=TOKENS):
    return jax.jit(model.apply_fn)(model.params, jnp.asarray(tokens)[None])[0]


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_logits_equal_those_of_transformers(case, tmp_path):
    hf, last, total = TRANSFORMERS[case]
    got = logits(load(write_folder(tmp_path, hf, random_tensors(hf))))
    np.testing.assert_allclose(got[-1, :6], last, atol=1e-4)
    np.testing.assert_allclose(np.abs(got).sum(), total, rtol=1e-5)


@pytest.mark.parametrize("change", [{"norm_topk_prob": False}, {"experts_per_token": 3}])
def test_a_wrong_routing_is_seen(change, tmp_path):
    _, last, _ = TRANSFORMERS["qwen3_moe"]
    model = load(write_folder(tmp_path, QWEN3, random_tensors(QWEN3)))
    wrong = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    assert np.abs(logits(wrong)[-1, :6] - np.array(last)).max() > 1e-2


def test_parameter_paths():
    shapes = param_shapes(Llama(config_from_hf(QWEN3)))
    assert {p: s for p, s in shapes.items() if "/mlp/" in p} == {
        "layers/mlp/router/kernel": (3, 24, 6),
        "layers/mlp/experts/gate/kernel": (3, 6, 24, 16),
        "layers/mlp/experts/up/kernel": (3, 6, 24, 16),
        "layers/mlp/experts/down/kernel": (3, 6, 16, 24),
    }


def test_rows_are_sorted_by_expert():
    logits = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    to = routed(jnp.asarray(logits), 3, True)
    best = np.argsort(-logits, axis=1)[:, :3]
    assert np.array_equal(to.sizes, np.bincount(best.ravel(), minlength=7))
    expert = np.repeat(np.arange(7), to.sizes)  # of every row
    assert np.array_equal(expert[to.place], best)
    assert np.array_equal(np.asarray(to.token)[to.place], np.arange(50)[:, None] + 0 * best)
    chosen = np.exp(np.take_along_axis(logits, best, 1))
    np.testing.assert_allclose(to.weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)


def test_one_token_reaches_few_experts(tmp_path):
    """The output is that of a model that has only these."""
    tensors = random_tensors(QWEN3)
    few = TOKENS[:1]
    want = logits(load(write_folder(tmp_path / "a", QWEN3, tensors)), few)
    used = np.zeros((3, 6), bool)
    for i, e in np.ndindex(used.shape):
        less = tensors | {n: 0 * w for n, w in tensors.items() if f"s.{i}.mlp.experts.{e}." in n}
        got = logits(load(write_folder(tmp_path / "b", QWEN3, less)), few)
        used[i, e] = not np.array_equal(got, want)
    assert used.sum(1).tolist() == [2, 2, 2]


def test_a_rotated_residual_stream_changes_nothing(tmp_path):
    model = load(write_folder(tmp_path, QWEN3, random_tensors(QWEN3)))
    turned = rotate_model(model, random_rotation(model, jax.random.key(0)))
    np.testing.assert_allclose(logits(turned), logits(model), atol=1e-4)
    routers = [m.params["layers"]["mlp"]["router"]["kernel"] for m in (model, turned)]
    assert np.abs(routers[0] - routers[1]).max() > 0.1


def test_bfloat16_is_close(tmp_path):
    folder = write_folder(tmp_path, FAMILIES["mixtral"], random_tensors(FAMILIES["mixtral"]))
    whole, low = logits(load(folder)), logits(load(folder, jnp.bfloat16))
    assert low.dtype == jnp.float32
    error = jnp.linalg.norm(low - whole, axis=-1) / jnp.linalg.norm(whole, axis=-1)
    assert 1e-4 < jnp.median(error) < 0.05  # of a few tokens, rounding changes the experts


def test_the_pattern_of_matrices_leaves_out_the_router():
    shapes = param_shapes(Llama(config_from_hf(QWEN3)))
    kernels = [p for p in shapes if p.startswith("layers/") and p.endswith("/kernel")]
    left = [p for p in kernels if not matches(p, LAYER_MATRICES)]
    assert left == ["layers/mlp/router/kernel"] and len(kernels) == 8


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"num_experts_per_tok": 7},
            "num_experts, num_experts_per_tok, moe_inter.* got 6, 7, 16",
        ),
        ({"num_experts": 0}, "a model of type qwen3_moe must have num_experts"),
        ({"moe_intermediate_size": 0}, "must all be 0, .* got 6, 2, 0"),
        ({"mlp_only_layers": [0]}, "every layer must have experts"),
        ({"decoder_sparse_step": 2}, "every layer must have experts"),
        ({"mlp_bias": True}, "mlp_bias and sub_norms must be False: experts have neither"),
    ],
)
def test_unsupported_experts(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(QWEN3 | change)


def test_messages_name_the_keys_of_mixtral():
    keys = "num_local_experts, num_experts_per_tok, intermediate_size .* got 4, 5, "
    with pytest.raises(ValueError, match=keys):
        config_from_hf(FAMILIES["mixtral"] | {"num_experts_per_tok": 5})
