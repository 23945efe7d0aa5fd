"""Quantized functions against the dequantized model, in every framework, and nothing dense."""

import traceback
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from pallas_kernels import cpu, dispatch, lowering
from pallas_kernels.cost.chips import CHIPS
from tests.support.arrays import check, draw, stack
from tests.support.networks import NETWORKS

ROOT, ROOMS = Path(cpu.__file__).parents[2], ("jaxquant", "pallas_kernels")

FORMATS = [
    jq.rtn(bits=4, group_size=16),
    jq.rtn(bits=3, group_size=-1),
    jq.rtn(bits=2, group_size=8, symmetric=True),
    jq.rtn(bits=8, group_size="tensor"),
    jq.ternary(group_size=16),
]


CASES = [(n, FORMATS[0]) for n in NETWORKS] + [(NETWORKS[-1], m) for m in FORMATS[1:]]


@pytest.mark.parametrize(
    ("network", "method"), CASES, ids=lambda v: getattr(v, "__name__", None) or str(v.format.bits)
)
def test_frameworks(network, method):
    fn, tree, paths = network()
    params = tree(draw(32, 64), draw(64, 32, seed=1))
    x = draw(5, 32, seed=2)
    qparams = jq.quantize(params, method, jq.sites(fn, params, x))
    assert [p for p, w in jq.core.path_leaves(qparams) if isinstance(w, jq.QTensor)] == list(paths)
    check(fn, params, qparams, x)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
def test_gradient_of_other_arguments(network):
    fn, tree, _ = network()
    params = tree(draw(32, 64), draw(64, 32, seed=1))
    x = draw(5, 32, seed=2)
    qparams = jq.quantize(params, jq.rtn(bits=4, group_size=16), jq.sites(fn, params, x))
    got = jax.jit(jax.grad(lambda x: jnp.sum(jq.quantized(fn)(qparams, x) ** 2)))(x)
    want = jax.grad(lambda x: jnp.sum(fn(jq.dequantize(qparams), x) ** 2))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers(remat):
    net = stack()(remat=remat)
    x = draw(5, 32)
    params = net.init(jax.random.key(0), x)["params"]

    def fn(p, x):
        return net.apply({"params": p}, x)

    found = jq.sites(fn, params, x)["layers/d/kernel"]
    assert (found.batch, found.contracted, found.output) == ((0,), (1,), (2,))
    check(fn, params, jq.quantize(params, FORMATS[0], {"layers/d/kernel": found}), x)
    with pytest.warns(UserWarning, match="assumed"):  # no sites: leading axes are batch
        qparams = jq.quantize(params, FORMATS[0])
    check(fn, params, qparams, x)


@pytest.mark.parametrize("method", FORMATS, ids=lambda m: f"{m.name}{m.format.bits}")
def test_tied_embedding(method):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(96, 32, name="e")
            return embed.attend(jnp.tanh(embed(ids)))

    net, ids = Net(), jnp.array([[1, 95], [0, 7]])
    params = net.init(jax.random.key(0), ids)["params"]

    def fn(p, ids):
        return net.apply({"params": p}, ids)

    found = jq.sites(fn, params, ids)
    assert (found["e/embedding"].contracted, found["e/embedding"].gathered) == ((1,), 0)
    check(fn, params, jq.quantize(params, method, found), ids)


def test_nnx_embedding():
    graph, state = nnx.split(nnx.Embed(96, 32, rngs=nnx.Rngs(0)))

    def fn(p, ids):
        embed = nnx.merge(graph, p)
        return embed.attend(jnp.tanh(embed(ids)))

    ids = jnp.array([[1, 95], [0, 7]])
    qparams = jq.quantize(state, FORMATS[0], jq.sites(fn, state, ids))
    check(fn, state, qparams, ids)


def test_out_of_range_look_up_is_what_jax_gives():
    w = draw(16, 8)
    q = jq.quantize_array(w, jq.rtn(bits=4, group_size=8))
    ids = jnp.array([0, 99, -1])
    for mode in ("fill", "clip"):
        got = jq.quantized(lambda w, m=mode: jnp.take(w, ids, axis=0, mode=m))(q)
        want = jnp.take(q.dequantize(), ids, axis=0, mode=mode)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("out", [0, 1])
def test_experts_under_vmap(out):
    w, x = draw(4, 32, 16), draw(4, 5, 32, seed=1)

    def fn(p, x):
        return jax.vmap(lambda w, x: x @ w, out_axes=out)(p["w"], x)

    found = jq.sites(fn, {"w": w}, x)
    assert found["w"].batch == (0,)
    check(fn, {"w": w}, jq.quantize({"w": w}, FORMATS[0], found), x)


def test_weight_used_in_other_ways_is_right_and_reported():
    w, x = draw(32, 32), draw(5, 32, seed=1)

    def fn(p, x):
        return x @ jnp.sin(p["w"])

    check(fn, {"w": w}, jq.quantize({"w": w}, FORMATS[0]), x, dense=["w"])


def test_indexed_layer_and_slices_stay_packed():
    w, x = draw(3, 32, 32), draw(5, 32, seed=1)

    def fn(p, x):
        body = lambda i, x: jnp.tanh(x @ jax.lax.dynamic_index_in_dim(p["w"], i, keepdims=False))
        return jax.lax.fori_loop(0, 3, body, x) @ p["w"][1:2][0]

    check(fn, {"w": w}, jq.quantize({"w": w}, FORMATS[0], jq.sites(fn, {"w": w}, x)), x)


def test_tensor_is_a_pytree():
    q = jq.quantize_array(draw(32, 16), FORMATS[0])
    np.testing.assert_array_equal(jax.jit(lambda q: q)(q).dequantize(), q.dequantize())
    moved = jax.tree.map(jnp.copy, jax.device_put(q, jax.devices()[0]))
    assert jax.tree.structure(moved) == jax.tree.structure(q)
    shape = jax.eval_shape(lambda q: q, q)
    assert (shape.shape, shape.nbytes) == (q.shape, q.nbytes)
    donated = jax.jit(lambda q: jax.tree.map(lambda a: a + 0, q), donate_argnums=0)(moved)
    np.testing.assert_array_equal(donated.dequantize(), q.dequantize())


def test_bfloat16_network():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, use_bias=False, dtype=jnp.bfloat16, name="a")(x)

    params = {"a": {"kernel": draw(32, 16)}}
    fn = lambda p, x: Net().apply({"params": p}, x)
    qparams = jq.quantize(params, FORMATS[0])
    y = jax.jit(jq.quantized(fn))(qparams, draw(5, 32))
    assert y.dtype == jnp.bfloat16
    assert jq.explain(fn, qparams, draw(5, 32)).materialised == ()


@pytest.mark.parametrize("dtype", ["int32", "bool", "bfloat16", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_activations_of_another_dtype(dtype, transposed):
    """Mixed operands are promoted, as in a plain dot: weights never fall to the dtype of x."""
    w = draw(32, 32)
    x = (3 * draw(5, 32, seed=1)).astype(dtype)
    fn = lambda p, x: x @ (p["w"].T if transposed else p["w"])
    check(fn, {"w": w}, jq.quantize({"w": w}, FORMATS[0]), x)
    # The twin: weights cast to the dtype of x are something else.
    low = fn({"w": w.astype(dtype)}, x)
    assert np.abs(np.asarray(low, np.float32) - fn({"w": w}, x)).max() > 1e-3


def test_equinox_with_functions_and_flags_in_the_tree():
    mlp = eqx.nn.MLP(32, 16, 64, 2, key=jax.random.key(0))

    def fn(mlp, x, flag):
        y = jax.vmap(mlp)(x)
        return y if flag else jnp.zeros_like(y)

    x = draw(5, 32)
    found = jq.sites(fn, mlp, x, True)
    qmlp = jq.quantize(mlp, FORMATS[0], found)
    assert jq.bits_per_weight(qmlp) == 5.25
    got = jq.quantized(fn)(qmlp, x, True)
    np.testing.assert_allclose(got, fn(jq.dequantize(qmlp), x, True), rtol=1e-5, atol=1e-5)
    assert jq.explain(fn, qmlp, x, True).materialised == ()
    assert jq.explain(fn, qmlp, x, flag=True).uses
    stats = jq.calibrate(lambda p, x: fn(p, x, True), mlp, [x])
    np.testing.assert_allclose(stats.gram("layers/0/weight"), x.T @ x / 5, rtol=1e-5, atol=1e-5)


def test_equinox_embedding():
    embed = eqx.nn.Embedding(96, 32, key=jax.random.key(0))
    fn = lambda p, ids: jax.vmap(p)(ids)
    ids = jnp.array([1, 95, 0])
    found = jq.sites(fn, embed, ids)
    assert found["weight"].gathered == 0
    qembed = jq.quantize(embed, jq.Recipe([("*", FORMATS[0])]), found)
    check(fn, embed, qembed, ids)


def test_layers_stacked_along_another_axis():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + jnp.tanh(nn.Dense(32, use_bias=False, name="d")(x)), None

    net, x = Net(), draw(5, 32)
    params = net.init(jax.random.key(0), x)["params"]
    assert params["layers"]["d"]["kernel"].shape == (32, 3, 32)
    fn = lambda p, x: net.apply({"params": p}, x)
    stats = jq.calibrate(fn, params, [x])
    site = stats.sites["layers/d/kernel"]
    assert (site.batch, site.contracted, site.output) == ((1,), (0,), (2,))
    np.testing.assert_allclose(stats.gram(site.path)[0], x.T @ x / 5, rtol=1e-5, atol=1e-5)
    check(fn, params, jq.quantize(params, jq.gptq(4, 16), stats), x)


def test_as_a_tree_of_other_things():
    q = jq.quantize_array(draw(32, 16), FORMATS[0])
    assert "(4, 16)" in repr(jax.tree.map(jnp.shape, q))


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn"])
def test_rows_that_kernels_do_not_take_enter_as_float32(dtype):
    with jax.enable_x64(dtype == "float64"):
        w = jq.quantize_array(draw(64, 32).astype("float32"), jq.rtn(4))
        w, x = w.cast(dtype), draw(3, 64).astype(dtype)
        for fn in (lambda w, x: x @ w, lambda w, x: (x @ w) @ w.T):
            y = jq.quantized(fn)(w, x)
            want = fn(w.cast("float32").dequantize(), x.astype("float32"))
            assert y.dtype == dtype
            tolerance = 1e-4 if dtype == "float64" else 0.3
            assert jnp.max(jnp.abs(y.astype("float32") - want)) < tolerance * jnp.max(jnp.abs(want))
        with pytest.raises(ValueError, match="x must be"):
            jq.quantized(lambda w, x: x @ w)(w.cast("float32"), x.astype("complex64"))


def test_a_chip_stands_for_its_platform():
    w = jq.quantize_array(draw(512, 256), jq.rtn(4))
    of = lambda name: jq.explain(lambda w, x: x @ w, w, draw(2, 512), platform=name)
    for chip, known in CHIPS.items():
        assert of(chip) == of(known.platform) and f"{known.platform} kernel" in str(of(chip))
    assert of("H100") == of("cuda") != of("V5e") == of("tpu")


class ArrivedError(Exception):
    """Raised where a call is to end."""


def ours(call):
    """Frames of jaxquant and of pallas_kernels between a call and where it ends."""

    def arrive(*args, **kwargs):
        raise ArrivedError

    with pytest.raises(ArrivedError) as caught:
        call(arrive)
    files = [Path(frame.filename) for frame in traceback.extract_tb(caught.tb)]
    return [sum(f.is_relative_to(ROOT / name) for f in files) for name in ROOMS]


@pytest.mark.parametrize("kernels", ["auto", "cpu"])
def test_from_a_function_to_its_kernel_in_nine_calls(kernels, monkeypatch):
    """Ours in a traceback: to the choice among kernels, and to the kernel where one is named."""
    w, x, op = jq.quantize_array(draw(256, 64), jq.rtn(4)), draw(2, 256), "packed_matmul"
    run = lambda: jax.jit(jq.quantized(lambda w, x: x @ w, kernels=kernels))(w, x)

    dispatch._product.clear_cache()  # another test's products of these shapes are traced already

    def to_the_choice(arrive):
        monkeypatch.setattr(lowering._chosen, "bind", arrive)
        run()

    def to_the_kernel(arrive):
        monkeypatch.setitem(cpu.KERNELS, op, cpu.KERNELS[op]._replace(call=arrive))
        run()

    library, of_kernels = ours(to_the_choice if kernels == "auto" else to_the_kernel)
    assert library >= 2 and of_kernels >= 2 and library + of_kernels <= 9
    monkeypatch.undo()
    if kernels == "auto":  # and from the lowering of the program to the kernel
        assert ours(to_the_kernel) == [0, 2]
