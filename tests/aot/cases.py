"""What is compiled for TPUs: every kernel, at a width of real layers."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs import layout
from pallas_kernels.tpu import (
    blocks,
    float_planes,
    lattice,
    packed,
    table,
    table_transposed,
    transposed,
    trellis,
)

NF4 = tuple(np.round(np.sinh(np.linspace(-1.8, 1.8, 16)) / np.sinh(1.8), 4).tolist())
N = 1024  # columns: those of a step


class Case(NamedTuple):
    """A kernel and what it is called with.

    Attributes:
      build: name of a function below.
      bits: that the memory holds of a weight.
      floor: least ratio of its rate to what saturates the memory, by chip.
      statics: of `build`.
      columns: of a step.
      spilling: chips on which it is known to spill.
    """

    build: str
    bits: int
    floor: dict[str, float]
    statics: dict
    columns: int = N
    spilling: tuple[str, ...] = ()


_FLOOR = {"v5e": 0.8, "v5p": 0.8, "v6e": 0.8, "tpu7x": 0.4}
_FLOOR_4 = dict.fromkeys(_FLOOR, 0.9)
_FLOOR_TRELLIS = {"v5e": 0.6, "v5p": 0.6, "v6e": 0.6, "tpu7x": 0.2}
_A8 = {"activations": "int8"}
_ONE = {"group": 1 << 20}  # one scale a column
CASES = {
    "packed_matmul 2 bits A8 g128": Case("packed_matmul", 2, _FLOOR, {"bits": 2, **_A8}),
    "packed_matmul 2 bits A16 g128": Case(
        "packed_matmul", 2, {**_FLOOR, "tpu7x": 0.35}, {"bits": 2}
    ),
    "packed_matmul 2 bits A16": Case("packed_matmul", 2, _FLOOR, {"bits": 2, **_ONE}),
    "ternary_matmul A8": Case("ternary_matmul", 2, _FLOOR, {**_A8, **_ONE}),
    "packed_matmul 4 bits A8 g128": Case("packed_matmul", 4, _FLOOR_4, {"bits": 4, **_A8}),
    "packed_matmul 4 bits A16 g128": Case(
        "packed_matmul", 4, {**_FLOOR_4, "tpu7x": 0.75}, {"bits": 4}
    ),
    "packed_matmul 3 bits A16 g128": Case("packed_matmul", 3, {}, {"bits": 3}),
    "packed_matmul 8 bits A16 g128": Case("packed_matmul", 8, {}, {"bits": 8}),
    "e8p_matmul A16": Case("e8p_matmul", 2, {}, {}),
    "e8p_matmul transcoded A16": Case("packed_matmul", 4, _FLOOR_4, {"bits": 4, **_ONE}),
    "float_planes_matmul 4 bits A16": Case(
        "float_planes_matmul", 12, {"v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 0.7}, {}
    ),
    "trellis_matmul vpu A8": Case("trellis_matmul", 2, _FLOOR_TRELLIS, _A8, 2048),
    "trellis_matmul vpu A16": Case(
        "trellis_matmul", 2, _FLOOR_TRELLIS, {}, 2048, spilling=("tpu7x",)
    ),
    "codebook_matmul 4 bits A16 g128": Case("codebook_matmul", 4, {}, {"bits": 4}),
}


def _arrays(m: int, k: int, bits: int, group: int) -> list:
    return [
        jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
        jax.ShapeDtypeStruct((layout.words(k, bits), N), jnp.int32),
        jax.ShapeDtypeStruct((-(-k // group), N), jnp.float32),
    ]


def packed_matmul(m, k, bits, group=128, **options):
    f = partial(packed.packed_matmul, zero=None, bits=bits, group_size=group)
    return partial(f, blocks=blocks.Blocks(m, k, N), **options), _arrays(m, k, bits, group)


def ternary_matmul(m, k, group=128, **options):
    f = partial(packed.ternary_matmul, group_size=group, blocks=blocks.Blocks(m, k, N))
    return partial(f, **options), _arrays(m, k, 2, group)


def codebook_matmul(m, k, bits, group=128, **options):
    f = partial(table.codebook_matmul, table=NF4, bits=bits, group_size=group)
    return partial(f, blocks=blocks.Blocks(m, k, N), **options), _arrays(m, k, bits, group)


def e8p_matmul(m, k, **options):
    def f(x, codes, scale):
        return lattice.e8p_matmul(x, codes, None, scale, blocks=blocks.Blocks(m, k, N), **options)

    x, codes, _ = _arrays(m, k, 2, k)
    return f, [x, codes, jax.ShapeDtypeStruct((1, 1), jnp.float32)]


def float_planes_matmul(m, k, unit):
    """Of bfloat16 weights, whatever the chip's unit of codes is."""
    shapes = [
        jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
        jax.ShapeDtypeStruct((layout.words(k, 4), N), jnp.int32),
        jax.ShapeDtypeStruct((layout.words(k, 8), N), jnp.int32),
        jax.ShapeDtypeStruct((1, N), jnp.uint8),
    ]
    return partial(float_planes.provisional, blocks=blocks.Blocks(m, k, N)), shapes


def trellis_matmul(m, k, unit, **options):
    f = partial(trellis.trellis_matmul, rates=(2,), L=16, code="vpu")
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    codes = jax.ShapeDtypeStruct((k, 2048 // 16), jnp.int32)
    f = partial(f, blocks=trellis.Blocks(m, k, 512), **options)
    return f, [x, codes, jax.ShapeDtypeStruct((1, 1), jnp.float32)]


def grouped_packed_matmul(m, k, n, experts, bits, group=128, zero=False, **options):
    """Of a mixture of experts: m rows, each of which meets the matrix of its expert."""
    groups, words = -(-k // group), layout.words(n, bits)
    shapes = [
        jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
        jax.ShapeDtypeStruct((experts, layout.words(k, bits), n), jnp.int32),
        jax.ShapeDtypeStruct((experts, groups, n), jnp.float16),
        jax.ShapeDtypeStruct((experts, groups, words), jnp.int32) if zero else None,
        jax.ShapeDtypeStruct((experts,), jnp.int32),
    ]
    return partial(packed.grouped_packed_matmul, bits=bits, group_size=group, **options), shapes


def packed_matmul_transposed(m, k, bits, group=128):
    f = partial(transposed.packed_matmul_transposed, zero=None, bits=bits, group_size=group, k=k)
    _, codes, scale = _arrays(m, k, bits, group)
    return f, [jax.ShapeDtypeStruct((m, N), jnp.bfloat16), codes, scale]


def codebook_matmul_transposed(m, k, bits, group=64, n=N):
    f = partial(table_transposed.codebook_matmul_transposed, bits=bits, group_size=group, k=k)
    codes = jax.ShapeDtypeStruct((layout.words(k, bits), n), jnp.int32)
    scale = jax.ShapeDtypeStruct((-(-k // group), n), jnp.float32)
    g = jax.ShapeDtypeStruct((m, n), jnp.bfloat16)
    return partial(f, table=NF4[: 1 << bits]), [g, codes, scale]
