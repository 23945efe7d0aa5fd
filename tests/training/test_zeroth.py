"""Zeroth order: unbiased, of the variance that theory says, in the memory of inference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.estimators.latent_format import Drawing
from jaxquant.training.zeroth import (
    Zeroth,
    estimate,
    moved,
    perturbed,
    zo_step,
    zo_value_and_grad,
)
from tests.support.arrays import draw

D = 64
MATRIX = np.diag(np.linspace(0.5, 2, D)) + 0.1
PLAIN = {"kinds": ("other",)}


def quadratic(p):
    x = p["w"]
    return x @ jnp.asarray(MATRIX, jnp.float32) @ x / 2


@pytest.mark.parametrize("signs, draws", [(False, 1), (False, 4), (True, 1), (True, 4)])
def test_moments(signs, draws):
    """On a quadratic the mean is the gradient, and E|g|^2 = (d + q +- 1) / q |grad|^2 exactly."""
    p = {"w": draw(D)}
    how = Zeroth(samples=draws, drawing=Drawing(signs), **PLAIN)
    run = jax.jit(jax.vmap(lambda key: zo_value_and_grad(quadratic, how)(p, key=key)[1]["w"]))
    g = np.asarray(run(jax.random.split(jax.random.key(1), 20_000 // draws)), np.float64)
    want = np.asarray(jax.grad(quadratic)(p)["w"], np.float64)
    energy = want @ want
    spread = np.sqrt(energy * D / len(g) / draws)
    assert np.linalg.norm(g.mean(0) - want) < 1.5 * spread
    second = (D + draws + (-1 if signs else 1)) / draws
    assert np.mean(np.sum(g**2, 1)) / energy == pytest.approx(second, rel=0.04)
    own = energy + (-1 if signs else 1) * want**2  # variance of each entry, of one draw
    assert np.mean(g.var(0) / own) == pytest.approx(1 / draws, rel=0.04)


def test_a_step_is_the_estimate_times_the_rate():
    p, how = {"w": draw(D), "n": jnp.arange(3)}, Zeroth(samples=3, **PLAIN)
    key = jax.random.key(4)
    value, g = zo_value_and_grad(quadratic, how)(p, key=key)
    after, same, slope = zo_step(quadratic, how)(p, key, 0.01)
    np.testing.assert_allclose(after["w"], p["w"] - 0.01 * g["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after["n"], p["n"])
    assert not np.any(g["n"]) and float(value) == float(same)
    # The log alone makes the same parameters.
    np.testing.assert_array_equal(moved(p, slope, 0.01, how)["w"], after["w"])


def net(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def error(p, x, y):
    return jnp.mean((jq.quantized(net)(p, x) - y) ** 2)


def made(method=None, stack=False):
    params = {"a": draw(32, 48) / 6, "b": draw(48, 24, seed=1) / 7}
    x = draw(64, 32, seed=2)
    y = net({"a": draw(32, 48, seed=8) / 6, "b": draw(48, 24, seed=9) / 7}, x)
    return jq.latent(params, method or jq.lsq(4, 16)), x, y


def test_latent_weights_move_where_they_are_used():
    """The tree that holds keys is, to the loss, the tree that was moved."""
    p, x, y = made()
    how = Zeroth(0.01, kinds=("weight", "scale"))
    key = jax.random.key(3)
    lazy = perturbed(p, key, 0.01, how)
    assert lazy["a"].data["codes"] is p["a"].data["codes"]
    eager = moved(
        p, type(estimate(error, p, key, how, x, y)[1])(key[None], jnp.ones(1)), -0.01, how
    )
    assert float(jnp.max(jnp.abs(eager["a"].data["codes"] - p["a"].data["codes"]))) > 0.01
    np.testing.assert_allclose(error(lazy, x, y), error(eager, x, y), rtol=1e-6)
    assert float(error(lazy, x, y)) != float(error(p, x, y))


@pytest.mark.parametrize("relative", [False, True])
def test_derivatives_through_rounding(relative):
    """The mean is the gradient of the smoothed loss: what differences of its mean say."""
    w = jnp.zeros((64, 1)).at[0].set(7.0).at[1].set(0.4).at[2].set(-1.2)  # the scale is one
    p = jq.latent({"w": w}, jq.lsq(4, 64, init="range", scale_dtype="float32"))
    c = draw(1, 64, seed=7)
    loss = lambda p: jnp.sum(jq.quantized(lambda p: c @ p["w"])(p))
    how = Zeroth(0.5, samples=4000, drawing=Drawing(relative=relative))
    _, g = jax.jit(functools.partial(zo_value_and_grad(loss, how), key=jax.random.key(0)))(p)
    # A linear loss of rounded weights: each entry's smoothed slope is c times that of E round(w).
    z = np.random.default_rng(0).normal(size=200_000)
    mean = lambda w: np.mean(np.clip(np.round(w + 0.5 * z), -8, 7))
    for i in (0, 1, 2, 9):
        slope = (mean(float(w[i, 0]) + 0.05) - mean(float(w[i, 0]) - 0.05)) / 0.1
        assert float(g["w"].data["codes"][i, 0]) == pytest.approx(float(c[0, i]) * slope, abs=0.6)


def test_a_step_is_the_same_jitted_or_not():
    """Which key an array has does not depend on the order in which a tree was made."""
    p = jq.latent({"w": draw(32, 16)}, jq.lsq(4, 16, activations="int8,static,mse"),
                  jq.calibrate(lambda p, x: x @ p["w"], {"w": draw(32, 16)}, [draw(8, 32, seed=3)],
                               sample=8))  # fmt: skip
    x = draw(8, 32, seed=2)
    loss = lambda p: jnp.mean(jnp.tanh(jq.quantized(lambda p: x @ p["w"])(p)) ** 2)
    step = zo_step(loss, Zeroth(0.05, kinds=("scale", "range")))
    key = jax.random.key(1)
    scale = lambda p: p["w"].named["activations.scale"]
    for run in (step, jax.jit(step)):
        after, _, slope = run(p, key, 0.1)
        again = moved(p, slope, 0.1, Zeroth(0.05, kinds=("scale", "range")))
        np.testing.assert_allclose(scale(after), scale(again), rtol=1e-5)
    eager, jitted = (run(p, key, 0.1)[2].numbers for run in (step, jax.jit(step)))
    np.testing.assert_allclose(eager, jitted, rtol=1e-2)


def test_one_number_may_move_a_matrix():
    """Each of a stack by a factor of its own."""
    p = {"w": draw(2, 8)}
    how = Zeroth(0.1, drawing=Drawing(relative=True, shared=True), **PLAIN)
    after = perturbed(p, jax.random.key(0), 0.1, how)
    factors = np.asarray(after["w"] / p["w"])
    signs = np.sign(np.asarray(p["w"]))
    moved_by = (factors - 1) * signs
    assert np.ptp(moved_by, axis=1).max() < 1e-5 and abs(moved_by[0, 0] - moved_by[1, 0]) > 1e-3


def test_small_moves_see_jumps():
    """Below half a step few codes change, and by a whole step: the variance grows."""
    p, x, y = made()
    step = float(jnp.mean(p["a"].data["scale"]))

    def norm(e):
        how = Zeroth(e * step, samples=16)
        keys = jax.random.split(jax.random.key(0), 8)
        run = jax.jit(jax.vmap(lambda key: estimate(error, p, key, how, x, y)[1].numbers))
        return float(jnp.mean(run(keys) ** 2))

    assert norm(0.01) > 4 * norm(0.5)


@pytest.mark.parametrize(
    "how, rate",
    [
        (Zeroth(0.5, samples=4, drawing=Drawing(relative=True)), 2.0),
        (Zeroth(0.5, samples=4, drawing=Drawing(relative=True), kinds=("weight", "scale")), 1.0),
        (Zeroth(0.02, samples=4, drawing=Drawing(signs=True), blocks=2), 0.04),
    ],
    ids=["relative", "scales too", "signs, by turns"],
)
def test_training_lowers_the_loss(how, rate):
    p, x, y = made()
    step = jax.jit(zo_step(error, how), donate_argnums=0)
    first = float(error(p, x, y))
    for i in range(300):
        p, _, _ = step(p, jax.random.key(i), rate, x, y)
    assert float(error(p, x, y)) < 0.85 * first
    np.testing.assert_array_equal(error(jq.freeze(p), x, y), error(p, x, y))


def test_a_step_takes_the_memory_of_inference():
    """Parameters donated, no gradient stored: of a stack of layers, less than a tenth more."""
    layers = {"w": draw(64, 128, 128) / 11}
    fn = lambda p, x: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0])
    x = draw(4, 128)
    p = jq.latent(layers, jq.lsq(4, 64), jq.sites(fn, layers, x))
    loss = jq.quantized(fn)
    of = lambda compiled: compiled.memory_analysis()
    total = lambda m: m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
    run = total(of(jax.jit(loss).lower(p, x).compile()))
    step = jax.jit(zo_step(loss, Zeroth(0.5, drawing=Drawing(relative=True))), donate_argnums=0)
    m = of(step.lower(p, jax.random.key(0), 0.1, x).compile())
    ours = total(m) - m.alias_size_in_bytes
    assert ours < 1.1 * run, (ours / run, run)
    back = total(of(jax.jit(jax.value_and_grad(loss)).lower(p, x).compile()))
    assert back > 1.8 * run  # what it spares


def test_which_arrays_move():
    p, x, y = made()
    how = Zeroth(kinds=("scale",))
    _, g = zo_value_and_grad(error, how)(p, x, y, key=jax.random.key(0))
    assert not np.any(g["a"].data["codes"]) and np.any(g["a"].data["scale"])
    by_turns = Zeroth(blocks=2)
    run = jax.jit(lambda key: zo_value_and_grad(error, by_turns)(p, x, y, key=key)[1])
    moves = [
        [bool(np.any(run(jax.random.key(i))[n].data["codes"])) for n in "ab"] for i in range(8)
    ]
    assert all(sum(m) == 1 for m in moves) and len({tuple(m) for m in moves}) == 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Zeroth(kinds=("weights",)), "unknown labels"),
        (lambda: Zeroth(epsilon=0.0), "epsilon must be positive"),
        (
            lambda: zo_value_and_grad(quadratic, Zeroth())({"w": draw(4)}, key=jax.random.key(0)),
            "nothing to train",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
