"""Grouped products whatever serves them: of every op, against the experts one by one."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import checks, dispatch, reference, row_tiles
from pallas_kernels.cpu import native
from pallas_kernels.grouped import grouped_matmul
from tests.support.arrays import draw
from tests.support.lowering import lowered_text
from tests.support.operands import CASES, assert_rows_hold, decoded, operands

REASON = native.load()
needs_native = pytest.mark.skipif(
    bool(REASON) or jax.default_backend() != "cpu", reason=f"no native kernels: {REASON}"
)
every_op = pytest.mark.parametrize("case", CASES)
K, N, E = 384, 48, 5
# Rows of each expert: some have none, one has all, some rows belong to none, no row has any.
SIZES = [[3, 0, 6, 1, 1], [0, 0, 13, 0, 0], [1, 0, 0, 2, 0], [0] * 5]
M = 13


def stack(case, experts=E):
    """(op, arrays with an axis of experts, statics, weights [experts, k, n])."""
    each = [operands(case, K, N, seed) for seed in range(experts)]
    (op, _, static), arrays = each[0], [arrays for _, arrays, _ in each]
    w = jnp.stack([decoded(op, some, static, K) for some in arrays])
    return op, jax.tree.map(lambda *a: jnp.stack(a), *arrays), static, w


def one_by_one(x, w, sizes):
    """The rows of each expert times its matrix, in float64; zeros where there is none."""
    y, at = np.zeros((len(x), w.shape[2])), 0
    for matrix, count in zip(np.asarray(w, np.float64), sizes, strict=True):
        y[at : at + count] = np.asarray(x, np.float64)[at : at + count] @ matrix
        at += count
    return y


def close(y, want, budget=2e-6):
    np.testing.assert_allclose(y, want, atol=budget * max(1e-9, np.abs(want).max()))


@every_op
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_every_row_meets_the_matrix_of_its_expert(case, kernels):
    op, arrays, static, w = stack(case)
    x = draw(M, K, seed=1)
    with dispatch.using(kernels):
        run = jax.jit(lambda x, sizes: grouped_matmul(op, x, sizes, *arrays, **static))
        for sizes in SIZES:
            y = run(x, jnp.array(sizes, jnp.int32))
            assert (y.shape, y.dtype) == ((M, N), jnp.float32)
            close(y, one_by_one(x, w, sizes))
            assert not np.any(y[sum(sizes) :])


def test_a_wrong_variant_fails():
    """The matrices of the experts before."""
    op, arrays, static, w = stack("packed 4 bits")
    x, sizes = draw(M, K), jnp.array(SIZES[0], jnp.int32)
    y = grouped_matmul(op, x, sizes, *arrays, **static)
    with pytest.raises(AssertionError):
        close(y, one_by_one(x, jnp.roll(w, 1, axis=0), SIZES[0]), 1e-2)


@pytest.mark.parametrize("form", ["int8", "int8/256", "codes"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_rows_are_rounded_as_for_a_single_matrix(form, kernels):
    op, arrays, static, _ = stack("packed 4 bits, zero points", 2)
    x = jnp.round(draw(M, K, seed=1) * 30)
    options = {**static, "activations": form}
    with dispatch.using(kernels):
        y = grouped_matmul(op, x, jnp.array([4, 9], jnp.int32), *arrays, **options)
        for e, part in enumerate((slice(0, 4), slice(4, 13))):
            one = [a[e] for a in arrays]
            close(y[part], np.asarray(dispatch.product(op, x[part], *one, **options)))


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_many_rows(rows):
    """More than a tile has, beside experts that have few."""
    op, arrays, static, w = stack("packed 4 bits")
    x, sizes = draw(rows + 7, K), [2, rows, 0, 5, 0]
    for kernels in ("auto", "reference"):
        with dispatch.using(kernels):
            y = grouped_matmul(op, x, jnp.array(sizes, jnp.int32), *arrays, **static)
        close(y, one_by_one(x, w, sizes))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_one_expert_no_rows_and_no_experts(kernels):
    op, arrays, static, w = stack("packed 4 bits", 1)
    with dispatch.using(kernels):
        run = lambda x, sizes, arrays: grouped_matmul(op, x, sizes, *arrays, **static)
        close(run(draw(M, K), jnp.array([M], jnp.int32), arrays), one_by_one(draw(M, K), w, [M]))
        assert run(draw(0, K), jnp.array([0], jnp.int32), arrays).shape == (0, N)
        none = jax.tree.map(lambda a: a[:0], arrays)
        np.testing.assert_array_equal(
            run(draw(M, K), jnp.zeros(0, jnp.int32), none), np.zeros((M, N))
        )


@pytest.mark.parametrize("sizes", [[-3, 9, 2], [20, 1, 1], [3, 40, -9]])
def test_sizes_that_do_not_fit_are_cut_off(sizes):
    """They read nothing outside of x, whatever serves them."""
    op, arrays, static, w = stack("packed 4 bits", 3)
    x = draw(M, K)
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), M)
    want = one_by_one(x, w, np.diff(ends, prepend=0))
    for kernels in ("auto", "reference"):
        with dispatch.using(kernels):
            close(grouped_matmul(op, x, jnp.array(sizes, jnp.int32), *arrays, **static), want)


@every_op
def test_cotangents_are_those_of_ragged_dot(case):
    op, arrays, static, _ = stack(case, 3)
    x, g, sizes = draw(M, K, seed=1), draw(M, N, seed=2), jnp.array([4, 0, 6], jnp.int32)
    is_float = lambda a: a is not None and jnp.issubdtype(a.dtype, jnp.floating)
    floats = [i for i, a in enumerate(arrays) if is_float(a)]
    some = [arrays[i].astype(jnp.float32) for i in floats]

    def merged(some):
        found = dict(zip(floats, some, strict=True))
        return [found.get(i, a) for i, a in enumerate(arrays)]

    def got(x, some):
        return jnp.sum(g * grouped_matmul(op, x, sizes, *merged(some), **static))

    def want(x, some):
        w = jax.vmap(lambda *a: decoded(op, a, static, K))(*merged(some))
        return jnp.sum(g * jax.lax.ragged_dot(x, w, sizes, precision="highest"))

    for a, b in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f, (0, 1)))(x, some)) for f in (got, want)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1e-3, float(jnp.abs(b).max())) + 1e-12)


def test_integers_have_no_cotangent():
    op, arrays, static, _ = stack("packed 2 bits, zero points", 2)
    loss = lambda sizes, *a: jnp.sum(grouped_matmul(op, draw(M, K), sizes, *a, **static))
    d = jax.grad(loss, (0, 1, 3), allow_int=True)(jnp.array([3, 4], jnp.int32), *arrays)
    assert [a.dtype for a in d] == [jax.dtypes.float0] * 3


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_row_that_is_not_finite_is_nan_and_no_other(kernels):
    op, arrays, static, _ = stack("packed 4 bits", 3)
    sizes = jnp.array([4, 0, 9], jnp.int32)
    with dispatch.using(kernels):
        assert_rows_hold(
            jax.jit(lambda x: grouped_matmul(op, x, sizes, *arrays, **static)), draw(M, K)
        )


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_layers_of_a_scan_and_batches(kernels):
    """A stack [layers, experts, ...] scanned over; and vmap of rows, of sizes, and of stacks."""
    op, arrays, static, w = stack("packed 4 bits, zero points", 4)
    layered = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), arrays)
    x, sizes = draw(2, M, K), jnp.array([[4, 8], [0, 9]], jnp.int32)
    run = lambda x, sizes, arrays: grouped_matmul(op, x, sizes, *arrays, **static)
    with dispatch.using(kernels):
        scanned = jax.jit(
            lambda: jax.lax.scan(lambda _, of: (None, run(x[0], *of)), None, (sizes, layered))[1]
        )()
        mapped = jax.vmap(run)(x, sizes, layered)
        shared = jax.vmap(run, (0, None, None))(x, sizes[0], jax.tree.map(lambda a: a[0], layered))
    for i in range(2):
        close(scanned[i], one_by_one(x[0], w[2 * i : 2 * i + 2], sizes[i]))
        close(mapped[i], one_by_one(x[i], w[2 * i : 2 * i + 2], sizes[i]))
        close(shared[i], one_by_one(x[i], w[:2], sizes[0]))


# --- what serves them -----------------------------------------------------------------------


def told(platform, op, x, sizes, arrays, static):
    with dispatch.describing(platform), dispatch.listening() as heard:
        jax.eval_shape(lambda x: grouped_matmul(op, x, sizes, *arrays, **static), x)
    return heard


@needs_native
def test_the_cpu_reads_stacks_in_one_call():
    """The program has one call, and no copy of the words."""
    op, arrays, static, _ = stack("packed 4 bits")
    x, sizes = draw(M, K), jnp.array(SIZES[0], jnp.int32)
    run = lambda x, sizes, *arrays: grouped_matmul(op, x, sizes, *arrays, **static)
    text = lowered_text(run, x, sizes, *arrays, platform="cpu")
    assert text.count("custom_call @jaxquant_packed") == 1
    assert "dynamic_slice" not in text and "stablehlo.while" not in text
    assert told("cpu", op, x, sizes, arrays, static) == ["cpu kernel"]


def test_what_no_kernel_serves_says_why():
    x, sizes = draw(M, K), jnp.array(SIZES[0], jnp.int32)
    op, arrays, static, _ = stack("packed 4 bits")
    assert told("tpu", op, x, sizes, arrays, static) == ["tpu kernel"]
    assert told("cuda", op, x, sizes, arrays, static) == ["cuda kernel"]
    op, arrays, static, _ = stack("e8p 2 bits")
    for platform in ("tpu", "cuda"):
        (heard,) = told(platform, op, x, sizes, arrays, static)
        assert heard == f"reference (XLA): grouped_e8p_matmul has no {platform} kernel"
    with dispatch.using("tpu"), pytest.raises(ValueError, match="grouped_e8p_matmul has no tpu"):
        grouped_matmul(op, x, sizes, *arrays, **static)


def test_every_op_has_a_grouped_form():
    singles = {op for op in reference.OPS if not op.startswith("grouped_")}
    assert set(reference.OPS) == singles | {f"grouped_{op}" for op in singles}


# --- what they reject -----------------------------------------------------------------------


def packed(**changes):
    given = {
        "op": "packed_matmul", "x": draw(6, 64), "group_sizes": jnp.array([2, 4], jnp.int32),
        "codes": jnp.zeros((2, 8, 16), jnp.int32), "scale": jnp.ones((2, 2, 16)), "zero": None,
    } | changes  # fmt: skip
    return partial(grouped_matmul, *given.values(), bits=4, group_size=32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (packed(op="matmul"), "op must be one of packed_matmul"),
        (packed(x=draw(64)), r"x must be \[m, k\]"),
        (packed(x=draw(6, 48)), "codes must have 6 words per column, got 8"),
        (packed(group_sizes=jnp.array([2.0, 4.0])), "group_sizes must be int32"),
        (packed(group_sizes=jnp.array([[2, 4]])), r"group_sizes must be int32 \[experts\]"),
        (packed(group_sizes=jnp.array([2, 3, 1])), "leading axis of 3 experts"),
        (packed(codes=jnp.zeros((2, 7, 16), jnp.int32)), "codes must have 8 words"),
        (packed(codes=jnp.zeros((8, 16), jnp.int32)), "array 1 after group_sizes must have"),
        (packed(codes=jnp.zeros((2, 8, 16))), "codes must be int32"),
        (packed(scale=jnp.ones((2, 3, 16))), r"scale must be \[2, 16\]"),
        (packed(scale=jnp.ones((3, 2, 16))), "array 2 after group_sizes must have"),
        (packed(zero=jnp.zeros((2, 2, 1), jnp.int32)), r"zero must be int32 \[2, 2\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- tiles of rows --------------------------------------------------------------------------


def test_tiles_hold_every_row_once_and_of_one_expert():
    """All divisions of a few rows, for tiles of several sizes; the bound on their number holds."""
    for m, rows in itertools.product((1, 4, 7), (1, 2, 8)):
        for sizes in itertools.product(range(5), repeat=3):
            if sum(sizes) > m:
                continue
            tiles = row_tiles.cut(jnp.array(sizes), m, rows)
            owner = np.repeat(np.arange(3), sizes)
            held = np.asarray(tiles.rows)
            assert len(held) == row_tiles.count(m, 3, rows)
            assert sorted(held[held < m]) == list(range(sum(sizes)))
            for expert, tile in zip(tiles.experts, held, strict=True):
                assert set(owner[tile[tile < m]]) <= {int(expert)}
            used = int(tiles.used[0])
            assert used == sum(-(-s // rows) for s in sizes)
            assert (held[:used] < m).any(1).all() and (held[used:] == m).all()
            x = np.arange(m, dtype=np.float32)[:, None] + 1
            back = tiles.scattered(tiles.gathered(jnp.asarray(x)))
            chex.assert_trees_all_equal(
                back, np.where(np.arange(m) < sum(sizes), x[:, 0], 0)[:, None]
            )


def test_experts_of_a_check_name_what_is_wrong():
    with pytest.raises(ValueError, match="got None"):
        checks.experts([], None)
