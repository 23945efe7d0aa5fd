"""The native CPU kernels against their references, on every instruction set that this machine runs.

Budgets: of float activations, float32 sums in another order: NMSE 1e-11, the largest error 1e-5 of
the largest output. Of integer activations the same, as integer sums are exact; but a table's values
are then rounded to 14 bits: NMSE 1e-7, largest 1e-3.
"""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations as forms
from pallas_kernels import cpu
from pallas_kernels.codecs import float_fields, float_planes, layout, lookup
from pallas_kernels.cpu import native
from tests.support.operands import SPOILT, assert_only_nan, decoded, spoilt

REASON = native.load()
SETS = range(len(native.instruction_sets()))
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU's kernels")
needs_native = pytest.mark.skipif(bool(REASON), reason=f"no native kernels: {REASON}")

ROWS = (1, 3, 8, 16, 64, 200)
TABLE = tuple(float(v) for v in np.linspace(-1.1, 0.9, 16) ** 3)


@pytest.fixture
def rng():
    return np.random.default_rng()  # fresh


def floats(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.uniform(0.25, 2, shape), dtype)


def integers(rng, bits, *shape):
    return jnp.asarray(rng.integers(-(1 << bits - 1), 1 << bits - 1, shape), jnp.int32)


def packed(rng, k, n, bits, group, asymmetric=False, dtype="float16", one=False):
    groups, width = (1, 1) if one else (-(-k // group), n)
    zero = layout.pack(integers(rng, bits, width, groups), bits).T if asymmetric else None
    codes = layout.pack(integers(rng, bits, k, n), bits)
    static = {"bits": bits, "group_size": group}
    return "packed_matmul", (codes, floats(rng, groups, width, dtype=dtype), zero), static


def ternary(rng, k, n, group):
    codes = layout.pack(jnp.asarray(rng.integers(-1, 2, (k, n))), 2)
    return "ternary_matmul", (codes, floats(rng, -(-k // group), n)), {"group_size": group}


def codebook(rng, k, n, bits, group):
    arrays = layout.pack(integers(rng, bits, k, n), bits), floats(rng, -(-k // group), n)
    static = {"table": TABLE[: 1 << bits], "bits": bits, "group_size": group}
    return "codebook_matmul", arrays, static


def e8p(rng, k, n, bits):
    code = lambda width: lookup.pack(
        jnp.asarray(rng.integers(0, 1 << width, (k // 8, 1, n))), width
    )
    residual = code(8 * (bits - 2)) if bits > 2 else None
    return "e8p_matmul", (code(16), residual, floats(rng, 1, 1)), {"bits": bits}


def tiles(rng, k, n, rates, L, code):
    words = sum(8 * rate * (k // 16 // len(rates)) for rate in rates)
    codes = jnp.asarray(rng.integers(-(2**31), 2**31, (words, n // 16)), jnp.int32)
    static = {"rates": rates, "L": L, "code": code}
    return "trellis_matmul", (codes, floats(rng, len(rates), 1)), static


def additive(rng, k, n, books, bits, group):
    codes = lookup.pack(jnp.asarray(rng.integers(0, 1 << bits, (k // group, books, n))), bits)
    vectors = jnp.asarray(rng.standard_normal((books, 1 << bits, group)), "float16")
    arrays = codes, vectors, floats(rng, 1, n, dtype="float16")
    return "additive_matmul", arrays, {"bits": bits, "group": group}


def dual_scale(rng, k, n, bits):
    """A quarter of the columns have escapes, of which some are in one row."""
    ends = np.cumsum(rng.integers(0, 9, n) * (rng.random(n) < 0.25))
    ranges = np.stack([np.concatenate([[0], ends[:-1]]), ends])
    escapes = rng.integers(-99, 99, ends[-1] + 2) << 16 | rng.integers(0, k, ends[-1] + 2)
    words = layout.pack(integers(rng, bits, k, n), bits)
    arrays = (
        words,
        floats(rng, 1, n),
        floats(rng, k),
        *(jnp.asarray(a, jnp.int32) for a in (ranges, escapes)),
    )
    return "dual_scale_matmul", arrays, {"bits": bits}


def planes(rng, k, n, dtype, bits):
    """Normal weights, a sixteenth of them much smaller: escapes that are described, and listed."""
    w = rng.standard_normal((k, n)) * 2.0 ** -(
        rng.integers(0, 12, (k, n)) * (rng.random((k, n)) < 1 / 16)
    )
    u = jax.lax.bitcast_convert_type(jnp.asarray(w, dtype), float_fields.unsigned(dtype))
    arrays = tuple(float_planes.encode(u, dtype, bits))
    return "float_planes_matmul", arrays, {"dtype": dtype, "bits": bits}


# Name -> k, and what makes (op, arrays, static) of it: ragged k and n where the format has them.
CASES = {
    "2 bits": (300, lambda rng, k: packed(rng, k, 75, 2, 64)),
    "2 bits, zero points": (256, lambda rng, k: packed(rng, k, 130, 2, 32, True, "bfloat16")),
    "3 bits": (200, lambda rng, k: packed(rng, k, 61, 3, 64, True)),
    "4 bits": (332, lambda rng, k: packed(rng, k, 144, 4, 64)),
    "4 bits, zero points": (300, lambda rng, k: packed(rng, k, 75, 4, 20, True, "float32")),
    "4 bits, one scale": (300, lambda rng, k: packed(rng, k, 40, 4, k, True, "float32", one=True)),
    "8 bits": (530, lambda rng, k: packed(rng, k, 33, 8, 128, True)),
    "ternary": (300, lambda rng, k: ternary(rng, k, 75, 300)),
    "codebook 2": (100, lambda rng, k: codebook(rng, k, 20, 2, 100)),
    "codebook 3": (100, lambda rng, k: codebook(rng, k, 50, 3, 32)),
    "codebook 4": (300, lambda rng, k: codebook(rng, k, 75, 4, 64)),
    "e8p 2": (280, lambda rng, k: e8p(rng, k, 75, 2)),
    "e8p 3": (136, lambda rng, k: e8p(rng, k, 33, 3)),
    "e8p 4": (136, lambda rng, k: e8p(rng, k, 33, 4)),
    "trellis mul1": (288, lambda rng, k: tiles(rng, k, 144, (2,), 12, "mul1")),
    "trellis mul1 of many rates": (
        160,
        lambda rng, k: tiles(rng, k, 48, (3, 1, 0, 4, 5), 16, "mul1"),
    ),
    "trellis 1mad": (96, lambda rng, k: tiles(rng, k, 272, (6, 7, 8), 16, "1mad")),
    "trellis mcg": (64, lambda rng, k: tiles(rng, k, 32, (3,), 12, "mcg")),
    "trellis hyb": (64, lambda rng, k: tiles(rng, k, 32, (2,), 12, "hyb")),
    "additive 2x8": (272, lambda rng, k: additive(rng, k, 75, 2, 8, 8)),
    "dual scale 4": (332, lambda rng, k: dual_scale(rng, k, 75, 4)),
    "dual scale 8": (130, lambda rng, k: dual_scale(rng, k, 144, 8)),
    "float planes": (300, lambda rng, k: planes(rng, k, 75, "bfloat16", 3)),
    "additive 1x12": (108, lambda rng, k: additive(rng, k, 33, 1, 12, 6)),
}


def case(name, m, rng):
    """x [m, k], op, arrays and static arguments."""
    k, make = CASES[name]
    return jnp.asarray(rng.standard_normal((m, k)), jnp.float32), *make(rng, k)


def budget(name, form):
    return (1e-7, 1e-3) if name.startswith("codebook") and form != "float" else (1e-11, 1e-5)


def errors(y, want):
    y, want = np.asarray(y, float), np.asarray(want, float)
    return np.sum((y - want) ** 2) / np.sum(want**2), np.max(abs(y - want)) / np.max(abs(want))


def whole(x):
    """Codes of other scales and zero points than the kernels' own."""
    return jnp.clip(jnp.round(x * 40), -127, 127)


def exact(op, inputs, arrays, static):
    """What inputs (by their form) and weights are, multiplied exactly in float64."""
    w = decoded(op, arrays, static, next(iter(inputs.values())).shape[1])
    rounded = jax.jit(lambda inputs: {form: forms.rounded(x, form) for form, x in inputs.items()})
    return {
        form: np.asarray(x, float) @ np.asarray(w, float) for form, x in rounded(inputs).items()
    }


# With VBMI only products of float planes differ.
PARITY = [
    pytest.param(name, most, id=f"{name}-{each}")
    for name in CASES
    for most, each in enumerate(native.instruction_sets())
    if name.startswith("float planes") or each != "avx512vbmi"
]


@needs_native
@pytest.mark.parametrize(("name", "most"), PARITY)
def test_parity(name, most, rng):
    x, op, arrays, static = case(name, max(ROWS), rng)
    call = lambda x, form: cpu.shared(op, x, [arrays], activations=form, most=most, **static)[0]
    run = jax.jit(
        lambda inputs: {form: [call(x[:m], form) for m in ROWS] for form, x in inputs.items()}
    )
    inputs = {form: whole(x) if form == "codes" else x for form in forms.FORMS}
    clean = run(inputs)
    wanted = exact(op, inputs, arrays, static)
    for form, found in clean.items():
        want = wanted[form]
        for m, y in zip(ROWS, found, strict=True):
            assert y.shape == want[:m].shape and y.dtype == jnp.float32
            nmse, worst = errors(y, want[:m])
            assert nmse < budget(name, form)[0] and worst < budget(name, form)[1], (form, m)
    for rows in SPOILT:
        wrong = run({form: spoilt(x, rows) for form, x in inputs.items()})
        jax.tree.map(lambda y, clean, rows=rows: assert_only_nan(y, clean, rows), wrong, clean)


@needs_native
@pytest.mark.parametrize("name", ["2 bits", "e8p 2", "trellis mul1", "additive 2x8"])
def test_a_wrong_word_is_found(name, rng):
    """The budgets would not pass a kernel that misreads one word in a column."""
    x, op, arrays, static = case(name, 3, rng)
    wrong = (arrays[0].at[1, 2].set(~arrays[0][1, 2]), *arrays[1:])
    (y,) = cpu.shared(op, x, [wrong], **static)
    nmse, worst = errors(y, exact(op, {"float": x}, arrays, static)["float"])
    assert nmse > 100 * budget(name, "float")[0] and worst > 100 * budget(name, "float")[1]


@needs_native
def test_integer_products_are_exact(rng):
    """With scales of one and x of whole numbers nothing is rounded at all."""
    codes = layout.pack(integers(rng, 4, 192, 40), 4)
    x = jnp.asarray(rng.integers(-127, 128, (5, 192)), jnp.float32).at[:, 0].set(127)
    static = {"bits": 4, "group_size": 64, "activations": "int8"}
    arrays = codes, jnp.ones((3, 40)), None
    for most in SETS:
        (y,) = cpu.shared("packed_matmul", x, [arrays], most=most, **static)
        want = np.asarray(x, int) @ np.asarray(layout.unpack(codes, 4, 192))
        np.testing.assert_array_equal(y, want)


@needs_native
def test_matrices_that_share_an_input_are_one_call(rng):
    found = [packed(rng, 128, n, 4, 64) for n in (64, 20, 300)]
    op, static = found[0][0], found[0][2]
    matrices = [arrays for _, arrays, _ in found]
    x = jnp.asarray(rng.standard_normal((2, 128)), jnp.float32)
    run = jax.jit(lambda x: cpu.shared(op, x, matrices, **static))
    for y, arrays in zip(run(x), matrices, strict=True):
        assert errors(y, exact(op, {"float": x}, arrays, static)["float"])[0] < 1e-11
    assert run.lower(x).as_text().count("@jaxquant_packed") == 1


@needs_native
def test_matrices_with_steps_of_their_own_share_a_call(rng):
    """x is another for each of them, and prepared for each."""
    found = [dual_scale(rng, 128, n, 4) for n in (64, 20, 300)]
    op, static = found[0][0], found[0][2]
    matrices = [arrays for _, arrays, _ in found]
    for m in (1, 2, 30):
        x = jnp.asarray(rng.standard_normal((m, 128)), jnp.float32)
        inputs = dict.fromkeys(("float", "int8"), x)
        wanted = [exact(op, inputs, arrays, static) for arrays in matrices]
        for form in inputs:
            ys = cpu.shared(op, x, matrices, activations=form, **static)
            for y, want in zip(ys, wanted, strict=True):
                assert errors(y, want[form])[0] < 1e-11


@needs_native
def test_it_is_a_function_like_any_other(rng):
    _, op, arrays, static = case("4 bits", 1, rng)
    call = cpu.KERNELS[op].call
    x = jnp.asarray(rng.standard_normal((2, 3, 332)), jnp.float32)
    want = np.stack([call(x[i], *arrays, **static) for i in range(2)])
    one = lambda x: call(x, *arrays, **static)
    np.testing.assert_array_equal(jax.vmap(one)(x), want)
    np.testing.assert_array_equal(jax.jit(lambda x: jax.lax.map(one, x))(x), want)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), arrays)  # experts
    got = jax.vmap(lambda x, arrays: call(x, *arrays, **static))(x, stacked)
    np.testing.assert_array_equal(got, want)
    half = one(x[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(half, one(x[0].astype(jnp.bfloat16).astype(jnp.float32)))
    assert one(x[0, :0]).shape == (0, 144)


@needs_native
@pytest.mark.parametrize("most", SETS, ids=native.instruction_sets())
def test_strange_activations_do_no_harm(most, rng):
    """Rows of zeros, of huge entries, and of entries whose scale has no reciprocal."""
    _, op, arrays, static = case("4 bits", 1, rng)
    x = jnp.zeros((3, 332)).at[1].set(1e30).at[2, ::2].set(1e-37)
    for form in ("int8", "int8/256"):
        (y,) = cpu.shared(op, x, [arrays], activations=form, most=most, **static)
        assert not np.asarray(y[::2]).any() and np.isfinite(y[1]).all()
        assert not np.asarray(forms.rounded(x, form)[::2]).any()


def shapes(arrays):
    return [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]


@needs_native
def test_what_is_not_served_has_a_reason(rng):
    _, op, arrays, static = case("4 bits", 1, rng)
    x = jax.ShapeDtypeStruct((3, 332), jnp.float32)
    serves = cpu.KERNELS[op].serves
    assert serves(x, *shapes(arrays), **static) == ""
    double = jax.ShapeDtypeStruct(x.shape, np.float64)
    assert "got float64" in serves(double, *shapes(arrays), **static)
    words = jax.ShapeDtypeStruct((16, 3), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.float32)
    tiled = {"rates": (2,), "L": 12, "code": "vpu"}
    assert "'vpu'" in cpu.KERNELS["trellis_matmul"].serves(x, *words, **tiled)
    float8 = {"table": "float8_e4m3fn", "bits": 8, "group_size": 64}
    assert "float8" in cpu.KERNELS["codebook_matmul"].serves(x, *shapes(arrays[:2]), **float8)


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: "turned off by JAXQUANT_NATIVE=0")
    x, codes, scale = (jax.ShapeDtypeStruct(s, d) for s, d in (
        ((1, 16), jnp.float32), ((1, 8), jnp.int32), ((1, 8), jnp.float32)))  # fmt: skip
    reason = cpu.KERNELS["packed_matmul"].serves(x, codes, scale, None, bits=2, group_size=16)
    assert reason == "no native kernels: turned off by JAXQUANT_NATIVE=0"


@needs_native
def test_unknown_op():
    with pytest.raises(ValueError, match="op must be one of packed_matmul"):
        cpu.shared("matmul", jnp.ones((1, 1)), [])


@needs_native
def test_calls_from_several_threads_share_the_helpers(rng):
    """Large products, which wake helpers, and small ones, which only take those awake."""
    calls = []
    for k, n in ((2048, 1024), (256, 640)):
        op, arrays, static = packed(rng, k, n, 4, 32)
        x = floats(rng, 1, k)
        f = jax.jit(
            lambda x, op=op, arrays=arrays, static=static: cpu.KERNELS[op].call(
                x, *arrays, **static
            )
        )
        calls.append((f, x, np.asarray(f(x))))

    def check(i):
        f, x, want = calls[i % 2]
        np.testing.assert_array_equal(np.asarray(f(x)), want)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(check, range(400)))
