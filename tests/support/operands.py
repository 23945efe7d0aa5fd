"""Random operands of every op; a new one enters by one line in CASES."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from pallas_kernels import reference

# Name -> the format that makes the arrays, and the rows that its codes come in.
CASES = {
    **{f"packed {b} bits": (jq.formats.Integer(b, 64, symmetric=True), 64) for b in (2, 3, 4, 8)},
    "packed 2 bits, zero points": (jq.formats.Integer(2, 64), 64),
    "packed 4 bits, zero points": (jq.formats.Integer(4, 128), 128),
    "packed 4 bits, a scale a column": (jq.formats.Integer(4, -1, symmetric=True), 1),
    "packed 3 bits, one scale": (jq.formats.Integer(3, "tensor", symmetric=True), 1),
    "ternary": (jq.formats.Ternary(group_size=64), 64),
    "codebook nf4": (jq.formats.NormalFloat(4, 64), 64),
    "codebook mxfp4": (jq.formats.MXFP4(), 32),
    "codebook float8": (jq.formats.Float8("e4m3"), 1),
    "e8p 2 bits": (jq.formats.E8P(2), 8),
    "e8p 3 bits": (jq.formats.E8P(3), 8),
    "e8p 4 bits": (jq.formats.E8P(4), 8),
    "trellis mul1": (jq.formats.Trellis((2,), L=12), 16),
    "trellis 3inst": (jq.formats.Trellis((3,), L=8, code="3inst"), 16),
    "trellis vpu": (jq.formats.Trellis((2,), L=16, code="vpu"), 16),
    "trellis, rates by block": (jq.formats.Trellis((3, 0, 1, 2), L=8), 64),
    "additive 2x8": (jq.formats.Additive(2, 8, 8), 8),
    "additive 1x9": (jq.formats.Additive(1, 9, 3), 3),
    "dual scale, 4 bits": (jq.formats.DualScale(4), 1),
    "dual scale, 8 bits": (jq.formats.DualScale(8), 1),
    "float planes, 3 bits": (jq.formats.FloatPlanes(bits=3, listed=64), 1),
    "float planes, 4 bits": (jq.formats.FloatPlanes(bits=4, listed=64), 1),
}


def random_data(format, k, n, seed=0):
    """Packed data of a matrix [k, n] without a search: any words decode to some weights."""
    rng = np.random.default_rng(seed)
    if isinstance(format, jq.formats.FloatPlanes):  # any words may decode to an infinity
        return format.encode(jnp.asarray(rng.normal(size=(k, n)) / 64, jnp.float32))

    def fill(name, a):
        if name in ("codes", "residual", "zero", "ranges", "escapes"):
            words = rng.integers(-(1 << 31), 1 << 31, a.shape, np.int64).astype(np.int32)
            if name == "codes" and isinstance(format, jq.formats.Ternary):  # 10 stands for no code
                words = words & ~((words >> 1 & 0x55555555 & ~words) << 1)
            if name == "codes" and isinstance(
                format, jq.formats.Float8
            ):  # neither NaN nor infinite
                words = words & 0x3F3F3F3F
            return jnp.asarray(words)
        if jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.asarray((rng.uniform(0.5, 1.5, a.shape) / 64).astype(a.dtype))
        raise ValueError(f"no random {name} of {a.dtype}")

    data = {name: fill(name, a) for name, a in format.shapes(k, n).items()}
    return data | _escapes(rng, k, n) if isinstance(format, jq.formats.DualScale) else data


def _escapes(rng, k, n):
    """Some in every other column, and some that are nobody's."""
    ends = np.cumsum(rng.integers(0, 4, n) * (np.arange(n) % 2))
    ranges = np.stack([np.concatenate([[0], ends[:-1]]), ends])
    words = rng.integers(-300, 300, 4 * n) << 16 | rng.integers(0, k, 4 * n)
    return {"ranges": jnp.asarray(ranges, jnp.int32), "escapes": jnp.asarray(words, jnp.int32)}


def operands(case, k, n, seed=0):
    """(op, arrays without x, statics) of a case; k must suit its codes."""
    format, rows = CASES[case]
    assert k % rows == 0
    arrays, static = format.arguments(random_data(format, k, n, seed), k)
    return f"{format.storage}_matmul", arrays, static


def decoded(op, arrays, static, k):
    """The matrix [k, n] of an op's arrays, by one program."""
    of = functools.partial(reference.weights, op.removesuffix("_matmul"), **static, k=k)
    return jax.jit(of)(*arrays)


# --- rows that are not finite ---------------------------------------------------------------

SPOILT = ({0: np.nan, 2: -np.inf, 9: np.nan, 97: np.inf}, {0: np.inf})  # rows, where there are such


def spoilt(x, rows):
    """x with an entry of each of these rows replaced."""
    x = np.array(x)
    for row, value in rows.items():
        if row < len(x):
            x[row, (7 * row + 3) % x.shape[1]] = value
    return jnp.asarray(x)


def assert_only_nan(y, clean, rows):
    """These rows are NaN, and the others what they are without them, bit for bit."""
    y, clean = np.asarray(y), np.asarray(clean)
    rows = [row for row in rows if row < len(y)]
    assert np.isfinite(clean).all() and np.isnan(y[rows]).all()
    np.testing.assert_array_equal(np.delete(y, rows, 0), np.delete(clean, rows, 0))


def assert_rows_hold(run, x, clean=None):
    """The contract of every product: a row with NaN or an infinity gives NaN, others their own."""
    clean = run(x) if clean is None else clean
    for rows in SPOILT:
        assert_only_nan(run(spoilt(x, rows)), clean, rows)


# What is timed on a device: case and form of activations.
TIMED = [
    ("packed 8 bits", "float"), ("packed 4 bits", "float"), ("packed 2 bits", "float"),
    ("packed 4 bits", "int8"), ("packed 2 bits", "int8"), ("ternary", "int8"),
    ("packed 3 bits", "float"), ("codebook nf4", "float"), ("e8p 2 bits", "float"),
    ("trellis mul1", "float"), ("additive 2x8", "float"),
]  # fmt: skip


def random_operands(k, n):
    """(case, activations, op, arrays, statics) of what is timed."""
    for case, form in TIMED:
        yield case, form, *operands(case, k, n)
