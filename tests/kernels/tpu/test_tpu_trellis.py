"""Parity of the TPU's trellis kernel with its reference, interpreted on the CPU.

Budgets, of the mean square of an output (NMSE) and of the largest (max): int8 activations are
exact; floats are taken to 16 bits of a row's largest entry, of which there is one 20 times the
others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations
from pallas_kernels.codecs import trellis as codes_
from pallas_kernels.tpu import KERNELS, trellis
from tests.support.operands import assert_rows_hold

NMSE = {"int8": 1e-11, "float": 1e-6}
MAX = {"int8": 1e-5, "float": 3e-3}
# m, k, n, blocks of rows with a scale, activations, x: every m; k and n ragged.
CASES = [
    (1, 144, 160, 1, "float", "bfloat16"),
    (3, 16, 2048 + 48, 1, "int8", "float32"),
    (8, 1200, 32, 1, "float", "float32"),  # two steps, of which one is cut short
    (16, 256, 16, 2, "float", "float16"),
    (64, 400, 80, 1, "int8", "bfloat16"),
    (200, 272, 48, 1, "float", "float32"),  # seven tiles of rows
]


def operands(m, k, n, blocks, form, dtype, seed=0):
    """x, codes and scales, drawn afresh; and the op's statics."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k))
    x[0, 0] *= 20
    if m > 1:
        x[1] = 0
    words = rng.integers(-(2**31), 2**31, (k, n // 16)).astype(np.int32)
    scale = rng.uniform(0.5, 1.5, (blocks, 1))
    static = {"rates": (2,) * blocks, "L": 16, "code": "vpu", "activations": form}
    return (jnp.asarray(x, dtype), jnp.asarray(words), jnp.asarray(scale, jnp.float32)), static


def kernel(static):
    return jax.jit(lambda *a: trellis.trellis_matmul(*a, **static, interpret=True))


def exact(arrays, static):
    """In float64, of x as the activations make it and the decoded matrix."""
    x, words, scale = arrays
    kept = {name: static[name] for name in ("rates", "L", "code")}
    w = codes_.dequantize(words, scale, **kept, k=x.shape[1])
    x = activations.rounded(x.astype(jnp.float32), static["activations"])
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


def errors(got, want):
    return np.mean((got - want) ** 2) / np.mean(want**2), abs(got - want).max() / abs(want).max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"m={case[0]}")
def test_the_kernel_is_its_reference(case):
    arrays, static = operands(*case)
    assert KERNELS["trellis_matmul"].serves(*arrays, **static) == ""
    (x, *weights), run = arrays, kernel(static)
    got, want = np.asarray(run(*arrays), np.float64), exact(arrays, static)
    assert_rows_hold(lambda x: run(x, *weights), x)
    assert got.shape == want.shape
    nmse, largest = errors(got, want)
    assert nmse < NMSE[case[4]] and largest < MAX[case[4]]


def test_the_budgets_tell_a_wrong_variant():
    """The last word's successors without their rotation by a byte; and activations of 8 bits."""
    arrays, static = operands(8, 144, 48, 1, "float", "float32")
    want = exact(arrays, static)
    x, words, scale = arrays
    fields = jnp.asarray(words).view(jnp.uint32).reshape(-1, 16, words.shape[1])
    moved = fields.at[:, 0].set((fields[:, 0] >> 8) | (fields[:, 0] << 24))
    wrong = exact((x, moved.reshape(words.shape).view(jnp.int32), scale), static)
    assert errors(wrong, want)[0] > 1e-2
    assert errors(exact(arrays, {**static, "activations": "int8"}), want)[0] > NMSE["float"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"code": "mul1"}, "only the trellis code 'vpu'"),
        ({"L": 12}, "L = 16 and 2 bits"),
        ({"rates": (4,)}, "L = 16 and 2 bits"),
        ({"activations": "int8/256"}, "'float', 'int8' and 'codes'"),
        ({"rates": (2, 2, 2)}, "not multiples of 128"),
    ],
)
def test_what_it_does_not_serve(change, reason):
    arrays, static = operands(3, 144, 48, 1, "float", "float32")
    assert reason in KERNELS["trellis_matmul"].serves(*arrays, **{**static, **change})
