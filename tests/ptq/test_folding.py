"""Folding: factors go into what makes an input, and the function stays what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.support.arrays import draw


def fn(p, x):
    """Two weights read a normed input; another reads a product with a linear half, and a bias."""
    h = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * p["gain"]
    up = h @ p["up"] + p["bias"]
    return jnp.tanh(h @ p["gate"]) * up @ p["down"]


PARAMS = {
    "gain": 1 + 0.3 * draw(32, seed=1), "bias": draw(48, seed=2), "up": draw(32, 48, seed=3),
    "gate": draw(32, 48, seed=4), "down": draw(48, 24, seed=5),
}  # fmt: skip
X = draw(64, 32) * jnp.exp(draw(32, seed=9))
FOLDS = {"[ug]*": ["gain"], "down": ["up", "bias", "absent"]}


def calibrated(params=PARAMS):
    return jq.calibrate(fn, params, [X], sample=64)


def test_the_function_stays_and_statistics_follow():
    stats = calibrated()
    folded = jq.ptq.fold(PARAMS, jq.smoothquant(), stats, FOLDS)
    want = fn(PARAMS, X)
    np.testing.assert_allclose(fn(folded.params, X), want, rtol=1e-4, atol=1e-5)
    assert [m.input for _, m in folded.recipe.rules if isinstance(m, jq.Method)] == [None] * 3
    again = calibrated(folded.params)
    for path in ("up", "gate", "down"):
        for name in ("gram", "magnitude", "low", "high"):
            got, seen = (getattr(s.of(path), name) for s in (folded.stats, again))
            np.testing.assert_allclose(got, seen, rtol=2e-3, atol=2e-3)
    for path in ("up", "down"):  # input and readers are alike now, up to one factor
        probe = folded.stats.of(path)
        readers = ("up", "gate") if path == "up" else (path,)
        rows = jnp.concatenate([_before(folded, p) for p in readers], 1)
        size = jnp.maximum(probe.low, probe.high)
        ratio = size / jnp.max(jnp.abs(rows), 1)
        np.testing.assert_allclose(ratio, ratio[0], rtol=3e-3)


def _before(folded, path):
    """The weight with its own input's factors, without those of the next."""
    w = folded.params[path]
    return w / (folded.params["bias"] / PARAMS["bias"]) if path == "up" else w


def test_folded_and_carried_are_the_same_function():
    """Weights not rounded at all, nor inputs: what is carried equals what is folded."""
    stats, method = calibrated(), jq.smoothquant(16, activations=None)
    carried = jq.quantize(PARAMS, method, stats)
    folded = jq.ptq.fold(PARAMS, method, stats, FOLDS)
    other = jq.quantize(folded.params, folded.recipe, folded.stats)
    assert carried["up"].input is not None and other["up"].input is None
    want = fn(PARAMS, X)
    for tree in (carried, other):
        np.testing.assert_allclose(jq.quantized(fn)(tree, X), want, rtol=1e-4, atol=1e-5)
    assert other["up"].nbytes < carried["up"].nbytes


def test_the_rest_of_a_chain_stays():
    stats, method = calibrated(), jq.smoothquant(8, rotate=True)
    folded = jq.ptq.fold(PARAMS, method, stats, FOLDS)
    q = jq.quantize(folded.params, folded.recipe, folded.stats)
    assert q["up"].input == jq.transforms.Rotation(signed=False)
    error = jnp.linalg.norm(jq.quantized(fn)(q, X) - fn(PARAMS, X)) / jnp.linalg.norm(fn(PARAMS, X))
    assert error < 0.03


def test_what_others_read_too_is_not_folded():
    stats = calibrated()
    recipe = jq.Recipe([("gate", jq.KEEP), ("[ud]*", jq.smoothquant()), ("*", jq.KEEP)])
    folded = jq.ptq.fold(PARAMS, recipe, stats, FOLDS)
    kept = dict(folded.recipe.rules)
    assert kept["up"].input is not None and kept["down"].input is None
    np.testing.assert_array_equal(folded.params["gain"], PARAMS["gain"])
    np.testing.assert_allclose(fn(folded.params, X), fn(PARAMS, X), rtol=1e-4, atol=1e-5)


def test_stacks_fold_layer_by_layer():
    params = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), PARAMS)
    params["down"] = jnp.concatenate([params["down"], params["down"][..., :8]], -1)
    run = lambda p, x: jax.lax.scan(lambda h, q: (fn(q, h), None), x, p)[0]
    stats = jq.calibrate(run, params, [X])
    rules = [(name, jq.smoothquant()) for name in ("up", "gate", "down")]
    folded = jq.ptq.fold(params, jq.Recipe([*rules, ("*", jq.KEEP)]), stats, FOLDS)
    np.testing.assert_allclose(run(folded.params, X), run(params, X), rtol=1e-3, atol=1e-4)
    factor = folded.params["gain"] / params["gain"]
    assert factor.shape == (2, 32) and not np.allclose(factor[0], factor[1])


def test_a_killed_search_goes_on_where_it_stopped():
    stats, method, calls = calibrated(), jq.awq(3, 16), []

    def judged(weights, index, most=10**6):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(index)
        return sum(jnp.sum((w - PARAMS[path]) ** 2) for path, w in weights.items())

    once, kept = jq.ptq.fold(PARAMS, method, stats, FOLDS, inspect=judged), {}
    whole = len(calls)
    stop = lambda weights, index: judged(weights, index, whole + whole // 2 + 3)
    with pytest.raises(KeyboardInterrupt):
        jq.ptq.fold(PARAMS, method, stats, FOLDS, inspect=stop, finished=kept)
    calls.clear()
    again = jq.ptq.fold(PARAMS, method, stats, FOLDS, inspect=judged, finished=kept)
    assert len(calls) == whole // 2  # that of one input of two
    for name, leaf in once.params.items():
        np.testing.assert_array_equal(again.params[name], leaf)
    calls.clear()
    other = {n: w + 1 for n, w in PARAMS.items()}
    jq.ptq.fold(other, method, stats, FOLDS, inspect=judged, finished=kept)
    assert len(calls) == whole  # of other weights nothing is taken


def test_a_leaf_of_other_channels():
    with pytest.raises(ValueError, match=r"gain has shape \[32\]; to have factors folded into"):
        jq.ptq.fold(PARAMS, jq.smoothquant(), calibrated(), {"down": ["gain"]})
