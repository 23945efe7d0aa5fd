"""Dimensions of hidden states: by layer, and as a callback of the training loops."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.theory.dimension import levina_bickel, local_two_nn, two_nn
from jaxquant.theory.layer_dimension import DimensionHistory, dimension_by_layer, drawn_points
from jaxquant.training import QAT, Finetuning, finetune
from jaxquant.tuning.trainer import Healing

KEY = jax.random.key(3)


def subspaces(*dimensions, tokens=500, wide=16):
    """One layer per dimension: Gaussian vectors in a subspace of this dimension."""
    rng = np.random.default_rng(0)
    return np.stack(
        [rng.normal(size=(tokens, d)) @ rng.normal(size=(d, wide)) for d in dimensions]
    ).astype(np.float32)


def test_layers_of_known_dimension():
    done = []
    found = dimension_by_layer(subspaces(1, 2, 5), KEY, k=64, progress=done.append)
    for name in ("TwoNN", "MLE"):
        np.testing.assert_allclose(found.values(name), [1, 2, 5], rtol=0.2)
    assert done == [1, 2, 3]
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "TwoNN", "MLE", "points", "duplicates"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2"]
    assert lines[1].split()[3:] == ["500", "0"]
    with pytest.raises(ValueError, match="estimator must be one of TwoNN, MLE, got 'LID'"):
        found.values("LID")


def test_tokens_are_pooled_and_drawn():
    hidden = subspaces(3)
    texts = hidden.reshape(1, 5, 100, 16)
    estimators = {"k": partial(levina_bickel, k=8)}
    whole = dimension_by_layer(hidden, KEY, k=8, estimators=estimators)
    assert dimension_by_layer(texts, KEY, k=8, estimators=estimators).layers[0][0].value == (
        whole.layers[0][0].value
    )
    twice = np.concatenate([hidden, hidden[:, :50]], axis=1)
    some = dimension_by_layer(twice, KEY, k=8, points=200, estimators=estimators).layers[0][0]
    assert (some.points, some.duplicates) == (200, 50)
    drawn, _ = drawn_points(twice[0], 200, KEY)
    assert some.value == levina_bickel(drawn, 8).value
    other, _ = drawn_points(twice[0], 200, jax.random.key(4))
    assert not np.array_equal(drawn, other)
    same, _ = drawn_points(twice[0] * 2, 200, KEY)
    np.testing.assert_array_equal(same, 2 * drawn)  # the same tokens


def test_bad_hidden_states():
    hidden = subspaces(2)
    for wrong in (hidden[0], hidden[:0]):
        with pytest.raises(ValueError, match=r"expected hidden \[L, ..., d\], got shape"):
            dimension_by_layer(wrong, KEY)
    with pytest.raises(ValueError, match="at least one estimator"):
        dimension_by_layer(hidden, KEY, estimators={})
    with pytest.raises(ValueError, match="more than k = 64 distinct points, got 30 "):
        dimension_by_layer(hidden, KEY, points=30)
    with pytest.raises(ValueError, match="to draw must be at least 1, got 0"):
        dimension_by_layer(hidden, KEY, points=0)
    with pytest.raises(ValueError, match="contain NaN"):
        dimension_by_layer(np.where(hidden > 3, np.nan, hidden), KEY)
    with pytest.raises(ValueError, match="up to the 64th, got 8"):
        dimension_by_layer(hidden, KEY, k=8)


W = jax.random.normal(jax.random.key(0), (16, 16))
X = jax.random.normal(jax.random.key(1), (8, 12, 16))


def apply(params, x):
    return x @ params["w"]


@jax.jit
def states(params):
    return jq.quantized(apply)(params, X)


def by_qat(history):
    params = jq.latent({"w": W}, jq.lsq(bits=2, group_size=16))
    how = QAT(steps=6, learning_rate=0.02)
    return params, jq.qat(apply, params, np.asarray(X), how, teacher={"w": W}, progress=history)


def by_finetuning(history):
    params = jq.adapt(jq.quantize({"w": W}, jq.rtn(2, 16)), jq.adapters.LoRA(rank=8))
    how = Finetuning(steps=6, learning_rate=0.02)
    return params, finetune(apply, params, np.asarray(X), how, teacher={"w": W}, progress=history)


def by_healing(history):
    params = jq.quantize({"w": W}, jq.rtn(2, 16))
    how = Healing(steps=6, learning_rate=0.02)
    return params, jq.heal(apply, params, {"w": W}, np.asarray(X), how, progress=history)


@pytest.mark.parametrize("run", [by_qat, by_finetuning, by_healing])
def test_a_callback_of_the_loops(run):
    history = DimensionHistory(states, KEY, every=3, points=90, neighborhood=16)
    before, after = run(history)
    assert history.steps == [3, 6] and history.history[0][1].points == 90
    first, last = history.values
    assert first != last
    # The last measurement is that of the returned tree, whose factors healing stores in float16.
    assert history.measure(6, after).value == pytest.approx(last, rel=3e-3)
    assert history.measure(0, before).value != pytest.approx(last, rel=3e-3)
    drawn, _ = drawn_points(states(after), 90, KEY)
    assert history.values[2] == local_two_nn(drawn, 16).value


class Block(NamedTuple):
    """The report of a loop that trains one block at a time."""

    step: int
    params: None = None


def test_a_loop_without_parameters():
    history = DimensionHistory(states, KEY, every=2)
    history(Block(1))
    with pytest.raises(ValueError, match="reports no parameters; qat, finetune and heal do"):
        history(Block(2))
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        DimensionHistory(states, KEY, every=0)


def test_drawing_keeps_what_there_is():
    drawn, duplicates = drawn_points(jnp.ones((2, 3, 4)), 10, KEY)
    assert drawn.shape == (1, 4) and duplicates == 5
    assert two_nn(drawn_points(subspaces(2), 10**6, KEY)[0]).points == 500
