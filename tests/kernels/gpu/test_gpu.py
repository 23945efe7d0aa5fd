"""GPU kernels: what they compute in interpret mode, and what they serve."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations as forms
from pallas_kernels import reference
from pallas_kernels.codecs import float_planes as planes
from pallas_kernels.codecs import layout, lookup
from pallas_kernels.gpu import KERNELS, lanes, triton
from tests.support.lowering import lowered_text
from tests.support.operands import assert_rows_hold

ROWS = (1, 3, 8, 16, 64, 200)
# Mean squared error over mean square, and largest error over root mean square, against float32
# products of the same x: of exact weights in float32 sums, and of weights rounded to float16.
EXACT, HALVES = (1e-11, 1e-5), (2**-22, 2e-3)
# Interpreted kernels are large programs that run once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NORMAL_FLOAT = tuple(float(v) for v in np.sort(np.random.default_rng(4).normal(size=16)) / 3)


def words(rng, *shape):
    return jnp.asarray(rng.integers(-(2**31), 2**31, shape).astype(np.int32))


def scales(rng, *shape, dtype="float16"):
    return jnp.asarray(rng.uniform(0.5, 1.5, shape)).astype(dtype)


def packed(rng, k, n, bits, group_size, zero=False, one=False, dtype="float16"):
    groups = -(-k // group_size)
    shape = (1, 1) if one else (groups, n)
    arrays = [words(rng, layout.words(k, bits), n), scales(rng, *shape, dtype=dtype)]
    arrays.append(words(rng, groups, layout.words(n, bits)) if zero else None)
    return arrays, {"bits": bits, "group_size": group_size}


def ternary(rng, k, n, group_size):
    codes = layout.pack(jnp.asarray(rng.integers(-1, 2, (k, n))), 2)
    return [codes, scales(rng, -(-k // group_size), n)], {"group_size": group_size}


def codebook(rng, k, n, bits, group_size, table=NORMAL_FLOAT):
    arrays = [words(rng, layout.words(k, bits), n), scales(rng, -(-k // group_size), n)]
    return arrays, {"bits": bits, "group_size": group_size, "table": table[: 1 << bits]}


def float8(rng, k, n):
    bits = np.asarray(jnp.asarray(rng.normal(size=(k, n))).astype("float8_e4m3fn")).view(np.int8)
    codes = layout.pack(jnp.asarray(bits.astype(np.int32)), 8)
    static = {"bits": 8, "group_size": 32, "table": "float8_e4m3fn"}
    return [codes, scales(rng, -(-k // 32), n, dtype="float32")], static


def e8p(rng, k, n, bits):
    k, fine = k // 8, 8 * (bits - 2)
    residual = words(rng, layout.words(k * fine // 8, 8), n) if fine else None
    return [words(rng, layout.words(2 * k, 8), n), residual, scales(rng, 1, 1)], {"bits": bits}


def trellis(rng, k, n, rate, L, code="mul1", blocks=1):
    arrays = [words(rng, k // 16 * 8 * rate, n // 16), scales(rng, blocks, 1, dtype="float32")]
    return arrays, {"rates": (rate,) * blocks, "L": L, "code": code}


def additive(rng, k, n, count, bits, group):
    codes = jnp.asarray(rng.integers(0, 1 << bits, (k // group, count, n)))
    books = jnp.asarray(rng.normal(size=(count, 1 << bits, group))).astype("float16")
    arrays = [lookup.pack(codes, bits), books, scales(rng, 1, n)]
    return arrays, {"bits": bits, "group": group}


def float_planes(rng, k, n):
    """Columns of several sizes, zeros, a large and a small weight, unused entries of the list."""
    w = rng.normal(size=(k, n)) * np.exp2(rng.integers(-20, 1, n))
    w[::9, ::7], w[1, 1], w[2, 2] = 0, 1e4, 1e-30
    u = jax.lax.bitcast_convert_type(jnp.asarray(w, jnp.bfloat16), jnp.uint16)
    listed = int(planes.missing(u, "bfloat16", 4)) + 5
    return [*planes.encode(u, "bfloat16", 4, listed)], {"dtype": "bfloat16", "bits": 4}


# Of every format: op, how to draw a matrix, channels and columns (ragged where it allows), budget.
FORMATS = {
    "2 bits": ("packed_matmul", partial(packed, bits=2, group_size=64), 328, 70, EXACT),
    "2 bits, zeros": (
        "packed_matmul", partial(packed, bits=2, group_size=128, zero=True),
        300, 75, EXACT,
    ),
    "2 bits, one scale": (
        "packed_matmul", partial(packed, bits=2, group_size=512, one=True),
        500, 130, EXACT,
    ),
    "3 bits": ("packed_matmul", partial(packed, bits=3, group_size=96, zero=True), 203, 77, EXACT),
    "4 bits": (
        "packed_matmul", partial(packed, bits=4, group_size=32, dtype="bfloat16"),
        300, 129, EXACT,
    ),
    "8 bits": (
        "packed_matmul", partial(packed, bits=8, group_size=128, dtype="float32"),
        260, 65, EXACT,
    ),
    "ternary": ("ternary_matmul", partial(ternary, group_size=192), 576, 70, EXACT),
    "NormalFloat": ("codebook_matmul", partial(codebook, bits=4, group_size=64), 200, 70, HALVES),
    "float8": ("codebook_matmul", float8, 200, 70, EXACT),
    "E8P": ("e8p_matmul", partial(e8p, bits=2), 200, 70, EXACT),
    "trellis": ("trellis_matmul", partial(trellis, rate=2, L=16), 208, 304, EXACT),
    "additive": ("additive_matmul", partial(additive, count=2, bits=8, group=8), 200, 70, EXACT),
    "float planes": ("float_planes_matmul", float_planes, 203, 70, EXACT),
}  # fmt: skip
# Once each, what else they can be.
MORE = {
    "codebook of 4": ("codebook_matmul", partial(codebook, bits=2, group_size=32), 96, 70, HALVES),
    "codebook of 8": ("codebook_matmul", partial(codebook, bits=3, group_size=64), 192, 70, HALVES),
    "E8P 3 bits": ("e8p_matmul", partial(e8p, bits=3), 200, 70, EXACT),
    "E8P 4 bits": ("e8p_matmul", partial(e8p, bits=4), 200, 70, EXACT),
    "trellis 4 bits": (
        "trellis_matmul", partial(trellis, rate=4, L=12, code="1mad", blocks=2),
        192, 32, EXACT,
    ),
    "trellis 8 bits": ("trellis_matmul", partial(trellis, rate=8, L=13), 64, 16, EXACT),
    "additive 1 x 16": (
        "additive_matmul", partial(additive, count=1, bits=16, group=8),
        136, 70, EXACT,
    ),
    "additive 4 x 4": (
        "additive_matmul", partial(additive, count=4, bits=4, group=4),
        136, 70, EXACT,
    ),
}  # fmt: skip
DTYPES, ACTIVATIONS = ("bfloat16", "float32", "float16"), forms.FORMS


def errors(op, draw, m, k, n, dtype, activations, seed=0):
    """(mean squared, largest) errors of a kernel, relative to its reference."""
    rng = np.random.default_rng([seed, m, k])
    arrays, static = draw(rng, k, n)
    x = jnp.asarray(rng.normal(size=(m, k)) * np.exp(rng.normal(size=(m, 1))))
    if activations == "codes":
        x = jnp.clip(jnp.round(40 * x), -127, 127)
    x = x.astype(dtype)
    kernel = KERNELS[op]
    assert kernel.serves(x, *arrays, **static, activations=activations) == ""
    with triton.interpreted():
        call = partial(kernel.call, **static, activations=activations)
        run = jax.jit(call, compiler_options=QUICK)
        y = run(x, *arrays)
        assert_rows_hold(lambda x: run(x, *arrays), x, y)
    assert y.shape == (m, n) and y.dtype == jnp.float32
    exact = jax.jit(forms.rounded, static_argnums=1)(x, activations).astype(jnp.float32)
    expected = jax.jit(partial(reference.OPS[op], **static), compiler_options=QUICK)
    expected = expected(exact, *arrays)
    off = np.asarray(y - expected, np.float64)
    square = np.mean(np.square(np.asarray(expected, np.float64)), axis=1, keepdims=True)
    return np.mean(off**2 / square), np.max(np.abs(off) / np.sqrt(square))


def cases():
    """Every op at every number of rows; forms of packed_matmul but the first take two each."""
    for i, (name, (op, *_)) in enumerate(FORMATS.items()):
        more = "," in name or (op == "packed_matmul" and i) or name in ("float8", "float planes")
        yield from ((name, m) for m in (ROWS[i % 3 :: 3] if more else ROWS))


@pytest.mark.parametrize("name, m", list(cases()))
def test_equals_its_reference(name, m):
    """Every dtype of x and form of activations meets every op at some number of rows."""
    op, draw, k, n, budget = FORMATS[name]
    i = list(FORMATS).index(name) + ROWS.index(m)
    mean, largest = errors(op, draw, m, k, n, DTYPES[i % 3], ACTIVATIONS[i % 4])
    assert mean < budget[0] and largest < budget[1]


@pytest.mark.parametrize("name", MORE)
def test_equals_its_reference_in_other_forms(name):
    op, draw, k, n, budget = MORE[name]
    mean, largest = errors(op, draw, 3, k, n, "float32", "float")
    assert mean < budget[0] and largest < budget[1]


# bits, m, k, n, rows of a group, g: every block of rows; k and n ragged; shares of n.
TRANSPOSED = [
    (4, 1, 200, 330, 64, "bfloat16"), (4, 17, 300, 70, 48, "float32"),
    (4, 100, 100, 130, 16, "float32"), (3, 64, 192, 70, 96, "float16"),
    (2, 3, 96, 70, 32, "bfloat16"), (4, 9, 320, 70, 320, "bfloat16"),
    (8, 5, 200, 70, 32, "float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_transposed_codebooks(case):
    bits, m, k, n, group, dtype = case
    rng = np.random.default_rng(m)
    arrays, static = float8(rng, k, n) if bits == 8 else codebook(rng, k, n, bits, group)
    g, static = jnp.asarray(rng.normal(size=(m, n)) * 1e-7).astype(dtype), static | {"k": k}
    kernel = KERNELS["codebook_matmul_transposed"]
    assert kernel.serves(g, *arrays, **static) == ""
    with triton.interpreted():
        run = jax.jit(partial(kernel.call, **static), compiler_options=QUICK)
        y = run(g, *arrays)
        assert_rows_hold(lambda g: run(g, *arrays), g, y)
    w = np.asarray(reference.weights("codebook", *arrays, **static), np.float64)
    exact = np.asarray(g, np.float64) @ w.T
    square = np.mean(np.square(exact), axis=1, keepdims=True)
    off = np.asarray(y, np.float64) - exact
    assert y.shape == (m, k) and y.dtype == jnp.float32
    assert np.mean(off**2 / square) < HALVES[0]
    assert np.max(np.abs(off) / np.sqrt(square)) < HALVES[1]


def test_budget_tells_a_wrong_kernel(monkeypatch):
    """Fields one bit higher than float16 is linear in: what a test must see."""
    op, draw, k, n, budget = FORMATS["2 bits, one scale"]
    assert errors(op, draw, 3, k, n, "float32", "float")[0] < budget[0]
    monkeypatch.setattr(lanes, "EXACT", 12)
    assert errors(op, draw, 3, k, n, "float32", "float")[0] > 1e3 * budget[0]


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e30])
def test_rows_of_any_size(size):
    """Rows are scaled to float16's range, small entries beside large ones included."""
    rng = np.random.default_rng(1)
    arrays, static = packed(rng, 256, 32, 2, 256, one=True)
    x = jnp.asarray(rng.normal(size=(3, 256)) * np.exp2(rng.integers(-12, 1, 256))) * size
    x = x.astype("bfloat16").at[1].set(0)
    with triton.interpreted():
        y = KERNELS["packed_matmul"].call(x, *arrays, **static)
    expected = reference.packed_matmul(x.astype(jnp.float32), *arrays, **static)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * size)


UNSERVED = {
    "transposed": (
        "codebook_matmul_transposed",
        partial(codebook, bits=4, group_size=24),
        {"k": 192},
    ),
    "group": ("packed_matmul", partial(packed, bits=2, group_size=24), {}),
    "8 bits, not mul1": ("trellis_matmul", partial(trellis, rate=8, L=16, code="3inst"), {}),
    "odd rate": ("trellis_matmul", partial(trellis, rate=3, L=16), {}),
    "codes of 12 bits": ("additive_matmul", partial(additive, count=1, bits=12, group=8), {}),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_says_why_not(name):
    op, draw, more = UNSERVED[name]
    arrays, static = draw(np.random.default_rng(0), 192, 32)
    x = jax.ShapeDtypeStruct((1, 192), jnp.float32)
    assert KERNELS[op].serves(x, *arrays, **static, **more).startswith("on a GPU, ")


def test_float_planes_that_are_not_served():
    rng = np.random.default_rng(0)
    arrays, static = float_planes(rng, 64, 8)
    serves, x = KERNELS["float_planes_matmul"].serves, jnp.ones((1, 64))
    assert "use bits=4" in serves(x, *arrays, **static | {"bits": 3})
    assert "float16" in serves(x, *arrays, **static | {"dtype": "float16"})


@pytest.mark.parametrize("name", FORMATS)
def test_lowers_for_cuda(name):
    """Without a GPU or its plugin: the lowering holds the Triton call, jitted and vmapped."""
    op, draw, *_ = FORMATS[name]
    arrays, static = draw(np.random.default_rng(0), 256, 128)
    x = jnp.ones((2, 4, 256), jnp.bfloat16)
    call = partial(KERNELS[op].call, **static)
    many = lambda x, *arrays: jax.vmap(lambda x: call(x, *arrays))(x)
    assert lowered_text(many, x, *arrays, platform="cuda").count("xla.gpu.triton") == 1
