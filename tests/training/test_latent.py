"""Latent weights: train = serve for every format that trains, under every transform of JAX."""

import dataclasses
from functools import lru_cache

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.rounding import LDLQ, Nearest
from jaxquant.storage import checkpoint
from tests.support.arrays import draw, stack
from tests.support.networks import NETWORKS


def made(format, estimator=None, **options):
    return jq.Method("made", Nearest(), format, estimator=estimator, **options)


LSQ = jq.estimators.LSQ()
# Every format that trains, and every form of inputs: one line each.
METHODS = [
    jq.ste(2, 16),
    jq.ste(3, 16, symmetric=True, mse=True, clipped=True),
    jq.ste(4, "channel"),
    jq.ste(8, 16, stochastic=True),
    jq.lsq(2, 16),
    jq.lsq(3, 16, scale_gradient="none"),
    jq.lsq(4, 16, symmetric=False),
    jq.lsq(8, "tensor"),
    jq.lsq(4, 20, pad=True),
    jq.stretched_elastic(2),
    jq.stretched_elastic(1.58, 16),
    jq.stretched_elastic(3),
    jq.bitnet(),
    jq.bitnet(activations=None),
    jq.bitnet(activations="int4,mean"),
    jq.bitnet(activations="int8,top=0.5"),
    jq.zeroqat(2, 16),
    jq.zeroqat(4, 16, symmetric=True),
    jq.normal_float(4, 16),
    jq.normal_float(4, 16, double_quant=True),
    jq.float8(),
    jq.mxfp4(pad=True),
    jq.nvfp4(pad=True),
    jq.ternary(16),
    made(jq.formats.NormalFloat(3, 16), LSQ),
    made(jq.formats.MXFP4(pad=True)),
    made(jq.formats.Ternary(group_size=16), LSQ),
    made(jq.formats.Float8("e4m3", 16), LSQ),
    made(jq.formats.E8P(2)),
    made(jq.formats.Integer(4, 16), LSQ, activations="int8"),
    made(jq.formats.Integer(4, 16), LSQ, activations="int4,asymmetric,clip=0.9"),
    made(jq.formats.Integer(2, 16), LSQ, activations="int8,asymmetric"),
    made(jq.formats.Integer(4, 16), LSQ, activations="float8"),
    made(jq.formats.Integer(4, 16), LSQ, activations="int8,asymmetric,static"),
    made(
        jq.formats.Integer(4, 16),
        LSQ,
        input=jq.transforms.Rotation(),
        output=jq.transforms.Rotation(),
    ),
    jq.lsq(4, 16, activations="int8,static,mse"),
    jq.lsq(4, 16, activations="int4,asymmetric,static,mse"),
    jq.lsq(4, 16, activations="int8,asymmetric,static,mse"),
    jq.pact(4, 16),
    jq.pact(4, 16, activations="int8,asymmetric,static,mse"),
]
all_methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {m.format}"[:60])
FOUR = jq.lsq(4, 16)


def net(p, x):
    return jnp.tanh(x @ p["a"]) * (x @ p["b"])


@lru_cache
def measured():
    params = {"a": draw(32, 48), "b": draw(32, 48, seed=1)}
    return params, jq.calibrate(net, params, [draw(64, 32, seed=5)], sample=32)


@lru_cache
def latents(method):
    params, stats = measured()
    return jq.latent(params, method, stats)


@all_methods
def test_what_is_frozen_gives_what_trained(method):
    p, x = latents(method), draw(7, 32, seed=2)
    frozen = jq.freeze(p)
    assert frozen["a"].format == method.format and not isinstance(
        frozen["a"].format, jq.estimators.Latent
    )
    np.testing.assert_array_equal(frozen["a"].dequantize(), p["a"].dequantize())
    for run in (jq.quantized(net), jax.jit(jq.quantized(net))):
        np.testing.assert_array_equal(run(p, x), run(frozen, x))
    assert frozen["a"].bits_per_weight < 17 < p["a"].bits_per_weight


@pytest.mark.parametrize("form", ["int8", "int4,mean", "int8,top=0.5"])
def test_bitnet_is_served_in_integers(form):
    """Products of what trains, and of what is packed, are whole steps; on disk 1.6 bits."""
    method = jq.bitnet(activations=form)
    p = jq.latent({"w": draw(320, 48)}, method)
    frozen, x = jq.freeze(p)["w"], draw(7, 320, seed=2)
    q = np.asarray(jnp.round(frozen.dequantize() / frozen.data["scale"]), np.int64)
    assert set(np.unique(q)) == {-1, 0, 1}
    codes, scale, _ = jq.Activations.of(form).codes(x, {})
    want = np.asarray(codes, np.int64) @ q
    run = jq.quantized(lambda p, x: x @ p["w"])
    for params in (p, {"w": frozen}):
        steps = np.asarray(run(params, x) / (scale * frozen.data["scale"]), np.float64)
        np.testing.assert_array_equal(np.rint(steps), want)
        assert np.max(abs(steps - want)) < 0.01
    kept = frozen.format.to_disk(frozen.data, 320)["codes"]
    assert 8 * kept.size * kept.dtype.itemsize == 1.6 * frozen.size


@all_methods
def test_training_lowers_the_loss(method):
    """Derivatives reach all that trains, and descend."""
    p, x = latents(method), draw(64, 32, seed=2)
    y = net({"a": draw(32, 48, seed=8), "b": draw(32, 48, seed=9)}, x)
    train, rest = eqx.partition(p, jq.trained(p))
    loss = jax.jit(lambda t: jnp.mean((jq.quantized(net)(eqx.combine(t, rest), x) - y) ** 2))
    first, slope = jax.jit(jax.value_and_grad(loss))(train)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(slope["b"].data["codes"]))
    relative = optax.chain(optax.adam(5e-3), jq.training.relative())
    optimizer = jq.training.optimizer(
        train, weight=optax.adam(1e-2), scale=relative, range=relative
    )
    state = optimizer.init(train)

    @jax.jit
    def step(t, state):
        updates, state = optimizer.update(jax.grad(loss)(t), state, t)
        return optax.apply_updates(t, updates), state

    for _ in range(40):
        train, state = step(train, state)
    assert float(loss(train)) < 0.8 * float(first)
    assert float(loss(train)) == pytest.approx(_served(eqx.combine(train, rest), x, y), rel=1e-6)


def _served(p, x, y):
    serve = jax.jit(lambda q: jnp.mean((jq.quantized(net)(q, x) - y) ** 2))
    return float(serve(jq.freeze(p)))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
def test_frameworks(network):
    """The cotangents of rounded weights are those that JAX has for plain ones."""
    fn, tree, paths = network()
    params = tree(draw(32, 64), draw(64, 32, seed=1))
    x = draw(5, 32, seed=2)
    method = jq.ste(4, 16)
    p = jq.latent(params, method, jq.sites(fn, params, x))
    loss = lambda p, x: jnp.sum(fn(p, x) ** 2)
    run = jax.value_and_grad(jq.quantized(loss))
    for value, got in (run(p, x), jax.jit(run)(p, x)):
        want_value, want = jax.value_and_grad(loss)(jq.dequantize(p), x)
        np.testing.assert_allclose(value, want_value, rtol=1e-5)
        slopes = dict(jq.core.path_leaves(want))
        for path, w in jq.core.path_leaves(got):
            if path in paths:
                np.testing.assert_allclose(plain(w), slopes[path], rtol=1e-4, atol=1e-3)


def plain(w):
    """What a weight's codes hold, in the order of its axes."""
    return dataclasses.replace(w, format=jq.formats.Dense()).dequantize()


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers(remat):
    net = stack()(remat=remat)
    x = draw(5, 32)
    params = net.init(jax.random.key(0), x)["params"]
    fn = lambda p, x: net.apply({"params": p}, x)
    p = jq.latent(params, FOUR, jq.sites(fn, params, x))
    np.testing.assert_array_equal(jq.quantized(fn)(p, x), jq.quantized(fn)(jq.freeze(p), x))
    loss = lambda p: jnp.sum(jq.quantized(fn)(p, x) ** 2)
    slope = jax.jit(jax.grad(loss))(p)["layers"]["d"]["kernel"].data

    def unrolled(p):
        w, h = p["layers"]["d"]["kernel"], x
        for i in range(3):
            one = jax.tree.map(lambda a, i=i: a[i], w)
            h = h + jnp.tanh(jq.quantized(lambda w, h: h @ w)(one, h))
        return jnp.sum(h**2)

    want = jax.grad(unrolled)(p)["layers"]["d"]["kernel"].data
    for name in ("codes", "scale"):
        np.testing.assert_allclose(slope[name], want[name], rtol=1e-4, atol=1e-5)


def test_a_tied_embedding():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(96, 32, name="e")
            return embed.attend(jnp.tanh(embed(ids)))

    model, ids = Net(), jnp.array([[1, 95], [0, 7]])
    params = model.init(jax.random.key(0), ids)["params"]
    fn = lambda p, ids: model.apply({"params": p}, ids)
    p = jq.latent(params, jq.ste(4, 16), jq.sites(fn, params, ids))
    np.testing.assert_array_equal(jq.quantized(fn)(p, ids), jq.quantized(fn)(jq.freeze(p), ids))
    loss = lambda p: jnp.sum(fn(p, ids) ** 2)
    got = jax.grad(jq.quantized(loss))(p)["e"]["embedding"]
    want = jax.grad(loss)(jq.dequantize(p))["e"]["embedding"]
    np.testing.assert_allclose(plain(got), want, rtol=1e-4, atol=1e-5)


def test_vmap_over_models_and_examples():
    p, x = latents(FOUR), draw(4, 7, 32, seed=2)
    run = jq.quantized(net)
    several = jax.tree.map(lambda a: jnp.stack([a, a * 1.1]), p)
    got = jax.vmap(jax.vmap(run, (None, 0)), (0, None))(several, x)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], several)
        for j in range(4):
            np.testing.assert_allclose(got[i, j], run(one, x[j]), rtol=1e-5, atol=1e-5)
    slopes = jax.vmap(jax.grad(lambda p, x: jnp.sum(run(p, x))), (None, 0))(p, x)
    whole = jax.grad(lambda p: jnp.sum(jax.vmap(run, (None, 0))(p, x)))(p)
    summed = jax.tree.map(lambda many: jnp.sum(many, 0), slopes)
    chex.assert_trees_all_close(summed, whole, rtol=1e-4, atol=1e-5)


def test_gradients_accumulate():
    """Over microbatches they sum to those of the batch."""
    p, x = latents(FOUR), draw(8, 32, seed=2)
    loss = lambda p, x: jnp.mean(jq.quantized(net)(p, x) ** 2)
    parts = jax.lax.map(lambda x: jax.grad(loss)(p, x), x.reshape(4, 2, 32))
    whole = jax.grad(loss)(p, x)
    mean = jax.tree.map(lambda many: jnp.mean(many, 0), parts)
    chex.assert_trees_all_close(mean, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rounder", [Nearest(), LDLQ()], ids=str)
@pytest.mark.parametrize("learned", [LSQ, None], ids=str)
def test_training_begins_at_the_codes_of_any_rounder(rounder, learned):
    params = {"a": draw(32, 48), "b": draw(32, 48, seed=1)}
    method = jq.Method("start", rounder, jq.formats.Integer(3, 16), estimator=learned)
    stats = jq.calibrate(net, params, [draw(64, 32, seed=5)])
    q = jq.quantize(params, method, stats)
    for p in (jq.latent(params, method, stats), jq.thaw(q, method)):
        if learned is not None:
            np.testing.assert_array_equal(p["a"].dequantize(), q["a"].dequantize())
            np.testing.assert_array_equal(jq.freeze(p)["a"].data["codes"], q["a"].data["codes"])
    moved = np.abs(jq.latent(params, method, stats)["a"].data["codes"] - params["a"])
    if isinstance(rounder, Nearest):
        assert moved.max() == 0  # the floats themselves
    else:
        step = np.repeat(np.asarray(q["a"].data["scale"], np.float32), 16, axis=0)
        # Error feedback moves a weight further than rounding does, but most keep their floats.
        assert 0.5 < np.mean(moved == 0) < 1 and np.max(moved / step) < 4


def test_what_is_not_in_the_recipe_stays_frozen():
    params = {"a": draw(32, 48), "b": draw(32, 48, seed=1), "c": draw(48)}
    fn = lambda p, x: net(p, x) + p["c"]
    mixed = jq.Recipe([("a", FOUR), ("b", jq.gptq(4, 16)), ("*", jq.KEEP)])
    stats = jq.calibrate(fn, params, [draw(64, 32, seed=5)])
    p = jq.thaw(jq.quantize(params, mixed, stats), jq.Recipe([("a", FOUR), ("*", jq.KEEP)]))
    assert jq.labels(p)["b"].data == {"codes": "frozen", "scale": "frozen", "zero": "frozen"}
    train, rest = eqx.partition(p, jq.trained(p))
    slope = jax.grad(lambda t, x: jnp.sum(jq.quantized(fn)(eqx.combine(t, rest), x)))(
        train, draw(5, 32)
    )
    assert [path for path, _ in jax.tree_util.tree_leaves_with_path(slope) if path] and len(
        jax.tree.leaves(slope)
    ) == 3
    frozen = jq.freeze(p)
    assert frozen["b"] is p["b"] and frozen["a"].format == FOUR.format


def test_only_what_trains_has_a_state():
    p = latents(FOUR)
    optimizer = jq.training.optimizer(p, weight=optax.adamw(1e-3), scale=optax.sgd(1e-4))
    size = lambda tree: sum(a.size for a in jax.tree.leaves(tree) if a.ndim)
    weights = sum(w.data["codes"].size for w in p.values())
    assert size(optimizer.init(p)) == 2 * weights  # two moments of weights, none of scales
    slope = jax.grad(lambda p: jnp.sum(jq.quantized(net)(p, draw(5, 32))))(p)
    updates, _ = optimizer.update(slope, optimizer.init(p), p)
    moved = updates["a"].data["scale"] / slope["a"].data["scale"]
    np.testing.assert_allclose(moved, -1e-4, rtol=1e-5)
    still = jq.training.optimizer(p, scale=optax.sgd(1.0))
    updates, _ = still.update(slope, still.init(p), p)
    assert not jnp.any(updates["a"].data["codes"])
    with pytest.raises(ValueError, match="unknown labels"):
        jq.training.optimizer(p, weights=optax.sgd(1.0))


def test_frozen_weights_are_saved_and_latent_ones_too(tmp_path):
    p = latents(jq.lsq(4, 16, activations="int8,static,mse"))
    x = draw(5, 32)
    for name, tree in (("latent", p), ("frozen", jq.freeze(p))):
        checkpoint.save(tmp_path / name, tree)
        again = checkpoint.load(tmp_path / name)
        np.testing.assert_array_equal(jq.quantized(net)(again, x), jq.quantized(net)(p, x))


def test_explain_says_how_a_latent_weight_is_served():
    text = str(jq.explain(net, latents(FOUR), draw(5, 32)))
    assert "rounded for every product, then packed_matmul, 4-bit words" in text


def bad(change):
    p = latents(FOUR)
    data = p["a"].data
    return {**p, "a": dataclasses.replace(p["a"], data=data | {"scale": change(data["scale"])})}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: jq.freeze(bad(lambda s: s.at[0, 0].set(jnp.nan))), "a: scale holds values"),
        (lambda: jq.freeze(bad(lambda s: s.at[0, :2].set(0.0))), "a: 2 scales are not positive"),
        (lambda: jq.thaw(latents(FOUR), FOUR), "a: the weight is already latent"),
        (lambda: jq.thaw({"a": draw(4, 4)}, FOUR), "nothing to train"),
        (
            lambda: jq.thaw(jq.freeze(latents(FOUR)), jq.Recipe([("x*", FOUR)])),
            "'x\\*' matches no leaf",
        ),
        (
            lambda: jq.thaw(jq.freeze(latents(FOUR)), FOUR, floats={"a": draw(3, 4)}),
            r"a: the weight has shape .*, but floats holds \[3, 4\]",
        ),
        (
            lambda: jq.latent(
                {"a": draw(32, 16)},
                made(
                    jq.formats.Integer(4, 16),
                    activations="int8",
                    input_estimator=jq.estimators.LSQRange(),
                ),
            ),
            "int8,static",
        ),
        (lambda: jq.trained(latents(FOUR), "weights"), "unknown labels"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
