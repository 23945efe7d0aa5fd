"""Statistics by cotangents against explicit sums, in every framework."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.support.arrays import draw, stack
from tests.support.networks import NETWORKS


def hidden(x, a):
    return np.tanh(np.asarray(x) @ np.asarray(a))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
def test_grams_are_the_explicit_second_moments(network):
    fn, tree, paths = network()
    a, b = draw(32, 64), draw(64, 32, seed=1)
    batches = [draw(5, 32, seed=s) for s in (2, 3)]
    stats = jq.calibrate(fn, tree(a, b), batches)
    x = np.concatenate(batches)
    for path, rows in zip(paths, (x, hidden(x, a)), strict=True):
        want = rows.T @ rows / len(rows)
        got = stats.gram(path)
        if got.ndim == 3:  # an Einsum that keeps the heads as batch axes of the weight
            continue
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
def test_gradient_weighting(network):
    fn, tree, paths = network()
    a, b = draw(32, 64), draw(64, 32, seed=1)
    x = draw(5, 32, seed=2)
    target = draw(5, 32, seed=3)
    stats = jq.calibrate(fn, tree(a, b), [x], loss=lambda y, _: jnp.mean((y - target) ** 2))
    h = jnp.tanh(x @ a)
    g = jax.grad(lambda y: jnp.mean((y - target) ** 2))(h @ b)
    energy = np.sum(np.square(g), -1)
    got = stats.gram(paths[1])
    if got.ndim == 2:
        want = np.einsum("tk,t,tl->kl", h, energy, h) / 5
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    # A wrong weighting is not the same: the twin of the assertion above.
    plain = jq.calibrate(fn, tree(a, b), [x]).gram(paths[1])
    scale = np.trace(np.asarray(plain).sum(0) if plain.ndim == 3 else plain)
    other = np.trace(np.asarray(got).sum(0) if got.ndim == 3 else got)
    assert np.abs(np.asarray(plain) / scale - np.asarray(got) / other).max() > 1e-3


def test_energy_weighting():
    """A token a thousand times as large is one of many; what is of no token is of none."""
    fn, params = lambda p, x: (x @ p["q"], x @ p["k"]), {"q": draw(8, 4), "k": draw(8, 6)}
    x = draw(64, 8, seed=3)
    of = lambda x: jq.calibrate(fn, params, [x], weighting="energy")
    unit = np.asarray(x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True)))
    got, sink = of(x), of(x.at[0].mul(1e3))
    np.testing.assert_allclose(got.gram("q"), unit.T @ unit / 64, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sink.gram("q"), got.gram("q"), rtol=1e-3, atol=1e-4)
    assert len(got.sums) == 1  # they share an input, and the weights of its rows
    np.testing.assert_array_equal(of(x).of("k").high, jnp.maximum(jnp.max(x, axis=0), 0))
    padded = of(jnp.concatenate([x, jnp.zeros((64, 8))]))
    np.testing.assert_allclose(2 * padded.gram("q"), got.gram("q"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_have_a_gram_each(remat):
    net = stack()(remat=remat)
    x = draw(5, 32)
    params = net.init(jax.random.key(0), x)["params"]
    stats = jq.calibrate(lambda p, x: net.apply({"params": p}, x), params, [x])
    w = np.asarray(params["layers"]["d"]["kernel"])
    h = np.asarray(x)
    for i in range(3):
        got = stats.gram("layers/d/kernel")[i]
        np.testing.assert_allclose(got, h.T @ h / 5, rtol=1e-5, atol=1e-5)
        h = h + np.tanh(h @ w[i])


def test_experts_have_a_gram_each():
    w, x = draw(4, 32, 16), draw(4, 5, 32, seed=1)
    fn = lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x)
    got = jq.calibrate(fn, {"w": w}, [x]).gram("w")
    np.testing.assert_allclose(got, np.einsum("etk,etl->ekl", x, x) / 5, rtol=1e-5, atol=1e-5)


def test_weights_that_share_an_input_share_a_gram():
    params = {"q": draw(32, 8), "k": draw(32, 16), "o": draw(8, 8)}

    def fn(p, x):
        return jax.jit(lambda w: x @ w)(p["q"]) @ p["o"], x @ p["k"]

    stats = jq.calibrate(fn, params, [draw(5, 32)])
    assert stats.holder["k"] == stats.holder["q"] != stats.holder["o"]
    assert len(stats.sums) == 2
    weighted = jq.calibrate(
        fn, params, [draw(5, 32)], loss=lambda y, _: jnp.sum(y[0]) + jnp.sum(y[1] ** 2)
    )
    assert len(weighted.sums) == 3  # each by its own output gradients


def test_bad_input():
    fn = lambda p, x: x @ p["w"]
    params = {"w": draw(32, 8)}
    with pytest.raises(ValueError, match="at least one batch"):
        jq.calibrate(fn, params, [])
    with pytest.raises(ValueError, match="needs loss="):
        jq.calibrate(fn, params, [draw(5, 32)], weighting="gradient")
    with pytest.raises(ValueError, match="saw it in no matmul"):
        jq.calibrate(fn, params, [draw(5, 32)]).gram("v")


def test_blocks_one_at_a_time_see_quantized_prefixes():
    w = draw(3, 32, 32) * 0.3
    x = draw(64, 32, seed=1)
    block = lambda p, h: h + jnp.tanh(h @ p["w"])
    method = jq.gptq(bits=3, group_size=16)
    got, out = jq.ptq.quantize_blocks(block, {"w": w}, [x], method)
    h = x
    for i in range(3):
        want = jq.quantize_array(w[i], method, h.T @ h / 64).dequantize()
        np.testing.assert_allclose(got["w"].dequantize()[i], want, atol=1e-5)
        h = block({"w": want}, h)
    np.testing.assert_allclose(out[0], h, rtol=1e-4, atol=1e-4)

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (block({"w": w}, h), None), x, p["w"])[0]

    np.testing.assert_allclose(jq.quantized(fn)(got, x), h, rtol=1e-4, atol=1e-4)
    assert jq.explain(fn, got, x).materialised == ()


def test_rows_are_counted_where_they_are_seen():
    """Loops, branches and batches of other shapes: the mean is over the rows that went by."""
    w, x, y = draw(32, 32), draw(5, 32), draw(3, 32, seed=1)
    h = [np.asarray(x)]
    for _ in range(2):
        h.append(np.tanh(h[-1] @ np.asarray(w)))
    got = jq.calibrate(
        lambda p, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=3)[0],
        {"w": w}, [x],
    )  # fmt: skip
    want = sum(a.T @ a for a in h) / 15
    np.testing.assert_allclose(got.gram("w"), want, rtol=1e-4, atol=1e-4)
    both = jq.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x, y])
    np.testing.assert_allclose(both.gram("w"), (x.T @ x + y.T @ y) / 8, rtol=1e-5, atol=1e-5)
    branch = jq.calibrate(
        lambda p, x: jax.lax.cond(x[0, 0] > 9, lambda x: 2 * x @ p["w"], lambda x: x @ p["w"], x),
        {"w": w}, [x],
    )  # fmt: skip
    np.testing.assert_allclose(branch.gram("w"), x.T @ x / 5, rtol=1e-5, atol=1e-5)


def test_only_the_very_same_inputs_are_shared():
    a, b, x, y = draw(32, 8), draw(32, 8, seed=1), draw(5, 32), draw(7, 32, seed=2)
    for order in (1, -1):

        def fn(p, x, order=order):
            parts = [x @ p["b"], y @ p["b"]][::order]
            return jnp.sum(x @ p["a"]) + sum(jnp.sum(part) for part in parts)

        stats = jq.calibrate(fn, {"a": a, "b": b}, [x])
        np.testing.assert_allclose(stats.gram("a"), x.T @ x / 5, rtol=1e-5, atol=1e-5)
        want = (x.T @ x + y.T @ y) / 12
        np.testing.assert_allclose(stats.gram("b"), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [32, 16])
def test_a_weight_used_both_ways_has_the_gram_of_the_first(n):
    w, x = draw(32, n), draw(5, 32)
    with pytest.warns(UserWarning, match="w is multiplied in two ways"):
        stats = jq.calibrate(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": w}, [x])
    np.testing.assert_allclose(stats.gram("w"), x.T @ x / 5, rtol=1e-5, atol=1e-5)


def test_statistics_that_no_gradient_fills_are_reported():
    w, x = draw(32, 8), draw(5, 32)
    with pytest.warns(UserWarning, match="statistics of w are zero: no gradient reached"):
        jq.calibrate(lambda p, x: jnp.argmax(x @ p["w"], -1), {"w": w}, [x])


def test_a_stopped_calibration_goes_on_to_the_same_bits():
    """And what is kept of other weights, other settings or another first batch is not taken."""
    fn, rng = lambda p, x: jnp.tanh(x @ p["w"]), np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    batches = [jnp.asarray(rng.normal(size=(5, 6)), jnp.float32) for _ in range(5)]
    calibrate = partial(jq.calibrate, fn, sample=2, save_every=2)

    class StopError(Exception):
        pass

    def stopping():
        yield from batches[:3]
        raise StopError

    whole = calibrate(params, batches)
    kept, done = {}, []
    with pytest.raises(StopError):
        calibrate(params, stopping(), finished=kept)
    assert int(kept["calibration"]["count"]) == 2
    batches[1] = jnp.full((5, 6), jnp.nan)  # it is passed over
    got = calibrate(params, batches, finished=kept, progress=done.append)
    assert int(kept["calibration"]["count"]) == 5 and done == [1, 2, 3, 4, 5]
    chex.assert_trees_all_equal(got.sums, whole.sums)
    with pytest.raises(
        ValueError, match="save_every must be a number of batches, 1 or more, got 0"
    ):
        calibrate(params, batches, save_every=0)
    with pytest.raises(
        ValueError, match="kept as 'calibration' cover 5 batches, but batches has only 2"
    ):
        calibrate(params, batches[:2], finished=kept)
    assert "w" in calibrate(params, batches, finished={"calibration": {"another": 1}}).sums
    others = [
        calibrate({"w": params["w"] + 1}, batches, finished=dict(kept)),
        calibrate(params, batches, finished=dict(kept), gram=False),
        calibrate(params, [batches[0] + 1, *batches[1:]], finished=dict(kept)),
    ]
    assert all(np.isnan(other.sums["w"].magnitude).any() for other in others)
