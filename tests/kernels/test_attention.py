"""Attention over a cache: the kernel against its reference, which is softmax attention written out.

Budget of the kernel: float32 sums in another order, and e^x by its series: 3e-6 of the largest.
"""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention as op
from pallas_kernels import cpu, dispatch
from pallas_kernels.cpu import native
from tests.support.lowering import lowered_text

REASON = native.load()
needs_native = pytest.mark.skipif(
    bool(REASON) or jax.default_backend() != "cpu", reason=f"no native kernels: {REASON}"
)
# (b, t, heads, kv heads, slots, head size), dtype of the cache
SHAPES = [
    ((1, 1, 9, 3, 160, 64), "float32"),
    ((2, 3, 8, 2, 70, 32), "bfloat16"),
    ((1, 1, 7, 7, 33, 16), "float16"),
    ((1, 8, 14, 2, 200, 48), "float32"),
    ((1, 2, 5, 1, 1, 128), "float32"),
]
every_shape = pytest.mark.parametrize("shape, dtype", SHAPES)


def draw(shape, dtype="float32"):
    """q, k, v and positions, some past the last slot."""
    b, t, heads, kv, slots, hd = shape
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), "float32")
    q, k, v = 3 * normal(b, t, heads, hd), normal(b, kv, slots, hd), normal(b, kv, slots, hd)
    positions = jnp.asarray(rng.integers(0, slots + 9, t), jnp.int32)
    return q, k.astype(dtype), v.astype(dtype), positions


def written_out(q, k, v, positions):
    """One query after the other, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    b, t, heads, hd = q.shape
    y = np.empty((b, t, heads, hd))
    for i, j, h in np.ndindex(b, t, heads):
        head, seen = h // (heads // k.shape[1]), int(positions[j]) + 1
        weights = np.exp(k[i, head, :seen] @ q[i, j, h] / np.sqrt(hd))
        y[i, j, h] = weights @ v[i, head, :seen] / weights.sum()
    return y


def error(y, want):
    return np.abs(np.asarray(y, np.float64) - want).max() / np.abs(want).max()


@every_shape
def test_the_reference_is_attention_written_out(shape, dtype):
    q, k, v, positions = draw(shape)
    want = written_out(q, k, v, positions)
    assert error(op.reference(q, k, v, positions), want) < 3e-6
    if shape[4] > 1:
        late = written_out(q, k, v, np.maximum(np.minimum(positions, shape[4] - 1) - 1, 0))
        assert error(late, want) > 1e-3  # a query that does not see itself is another thing


@needs_native
@every_shape
@pytest.mark.parametrize("most", range(len(native.instruction_sets())))
def test_the_kernel_is_its_reference(shape, dtype, most):
    q, k, v, positions = draw(shape, dtype)
    y = cpu._attention(q, k, v, positions, most=most)
    assert error(y, written_out(q, k, v, positions)) < 3e-6


@needs_native
def test_hidden_slots_are_not_read():
    q, k, v, _ = draw(SHAPES[0][0])
    y = op.attention(q, k, v, jnp.array([40]))
    spoilt = op.attention(
        q, k.at[:, :, 41:].set(jnp.nan), v.at[:, :, 41:].set(jnp.nan), jnp.array([40])
    )
    np.testing.assert_array_equal(y, spoilt)


@needs_native
def test_large_scores_do_not_overflow_and_none_visible_is_no_number():
    q, k, v, _ = draw(SHAPES[0][0])
    np.testing.assert_allclose(
        op.attention(1e4 * q, k, v, jnp.array([99])),
        op.reference(1e4 * q, k, v, jnp.array([99])), atol=1e-4,
    )  # fmt: skip
    assert bool(jnp.isnan(op.attention(q, k, v, jnp.array([-1]))).all())


@pytest.mark.parametrize("attend", [op.attention, op.reference])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_where_it_is_and_nowhere_else(attend, value):
    """A query; and an entry of a value that all queries see, in its channel of its heads."""
    q, k, v, _ = draw((2, 3, 6, 2, 20, 16))
    positions = jnp.array([5, 7, 9])
    clean = attend(q, k, v, positions)
    by_query = np.array(attend(q.at[1, 2, 4, 7].set(value), k, v, positions))
    by_value = np.array(attend(q, k, v.at[0, 1, 3, 7].set(value), positions))
    for wrong, place in ((by_query, np.s_[1, 2, 4]), (by_value, np.s_[0, :, 3:, 7])):
        assert not np.isfinite(wrong[place]).any()
        wrong[place] = clean[place]
        np.testing.assert_array_equal(wrong, clean)


def test_derivatives_and_batches_are_the_references():
    q, k, v, positions = draw((2, 2, 6, 3, 20, 16))
    loss = lambda f: lambda *a: jnp.sum(jnp.sin(f(*a, positions)))
    for got, want in zip(
        *(jax.grad(loss(f), (0, 1, 2))(q, k, v) for f in (op.attention, op.reference)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)
    many = jax.vmap(
        lambda q, k, v, p: op.attention(q[None], k[None], v[None], p)[0], (0, 0, 0, None)
    )
    np.testing.assert_allclose(
        many(q, k, v, positions), op.reference(q, k, v, positions), atol=1e-5
    )


def test_what_serves():
    arrays = lambda t, hd: draw((1, t, 4, 2, 10, hd))
    why = lambda t, hd: dispatch.choose("attention", "cpu", arrays(t, hd), {})[1]
    if not REASON:
        assert why(8, 16) == ""
        assert "more than 8 queries" in why(9, 16) and "not a multiple of 16" in why(1, 24)
    text = lowered_text(op.attention, *arrays(1, 16), platform="cpu")
    assert ("jaxquant_attention" in text) == (not REASON)
    q, k, v, positions = arrays(2, 16)
    slopes = [
        jax.jvp(lambda q, f=f: f(q, k, v, positions), (q,), (jnp.cos(q),))[1]
        for f in (op.attention, op.reference)
    ]
    np.testing.assert_allclose(*slopes, atol=1e-5)


def test_calls_from_several_threads_do_not_disturb_each_other():
    q, k, v, positions = draw((1, 1, 8, 8, 512, 64))
    f = jax.jit(op.attention)
    want = np.asarray(f(q, k, v, positions))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for y in pool.map(lambda _: np.asarray(f(q, k, v, positions)), range(300)):
            np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.ones((1, 1, 4))}, "q must have 4 axes"),
        ({"k": jnp.ones((1, 2, 10, 16), jnp.int8)}, "k must have 4 axes, of float32"),
        ({"v": jnp.ones((1, 2, 11, 16))}, "k and v must both be"),
        ({"k": jnp.ones((1, 3, 10, 16)), "v": jnp.ones((1, 3, 10, 16))}, "a divisor of 4"),
        ({"positions": jnp.array([1, 2])}, r"positions must be int32 \[1\]"),
        ({"positions": jnp.array([1.0])}, "positions must be int32"),
    ],
)
def test_bad_input_is_named(change, message):
    arrays = dict(zip(("q", "k", "v", "positions"), draw((1, 1, 4, 2, 10, 16)), strict=True))
    with pytest.raises(ValueError, match=message):
        op.attention(**(arrays | change))
