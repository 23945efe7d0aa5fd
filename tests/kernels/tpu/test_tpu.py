"""Parity of the TPU kernels with their references, interpreted on the CPU.

Budgets, of an output's mean square (NMSE) and largest absolute value (max): A16 takes x to 16 bits
of a row's largest entry, 15 in float8, and one entry is 20 times the others; int8 activations are
exact; the transposed product of bfloat16 rounds what it scales to bfloat16.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations as forms
from pallas_kernels import reference
from pallas_kernels.codecs import e8p, layout, lookup, tables
from pallas_kernels.tpu import KERNELS, lattice
from pallas_kernels.tpu.blocks import Blocks
from tests.support.operands import assert_only_nan, assert_rows_hold

NMSE = {"exact": 1e-11, "16 bits": 1e-6, "bfloat16": 1e-5}
MAX = {"exact": 1e-5, "16 bits": 3e-3, "bfloat16": 1e-2}
INTERPRETED = {"interpret": True}
# bits, m, k, n, group, activations, unit, x, scale, zero points: every m, and k and n ragged.
PACKED = [
    (2, 1, 1000, 200, 128, "float", "int8", "bfloat16", "float16", False),
    (2, 3, 520, 130, 64, "int8", "float8_e4m3fn", "float32", "float32", False),
    (3, 8, 700, 300, 128, "float", "int8", "float16", "bfloat16", True),
    (4, 16, 1100, 130, 32, "float", "float8_e4m3fn", "float32", "float32", True),
    (4, 64, 1030, 140, 256, "int8/256", "int8", "float32", "float32", False),
    (8, 200, 600, 100, 128, "float", "bfloat16", "float32", "float32", False),
    (2, 200, 576, 129, 576, "float", "int8", "bfloat16", "float32", True),
    (8, 1, 20, 30, 20, "int8", "int8", "float32", "float32", True),
    (4, 3, 300, 130, 300, "codes", "int8", "float32", "float32", True),
    (2, 8, 520, 130, 64, "codes", "float8_e4m3fn", "float32", "float32", False),
    (4, 9, 1100, 300, 64, "int8/256", "bfloat16", "float32", "float32", True),
    (4, 100, 520, 130, 128, "float", "bfloat16", "bfloat16", "float32", False),
    # Groups that slices of 256 channels with a scale do not share evenly; groups across steps.
    (4, 3, 1100, 130, 384, "int8/256", "int8", "float32", "float32", False),
    (2, 3, 2400, 130, 1152, "float", "int8", "float32", "float32", False),
]


def blocks(m, stacked=64):
    """Small, so that there are steps of every kind: first, between and last."""
    return Blocks(min(stacked, -(-m // 8) * 8), 512, 128)


def made(rng, bits, m, k, n, group, x, scale, zero):
    """x, codes, scale, zero, of given dtypes; a row of x is zero, one has an outlier."""
    groups = -(-k // group)
    integers = lambda *shape: jnp.array(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape))
    a = rng.normal(size=(m, k))
    a[0, 0] *= 20
    if m > 1:
        a[1] = 0
    zero = layout.pack(integers(n, groups), bits).T if zero else None
    return (
        jnp.array(a, x),
        layout.pack(integers(k, n), bits),
        jnp.array(rng.uniform(0.5, 1.5, (groups, n)), scale),
        zero,
    )


def close(y, exact, kind):
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert y.shape == exact.shape and y.dtype == jnp.float32
    assert np.mean(error**2) <= NMSE[kind] * np.mean(exact**2)
    assert np.max(error) <= MAX[kind] * np.max(np.abs(exact))


def product(op, x, *arrays, **options):
    """What a kernel gives; and the contract of rows that are not finite."""
    run = jax.jit(partial(KERNELS[op].call, **options, **INTERPRETED))
    y = run(x, *arrays)
    assert_rows_hold(lambda x: run(x, *arrays), x, y)
    return y


def times(x, w, activations):
    x = forms.rounded(x, activations)
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


def kind(activations):
    return "exact" if activations != "float" else "16 bits"


@pytest.mark.parametrize("case", PACKED, ids=lambda c: "-".join(map(str, c)))
def test_packed_matmul(case):
    bits, m, k, n, group, activations, unit, x, scale, zero = case
    arrays = made(np.random.default_rng(), bits, m, k, n, group, x, scale, zero)
    statics = {"bits": bits, "group_size": group}
    if activations == "codes":
        arrays = (jnp.clip(jnp.round(40 * arrays[0]), -127, 127), *arrays[1:])
    kernel = KERNELS["packed_matmul"]
    assert kernel.serves(*arrays, **statics) == ""
    options = {"unit": unit, "blocks": blocks(m)}
    y = product("packed_matmul", *arrays, **statics, activations=activations, **options)
    w = reference.dequantize(*arrays[1:], **statics, k=k, dtype=jnp.float32)
    close(y, times(arrays[0], w, activations), kind(activations))


def test_a_wrong_variant_fails():
    """Scales of the group before: what the budgets are for."""
    arrays = made(np.random.default_rng(), 4, 8, 512, 128, 128, "float32", "float32", False)
    statics = {"bits": 4, "group_size": 128}
    x, codes, scale, zero = arrays
    y = KERNELS["packed_matmul"].call(
        x, codes, jnp.roll(scale, 1, axis=0), zero, **statics, blocks=blocks(8), **INTERPRETED
    )
    w = reference.dequantize(codes, scale, zero, **statics, k=512, dtype=jnp.float32)
    with pytest.raises(AssertionError):
        close(y, times(x, w, "float"), "16 bits")


@pytest.mark.parametrize("bits, unit", [(4, "int8"), (3, "bfloat16")])
def test_a_scale_that_is_no_number_spoils_its_column_alone(bits, unit):
    """Sums that are no numbers order the kernel's products too (`product._after`)."""
    arrays = made(np.random.default_rng(), bits, 3, 2048, 384, 256, "float32", "float32", False)
    x, codes, scale, zero = arrays
    options = {"bits": bits, "group_size": 256, "unit": unit, "blocks": Blocks(8, 1024, 384)}
    call = jax.jit(
        lambda scale: KERNELS["packed_matmul"].call(x, codes, scale, zero, **options, **INTERPRETED)
    )
    for wrong in (jnp.nan, -jnp.nan):
        assert_only_nan(call(scale.at[1, 5].set(wrong)).T, call(scale).T, [5])


def test_ternary_matmul():
    rng = np.random.default_rng()
    codes = layout.pack(jnp.array(rng.integers(-1, 2, (600, 130))), 2)
    x, scale = jnp.array(rng.normal(size=(3, 600)), jnp.float32), jnp.full((1, 1), 0.3)
    y = product(
        "ternary_matmul", x, codes, scale, group_size=600, activations="int8", blocks=blocks(3)
    )
    w = 0.3 * layout.unpack(codes, 2, 600)
    close(y, times(x, w, "int8"), "exact")


@pytest.mark.parametrize("case", [
    (2, 3, 520, 130, 128, "float32", "float32", False),
    (3, 8, 520, 130, 64, "float32", "float32", True),
    (8, 200, 600, 600, 600, "bfloat16", "float32", False),
    (4, 3, 2100, 130, 384, "float32", "float32", False),  # three steps, groups across them
], ids=str)  # fmt: skip
def test_packed_matmul_transposed(case):
    bits, m, k, n, group, x, scale, zero = case
    _, codes, scale, zero = made(np.random.default_rng(), bits, m, k, n, group, x, scale, zero)
    g = jnp.array(np.random.default_rng().normal(size=(m, n)), x)
    statics = {"bits": bits, "group_size": group, "k": k}
    y = product("packed_matmul_transposed", g, codes, scale, zero, **statics)
    w = reference.dequantize(codes, scale, zero, **statics, dtype=jnp.float32)
    exact = np.asarray(g, np.float64) @ np.asarray(w, np.float64).T
    close(y, exact, "16 bits" if x == "float32" else "bfloat16")


@pytest.mark.parametrize(
    "bits, m, k, whole", [(4, 3, 600, False), (3, 1, 512, True), (2, 16, 520, False)]
)
def test_codebook_matmul(bits, m, k, whole):
    rng = np.random.default_rng()
    values = rng.integers(-12, 13, 1 << bits) / 2 if whole else np.sort(rng.normal(size=1 << bits))
    x, codes, scale, _ = made(rng, bits, m, k, 130, 128, "float32", "float32", False)
    statics = {"table": tuple(values.tolist()), "bits": bits, "group_size": 128}
    kernel = KERNELS["codebook_matmul"]
    assert kernel.serves(x, codes, scale, **statics) == ""
    y = product("codebook_matmul", x, codes, scale, **statics, blocks=blocks(m))
    close(y, times(x, tables.dequantize(codes, scale, **statics, k=k), "float"), "16 bits")


@pytest.mark.parametrize("case", [
    (4, 3, 600, 130, 64, "bfloat16", "bfloat16"),
    (4, 600, 1100, 300, 96, "float32", "float16"),  # three tiles of g, two steps along k
    (4, 9, 520, 600, 16, "float16", "float32"),
    (4, 1, 520, 1030, 520, "float32", "float32"),  # a scale a column, three steps along n
    (3, 8, 2100, 130, 384, "float32", "float32"),  # groups across steps
    (2, 16, 300, 200, 128, "bfloat16", "float32"),
], ids=str)  # fmt: skip
def test_codebook_matmul_transposed(case):
    bits, m, k, n, group, dtype, scale = case
    rng = np.random.default_rng()
    _, codes, scale, _ = made(rng, bits, m, k, n, group, "float32", scale, False)
    g = jnp.array(rng.normal(size=(m, n)), dtype)
    values = np.sort(rng.normal(size=1 << bits))
    statics = {"table": tuple(values.tolist()), "bits": bits, "group_size": group, "k": k}
    assert KERNELS["codebook_matmul_transposed"].serves(g, codes, scale, **statics) == ""
    y = product("codebook_matmul_transposed", g, codes, scale, **statics)
    w = np.asarray(tables.dequantize(codes, scale, **statics), np.float64)
    close(y, np.asarray(g, np.float64) @ w.T, "bfloat16" if dtype == "bfloat16" else "16 bits")


@pytest.mark.parametrize("m, k, activations", [(3, 520, "float"), (8, 1024, "int8")])
def test_e8p_matmul(m, k, activations):
    """By table and signs, and transcoded to integers."""
    rng = np.random.default_rng()
    code = jnp.array(rng.integers(0, 1 << 16, (k // 8, 1, 130)))
    words, scale = lookup.pack(code, 16), jnp.full((1, 1), 0.7, jnp.float16)
    x = jnp.array(rng.normal(size=(m, k)), jnp.float32)
    w = np.asarray(e8p.decode(code[:, 0]), np.float64).reshape(k, -1) * float(scale[0, 0])
    options = {"activations": activations, "blocks": blocks(m)}
    y = product("e8p_matmul", x, words, None, scale, bits=2, **options)
    close(y, times(x, w, activations), kind(activations))
    integers = lattice.transcode(words, k)
    y = KERNELS["packed_matmul"].call(
        x, integers, scale.astype(jnp.float32) / 2, None, bits=4, group_size=k, **options,
        **INTERPRETED,
    )  # fmt: skip
    close(y + lattice.offset(x, scale, activations), times(x, w, activations), kind(activations))


def test_what_is_not_served():
    x, codes, scale, _ = made(
        np.random.default_rng(), 4, 1, 192, 8, 96, "float32", "float32", False
    )
    statics = {"bits": 4, "group_size": 96}
    assert "96" in KERNELS["packed_matmul"].serves(x, codes, scale, None, **statics)
    table = {"table": tuple(range(16)), "bits": 4, "group_size": 24, "k": 192}
    assert "24" in KERNELS["codebook_matmul_transposed"].serves(x, codes, scale, **table)
    assert KERNELS["additive_matmul"].serves() and KERNELS["hadamard"].serves()
