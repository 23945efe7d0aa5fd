"""Transforms change variables and not the function; and what they do to outliers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import jaxquant as jq
from jaxquant.rounding import LDLQ, Nearest
from jaxquant.transforms import Channels
from tests.support.arrays import draw

ROTATIONS = [
    jq.transforms.Rotation(),
    jq.transforms.Rotation(block=16),
    jq.transforms.Rotation(block=16, sort=True),
    jq.transforms.Rotation(sort=True),
]
SCALINGS = [
    jq.transforms.Scaling(-0.5),
    jq.transforms.Smooth(0.5),
    jq.transforms.Smooth(None),
    jq.transforms.ActivationAware(),
]
BLOCKS = [
    jq.transforms.Greedy(10, 8),
    jq.transforms.Greedy(10, 8, shared=True, flat=True),
    jq.transforms.Zigzag(10),
]
CHAINS = [
    jq.transforms.Chain(
        (
            jq.transforms.Smooth(0.5),
            jq.transforms.Greedy(10, 8),
            jq.transforms.Zigzag(10),
            jq.transforms.Greedy(10, 8),
        )
    )
]
SIDES = [*ROTATIONS, *SCALINGS, *BLOCKS, *CHAINS]
FINE = jq.formats.Integer(bits=8, group_size=-1, scale_dtype="float32")


def fitted(side, n, seed=0):
    """Its arrays for random weights and vectors, both with outliers."""
    keys = jax.random.split(jax.random.key(seed), 4)
    spread = [jnp.exp(jax.random.normal(key, (n,))) for key in keys[:2]]
    weights, vectors = (
        jax.random.normal(key, (m, n)) * s
        for key, m, s in zip(keys[2:], (40, 64), spread, strict=True)
    )
    return side.fit(Channels.of(weights, vectors), jax.random.key(seed + 1))


@pytest.mark.parametrize("side", ROTATIONS, ids=str)
@pytest.mark.parametrize("n", [48, 40, 50])  # with a transform, in blocks with padding, padded
def test_a_rotation_is_orthonormal(side, n):
    arrays = fitted(side, n)
    a = np.asarray(side.apply(jnp.eye(n), arrays), np.float64)
    assert a.shape == (n, side.size(n))
    np.testing.assert_allclose(a @ a.T, np.eye(n), atol=1e-6)
    y = draw(3, side.size(n))
    np.testing.assert_allclose(side.transposed(y, arrays, n), y @ a.T, atol=1e-5)
    assert side.shapes(n) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


class EverySide(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(*((str(side), side) for side in SIDES))
    def test_weights_change_as_their_inputs_do(self, side):
        """(x A) . (w A^-T) = x . w, and A^T is the transpose of A; shapes are as foretold."""
        n = 50
        arrays = fitted(side, n)
        x, w, y = draw(3, n), draw(4, n, seed=1), draw(3, side.size(n), seed=2)

        @self.variant
        def run(x, w, y, arrays):
            product = side.apply(x, arrays) @ side.inverse(w, arrays).T
            return product, side.transposed(y, arrays, n), side.apply(jnp.eye(n), arrays)

        product, back, a = run(x, w, y, arrays)
        np.testing.assert_allclose(product, x @ w.T, atol=1e-4)
        np.testing.assert_allclose(back, y @ a.T, atol=1e-5)
        chex.assert_trees_all_equal_shapes_and_dtypes(side.shapes(n), arrays)


def test_scaling_evens_out_what_meets_the_weight():
    """Half of the outputs matter a hundred times as much: scaled, they get the finer codes."""
    w, moment = draw(64, 32), jnp.where(jnp.arange(32) < 16, 10.0, 0.1)
    lost = []
    for side in (None, jq.transforms.Scaling(-0.5)):
        method = jq.Method(
            "m", Nearest(), jq.formats.EntropyCoded(3, states=4, lanes=2), None, side
        )
        q = jq.quantize_array(w, method, output_gram=jnp.diag(moment))
        lost.append(float(jnp.sum((w - q.dequantize()) ** 2 * moment)))
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize(
    "side",
    [
        *ROTATIONS,
        *SCALINGS,
        jq.transforms.Scaling(),
        jq.transforms.Greedy(16, 8),
        jq.transforms.Zigzag(16),
    ],
    ids=str,
)
def test_weights_that_read_one_input_stay_each_their_own(side):
    """Grams weighted by gradients differ between weights of one input; so do fitted transforms."""
    p = {"a": draw(32, 32), "b": draw(32, 32, seed=1)}
    x, weight = draw(64, 32, seed=2), jnp.arange(32)
    fn = lambda p, x: jnp.concatenate([jnp.tanh(x @ p["a"]), x @ p["b"] * weight], -1)
    stats = jq.calibrate(fn, p, [x], loss=lambda y, x: jnp.mean(y**4), sample=16)
    q = jq.quantize(p, jq.Method("m", jq.gptq().rounder, FINE, side, None), stats)
    got, want = jq.quantized(fn)(q, x), fn(jq.dequantize(q), x)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_dead_channels_do_not_count():
    moment = jnp.append(jnp.zeros(6), jnp.logspace(-1, 1, 26))
    known = Channels(jnp.ones((1, 32)), gram=jnp.diag(moment))
    factors = jq.transforms.Scaling(-0.5).fit(known, jax.random.key(0))["factors"]
    np.testing.assert_array_equal(factors[:6], 1)
    even = moment[6:] * factors[6:].astype(jnp.float32) ** 2
    np.testing.assert_allclose(even, even[0], rtol=3e-3)


def test_a_scaling_that_reads_moments_asks_for_them():
    method = jq.Method("m", Nearest(), FINE, None, jq.transforms.Scaling(-0.5))
    with pytest.raises(ValueError, match="needs output_gram"):
        jq.quantize_array(draw(32, 32), method)
    assert method.needs_output and not method.needs_gram


def test_sides_of_a_square_matrix_are_both_counted():
    w = draw(64, 64)
    method = jq.Method("m", Nearest(), FINE, jq.transforms.Rotation(), jq.transforms.Rotation())
    (entry,) = jq.recipes.resolve(method, {"w": w}).entries
    assert entry.bytes == jq.quantize_array(w, method).nbytes


def test_padding_costs_bytes_that_are_counted():
    w = draw(50, 64)
    q = jq.quantize_array(w, jq.Method("m", Nearest(), FINE, jq.transforms.Rotation(), None))
    assert q.data["codes"].shape == (52 // 4, 64)
    assert q.bits_per_weight == 8 * sum(a.nbytes for a in q.named.values()) / w.size
    (entry,) = jq.recipes.resolve(
        jq.Method("m", Nearest(), FINE, jq.transforms.Rotation(), None), {"w": w}
    ).entries
    assert entry.bytes == q.nbytes


@pytest.mark.parametrize("side", [*ROTATIONS, jq.transforms.Scaling()], ids=str)
def test_a_rotated_weight_is_the_same_function(side):
    """The products, both ways round, are those of the decoded weight, which is near the weight."""
    w, x, g = draw(48, 40), draw(5, 48, seed=1), draw(5, 40, seed=2)
    q = jq.quantize_array(w, jq.Method("m", Nearest(), FINE, side, side))
    np.testing.assert_allclose(q.dequantize(), w, atol=0.05)
    run = jax.jit(jq.quantized(lambda p, x: x @ p))
    np.testing.assert_allclose(run(q, x), x @ q.dequantize(), atol=1e-4)
    back = jax.jit(jq.quantized(lambda p, x: x @ p.T))
    np.testing.assert_allclose(back(q, g), g @ q.dequantize().T, atol=1e-4)


def test_stacks_of_rotated_weights_run_in_a_scan():
    w, x = draw(3, 48, 48) / 7, draw(5, 48, seed=1)
    method = jq.Method("m", Nearest(), FINE, jq.transforms.Rotation(), jq.transforms.Rotation())
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    q = jq.quantize({"w": w}, method, jq.sites(fn, {"w": w}, x))
    got = jax.jit(jq.quantized(fn))(q, x)
    np.testing.assert_allclose(got, fn(jq.dequantize(q), x), atol=1e-4)
    signs = q["w"].named["input.signs"]
    assert not np.array_equal(signs[0], signs[1])


def test_weights_that_share_an_input_share_its_transform(monkeypatch):
    def fn(p, x):
        h = jnp.tanh(x)
        return h @ p["q"], h @ p["k"], x @ p["o"]

    p = {name: draw(48, 32, seed=i) for i, name in enumerate("qko")}
    x = draw(5, 48, seed=9)
    method = jq.Method("m", Nearest(), FINE, jq.transforms.Rotation(), None)
    q = jq.quantize(p, method, jq.sites(fn, p, x))
    assert q["q"].shared == q["k"].shared != q["o"].shared
    np.testing.assert_array_equal(q["q"].named["input.signs"], q["k"].named["input.signs"])
    one = lambda n, seed: jq.quantize_array(p[n], method, key=jax.random.key(seed))
    apart = {"q": one("q", 1), "k": one("k", 2), "o": one("o", 3)}
    calls = []
    apply = jq.transforms.Rotation.apply
    monkeypatch.setattr(jq.transforms.Rotation, "apply", lambda *a: calls.append(a) or apply(*a))
    jax.make_jaxpr(jq.quantized(fn))(q, x)
    assert len(calls) == 2
    jax.make_jaxpr(jq.quantized(fn))(apart, x)
    assert len(calls) == 2 + 3
    for t in (q, apart):
        for got, want in zip(jax.jit(jq.quantized(fn))(t, x), fn(jq.dequantize(t), x), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_two_of_a_stack_do_not_share():
    """Both slices carry the stack's metadata, and read one input; their signs differ."""
    p, x = {"w": draw(3, 48, 48)}, draw(5, 48, seed=9)
    fn = lambda p, x: x @ p["w"][0] + x @ p["w"][1]
    q = jq.quantize(
        p, jq.Method("m", Nearest(), FINE, jq.transforms.Rotation(), None), jq.sites(fn, p, x)
    )
    got = jax.jit(jq.quantized(fn))(q, x)
    np.testing.assert_allclose(got, fn(jq.dequantize(q), x), atol=1e-4)


def test_sharing_does_not_cross_loops():
    """One input read by two loops: what the first body computed is not the second's."""
    p = {"a": draw(2, 48, 48) / 7, "b": draw(2, 48, 48, seed=1) / 7}

    def fn(p, x):
        body = lambda h, w: (h + x @ w, None)
        h, _ = jax.lax.scan(body, jnp.zeros_like(x), p["a"])
        return jax.lax.scan(body, h, p["b"])[0]

    x = draw(5, 48, seed=9)
    q = jq.quantize(
        p, jq.Method("m", Nearest(), FINE, jq.transforms.Rotation(), None), jq.sites(fn, p, x)
    )
    got = jax.jit(jq.quantized(fn))(q, x)
    np.testing.assert_allclose(got, fn(jq.dequantize(q), x), atol=1e-4)


def test_rotation_tames_outliers():
    """A few large weights spoil a uniform grid; rotated, they cost nothing. The twin: unrotated."""
    w = draw(256, 256)
    w = w.at[::37, ::41].mul(40)
    rounder = LDLQ(act_order=False)
    error = {}
    for side in (None, jq.transforms.Rotation()):
        q = jq.quantize_array(
            w, jq.Method("m", rounder, jq.formats.Integer(4, -1), side, side), jnp.eye(256)
        )
        error[side] = float(jnp.sum((w - q.dequantize()) ** 2) / jnp.sum(w**2))
    assert error[jq.transforms.Rotation()] < 0.6 * error[None]


def test_randomness_is_the_key():
    w = draw(48, 48)
    made = [
        jq.quantize_array(
            w, jq.Method("m", Nearest(), FINE, jq.transforms.Rotation()), key=jax.random.key(s)
        )
        for s in (0, 0, 1)
    ]
    first, again, other = (np.asarray(q.named["input.signs"]) for q in made)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_bad_blocks():
    with pytest.raises(
        ValueError, match="no Hadamard matrix of order 6 can be made; the next is 8"
    ):
        jq.transforms.Rotation(block=6)
