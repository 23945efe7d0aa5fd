"""Statistics of one block, from the gradients at its outputs, are those of the whole model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.calibration.one_block import calibrate_block, calibration_memory, only
from tests.support.arrays import draw
from tests.support.compiling import compilations

L, K = 3, 16
LAYERS = {"a": draw(L, K, 8) / 4, "b": draw(L, 8, K, seed=1) / 4}
BATCHES = [draw(1, 5, K, seed=2), draw(1, 5, K, seed=3)]


def block(p, h):
    return h + jnp.tanh(h @ p["a"]) @ p["b"]


def model(params, h):
    return jax.lax.scan(lambda h, p: (block(p, h), None), h, params)[0]


def loss(y, _=None):
    return jnp.sum(y**3)


def one(i):
    return jax.tree.map(lambda a: a[i : i + 1], LAYERS)


def walked(weighting, **options):
    """Statistics of every layer, last to first, each by itself."""
    states = [BATCHES]
    for i in range(L):
        states.append([block(only(one(i)), h) for h in states[-1]])
    gradients, found = [jax.grad(loss)(h) for h in states[-1]], [None] * L
    for i in reversed(range(L)):
        before = {}
        found[i] = calibrate_block(
            block, one(i), zip(states[i], gradients, strict=True), weighting=weighting,
            passed=lambda j, out, before=before: before.update({j: out.gradients}), **options,
        )  # fmt: skip
        gradients = [before[j] for j in range(len(BATCHES))]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "gradient"},
        {"weighting": "gradient", "sample": 3, "gram": False},
        {"weighting": "gradient", "output": ("*",)},
        {"weighting": "energy"},
        {"weighting": "uniform"},
    ],
)
def test_every_layer_has_the_statistics_of_the_whole_model(options):
    whole = jq.calibrate(model, LAYERS, BATCHES, loss=loss, **options)
    for i, stats in enumerate(walked(**options)):
        assert stats.holder == whole.holder
        assert stats.sites["a"].shape == (1, K, 8)
        assert stats.sites["a"].contracted == whole.sites["a"].contracted
        want = jax.tree.map(lambda a, i=i: a[i : i + 1], whole.sums)
        chex.assert_trees_all_close(stats.sums, want, rtol=2e-5, atol=1e-6)


def test_without_gradients_the_outputs_come_out():
    outputs = {}
    stats = calibrate_block(
        block, one(0), [(h, None) for h in BATCHES], weighting="uniform",
        passed=lambda j, out: outputs.update({j: out}),
    )  # fmt: skip
    whole = jq.calibrate(model, LAYERS, BATCHES, weighting="uniform")
    np.testing.assert_allclose(stats.gram("a")[0], whole.gram("a")[0], rtol=1e-5)
    assert outputs[1].gradients is None
    np.testing.assert_allclose(outputs[1].outputs, block(only(one(0)), BATCHES[1]), rtol=1e-5)


def test_layers_of_one_shape_share_a_program():
    walked("gradient")
    with compilations() as programs:
        walked("gradient")
    assert not programs


def test_memory_is_what_the_statistics_take_and_some_more():
    h = jax.ShapeDtypeStruct((1, 5, K), jnp.float32)
    held, work = calibration_memory(block, one(0), h, weighting="gradient")
    assert held == 4 * (K * K + 8 * 8 + 2 + 3 * (K + 8))
    assert work > 4 * (K * K + 8 * 8)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration needs at least one batch, got none"),
        ([(BATCHES[0], None)], "gradients of the loss at the outputs of the block are needed"),
    ],
)
def test_bad_input(batches, message):
    with pytest.raises(ValueError, match=message):
        calibrate_block(block, one(0), batches, weighting="gradient")
