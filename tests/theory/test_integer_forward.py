"""Products from integers alone: exact sums, a whole BitNet, and what a jaxpr shows."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import Primitive

import jaxquant as jq
from jaxquant.theory.integer_forward import accumulated, integer_only
from jaxquant.theory.integer_products import accumulator_bits_of
from jaxquant.theory.jaxpr_products import float_products, products
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import LAYER_MATRICES, Llama, apply
from pallas_kernels import dispatch
from pallas_kernels.codecs import layout
from tests.support.arrays import draw

TIMES = jq.quantized(lambda p, x: x @ p["w"])
CASES = [
    (jq.formats.Ternary(group_size="tensor", scale_dtype="float32"), "int8"),
    (jq.formats.Integer(3, 48, pad=True), "int8/256"),
    (jq.formats.Integer(8, 64), "int8"),
]


def numbers(data, format, k):
    """The codes less their zero points, by NumPy."""
    codes = np.asarray(layout.unpack(data["codes"], format.bits, k), np.int64)
    if format.symmetric:
        return codes
    n = codes.shape[1]
    zero = np.asarray(layout.unpack(data["zero"].T, format.bits, n)).T.astype(np.int64)
    return codes - np.repeat(zero, format.rows_per_group(k), axis=0)[:k]


@pytest.mark.parametrize(("format", "form"), CASES, ids=str)
def test_sums_are_those_of_the_codes(format, form):
    k, n = 320, 24
    data, x = format.encode(draw(k, n)), draw(5, k, seed=1)
    found = jax.jit(lambda x, data: accumulated(x, data, format, form))(x, data)
    assert found.sums.dtype == jnp.int32 and found.codes.dtype == jnp.int8
    whole = np.asarray(found.sums, np.int64).sum(0)
    codes = numbers(data, format, k)
    np.testing.assert_array_equal(whole, np.asarray(found.codes, np.int64) @ codes)
    most = np.abs(np.asarray(found.sums)).max()
    assert most < 1 << (accumulator_bits_of(codes) - 1)
    w = jq.QTensor(data, format, jq.core.tensor.View((k,), (n,), (-2, -1)), "float32",
                   activations=jq.Activations.of(form))  # fmt: skip
    np.testing.assert_allclose(found.scaled(), TIMES({"w": w}, x), rtol=1e-4, atol=1e-4)


def test_runs_end_only_where_scales_change():
    """One product per run would be a product of floats, summed in floats."""

    def runs(k, group, form):
        format = jq.formats.Integer(4, group, pad=True)
        sums = lambda x, w: accumulated(x, format.encode(w), format, form).sums
        return jax.eval_shape(sums, jnp.ones((2, k)), jnp.ones((k, 8))).shape[0]

    assert runs(345, "tensor", "int8") == 1 and runs(345, "tensor", "int8/256") == 2
    assert runs(345, 64, "int8/256") == runs(345, 64, "int8") == 6


@lru_cache
def bitnet(k, n):
    return jq.freeze(jq.latent({"w": draw(k, n)}, jq.bitnet()))["w"]


def test_the_users_kernel_sums_the_same_integers():
    """Without scales its float32 results are its sums, below 2^24."""
    k, n = 344, 24
    w, x = bitnet(k, n), draw(7, k, seed=1)
    found = accumulated(x, w.data, w.format)
    ones = jnp.ones_like(w.data["scale"])
    codes = found.codes.astype(jnp.float32)
    user = dispatch.product(
        "ternary_matmul", codes, w.data["codes"], ones, group_size=k, activations="codes"
    )
    np.testing.assert_array_equal(user, found.sums[0])


def test_one_run_is_bit_exact_and_several_with_its_segment():
    w, x = {"w": bitnet(128, 24)}, draw(7, 128, seed=1)
    np.testing.assert_array_equal(TIMES(integer_only(w), x), TIMES(w, x))
    w, x = {"w": bitnet(344, 24)}, draw(7, 344, seed=1)
    alike = TIMES(integer_only(w, 128), x)
    np.testing.assert_allclose(alike, TIMES(w, x), rtol=3e-7, atol=1e-6)
    assert accumulated(x, w["w"].data, w["w"].format, segment=128).sums.shape == (3, 7, 24)


CONFIG = LlamaConfig(
    48, 64, 64, 2, 2, 2, 32, tie_embeddings=True, sub_norms=True, activation="relu2"
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint():
    """A BitNet as `jaxquant train-bitnet` packs it, before any step; layers apart."""
    model, tokens = Llama(CONFIG), jnp.arange(12)[None] % 48
    fn = lambda p, t: apply(model, p, t)
    shapes = jax.eval_shape(lambda t: model.init(jax.random.key(0), t)["params"], tokens)
    rng = np.random.default_rng(0)
    drawn = lambda a: jnp.asarray(rng.normal(1, 0.1, a.shape), jnp.float32)
    params = jax.tree.map(lambda a: drawn(a) - (a.shape[-1] > 1 and len(a.shape) > 2), shapes)
    recipe = jq.Recipe([(LAYER_MATRICES, jq.bitnet()), ("*", jq.KEEP)])
    packed = jq.freeze(jq.latent(params, recipe, jq.sites(fn, shapes, tokens)))
    return jq.quantized(fn), jq.ptq.unstack(packed, "layers"), tokens


def test_a_whole_bitnet_is_bit_exact(checkpoint):
    """Operation by operation; a whole program may fuse what lies between the products."""
    run, params, tokens = checkpoint
    user, ours = run(params, tokens), run(integer_only(params), tokens)
    np.testing.assert_array_equal(ours, user)
    assert float(jnp.std(user)) > 0.01
    wrong = jax.tree.map(lambda a: -a if a.dtype == jnp.int32 else a, integer_only(params))
    assert not np.array_equal(run(wrong, tokens), user)


def test_no_product_of_a_packed_weight_has_floats(checkpoint):
    run, params, tokens = checkpoint
    ours = products(run, integer_only(params), tokens)
    integers = [one for one in ours if not one.floating]
    assert len(integers) == 7 * CONFIG.n_layers
    assert all(one.dtypes == ("int8", "int8") and one.result == "int32" for one in integers)
    # What is left: scores and values of attention, and the output matrix.
    left = float_products(run, integer_only(params), tokens)
    assert len(left) == 2 * CONFIG.n_layers + 1
    assert not {(64, 64)} & {one.shapes[1] for one in left}
    # The user's own path calls kernels, or multiplies floats where there is none.
    assert len(float_products(run, params, tokens)) >= 7 * CONFIG.n_layers


def test_products_are_found_wherever_they_are():
    x, w = jnp.ones((4, 4)), jnp.ones((4, 4), jnp.int8)

    def fn(x, w):
        y = jax.lax.scan(lambda c, _: (c @ x, None), x, length=2)[0]
        y = jax.lax.cond(y[0, 0] > 0, lambda a: a @ a, lambda a: jax.checkpoint(jnp.dot)(a, a), y)
        z = jax.lax.while_loop(
            lambda a: a[0, 0] < 9, lambda a: jax.vmap(jnp.dot)(a, a)[:, None] + a, y
        )
        return z, jax.jit(lambda a: a @ a)(w), jax.lax.ragged_dot(x, x[None], jnp.array([4]))

    found = products(fn, x, w)
    assert len(found) == 6 and sum(not one.floating for one in found) == 1
    assert {one.primitive for one in found} >= {"dot_general"}
    assert not float_products(lambda w: w @ w, w)
    mixed = lambda x, w: jax.lax.dot(x, w, preferred_element_type=jnp.float32)
    assert len(float_products(mixed, x, w)) == 1


def in_floats(x, w):
    return x.astype(jnp.float32) @ w.astype(jnp.float32)


def summed_in_floats(x, w):
    return jax.lax.dot(x, w, preferred_element_type=jnp.float32)


def elementwise(x, w):
    terms = x.astype(jnp.float32)[:, :, None] * w.astype(jnp.float32)[None]
    return terms.reshape(-1, *w.shape).sum(1)


def called_back(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.int32)
    return jax.pure_callback(lambda x, w: np.int32(np.float32(x) @ np.float32(w)), shape, x, w)


def in_a_kernel(x, w):
    def kernel(x, w, y):
        y[...] = (x[...].astype(jnp.float32) @ w[...].astype(jnp.float32)).astype(jnp.int32)

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.int32)
    return pl.pallas_call(kernel, shape, interpret=True)(x, w)


def with_its_own_gradient(x, w):
    rule = jax.custom_vjp(in_floats)
    rule.defvjp(lambda x, w: (in_floats(x, w), None), lambda _, g: (g, g))
    return rule(x, w)


def deep_inside(x, w):
    below = lambda n: jax.lax.cond(n[0] > 0, lambda: in_floats(x, w)[0, 0] < 9, lambda: True)
    step = lambda n, _: (jax.lax.while_loop(below, lambda n: n + 1, n), None)
    return jax.lax.scan(step, jnp.zeros(1), length=2)[0]


def terms(x, w):
    return x.astype(jnp.float32)[:, :, None] * w.astype(jnp.float32)[None]


def made_in_a_loop(x, w):
    columns = x.T.astype(jnp.float32), w.astype(jnp.float32)
    return jax.lax.scan(lambda c, of: (c, of[0][:, None] * of[1][None]), 0, columns)[1].sum(0)


# Products of two arrays that something comes between, before they are summed.
SUMMED = {
    "scaled": lambda x, w: (-0.5 * terms(x, w) / 3).sum(1),
    "summed in a function": lambda x, w: jax.jit(lambda y: y.sum(1))(terms(x, w)),
    "made in a function": lambda x, w: jax.checkpoint(terms)(x, w).sum(1),
    "made in a condition": lambda x, w: jax.lax.cond(x[0, 0] > 0, terms, terms, x, w).sum(1),
    "made in a loop": made_in_a_loop,
    "masked": lambda x, w: jnp.sum(terms(x, w), 1, where=(w != 0)[None]),
    "sliced": lambda x, w: terms(x, w)[:, :3].sum(1),
    "halved": lambda x, w: (terms(x, w)[:, :2] + terms(x, w)[:, 2:]).sum(1),
    "sum of a lambda": lambda x, w: jax.lax.reduce(
        terms(x, w), np.float32(0), lambda a, b: a + b, (1,)
    ),
    "scattered": lambda x, w: jnp.zeros((2, 3)).at[jnp.arange(8) // 4].add(
        terms(x, w).reshape(8, 3)
    ),
    "running": lambda x, w: jnp.cumsum(terms(x, w), 1)[:, -1],
    "in a tree": lambda x, w: jax.lax.associative_scan(jnp.add, terms(x, w), axis=1)[:, -1],
    "of integers": lambda x, w: (x[:, :, None].astype(int) * w[None]).astype(float).sum(1),
    "convolution": lambda x, w: jax.lax.conv_general_dilated(
        x[:, :, None], w[:, None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
        preferred_element_type=jnp.float32,
    ),
    "ragged": lambda x, w: jax.lax.ragged_dot(
        x, w[None], jnp.array([2]), preferred_element_type=jnp.float32
    ),
    "solver": lambda x, w: jax.lax.linalg.triangular_solve(jnp.eye(4), x.astype(float)),
    "transform": lambda x, w: jnp.fft.rfft(x.astype(float)),
}  # fmt: skip


def over_devices(fn, *args):
    """A function of parts of its arguments on a mesh, summed over its devices."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec()
    summed = lambda *args: jax.lax.psum(fn(*args), "i")
    return jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=whole)(*args)


def summed_over_devices(x, w):
    return over_devices(jnp.multiply, x.T.astype(jnp.float32), w[:, :2].astype(jnp.float32))


def unknown(x, w):
    """A primitive of a library, of which nothing is known but its result."""
    primitive = Primitive("times")
    primitive.def_abstract_eval(lambda x, w: jax.core.ShapedArray((2, 3), jnp.int32))
    return primitive.bind(x, w)


def exact(x, w):
    return jax.lax.dot(x, w, preferred_element_type=jnp.int32).astype(jnp.float32) * 0.5


WRONG = (
    in_floats, summed_in_floats, elementwise, called_back, in_a_kernel, with_its_own_gradient,
    deep_inside, summed_over_devices, unknown,
)  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [*WRONG, *SUMMED.values()], ids=[*(fn.__name__ for fn in WRONG), *SUMMED]
)
def test_a_product_that_is_not_of_integers_is_refused(wrong):
    """All take int8 codes; only how they are multiplied differs."""
    x, w = jnp.ones((2, 4), jnp.int8), jnp.ones((4, 3), jnp.int8)
    assert float_products(wrong, x, w)
    assert not float_products(exact, x, w)
    # Norms and sums of scaled values multiply no two arrays.
    norm = lambda x: x * x / jnp.sum(x * x) + jnp.mean(2.0 * x) + jnp.sum(jnp.exp(x))
    assert not float_products(norm, x.astype(jnp.float32))
    # Nor do sums over devices, rotations, random numbers, and what only looks at a value.
    turned = lambda x, w: x * w[0, 0] + x[:, ::-1] * w[1, 1]
    assert not float_products(turned, x.astype(float), w.astype(float))
    drawn = lambda: [jax.random.normal(k, (3,)) for k in jax.random.split(jax.random.key(0))]
    assert not float_products(drawn)
    assert not float_products(lambda x: over_devices(jnp.exp, x), x.astype(float))
    assert not float_products(lambda x: (jax.debug.print("{}", x), x)[1], x.astype(float))


def test_bad_trees():
    with pytest.raises(ValueError, match="the tree has none; quantize it first"):
        integer_only({"w": jnp.ones((4, 4))})
    of = lambda method: {"a": jax.eval_shape(lambda w: jq.quantize_array(w, method), draw(64, 8))}
    with pytest.raises(ValueError, match=r"a: its inputs are not rounded .*with_activations"):
        integer_only(of(jq.rtn(4)))
    with pytest.raises(ValueError, match="a: expected an Integer or Ternary format, got Normal"):
        integer_only(of(jq.normal_float(4, activations="int8")))
    with pytest.raises(ValueError, match=r"expected an Integer .*jaxquant.freeze"):
        integer_only(jq.latent({"a": draw(64, 8)}, jq.bitnet()))
    good = of(jq.rtn(4, activations="int8"))
    for segment in (0, 12):
        with pytest.raises(ValueError, match="segment must be a positive multiple of 8"):
            integer_only(good, segment)
        with pytest.raises(ValueError, match="segment must be a positive multiple of 8"):
            accumulated(jnp.ones((1, 64)), good["a"].data, good["a"].format, segment=segment)
    with pytest.raises(ValueError, match="format: expected a Integer, got 3"):
        accumulated(jnp.ones((1, 64)), good["a"].data, 3)
    with pytest.raises(ValueError, match="product with the transpose of a packed weight"):
        jq.quantized(lambda p, g: g @ p["a"].T)(integer_only(good), jnp.ones((2, 8)))
    w = good["a"]
    with pytest.raises(ValueError, match="not rounded to integers"):
        accumulated(jnp.ones((1, 64)), w.data, w.format, "float")
