"""Kernels to compile ahead of time for GPUs: a function, its arguments, weights of a pass."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import row_tiles
from pallas_kernels.codecs import layout
from pallas_kernels.gpu import KERNELS, contraction, packed, tiles
from tests.aot import real

K, N = 16384, 4096  # the loop must be a loop


class Case(NamedTuple):
    """A kernel of given shapes.

    Attributes:
      function: calls the op.
      args: shapes and dtypes of its arrays.
      kernel: its name in PTX.
      weights: that a program decodes in one pass of its loop.
      ceiling: instructions per weight allowed.
    """

    function: Callable
    args: tuple
    kernel: str
    weights: int
    ceiling: float


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    """Shape and dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)


HALF, ONE = partial(array, dtype=jnp.float16), array(1, 1, dtype=jnp.float32)


def integer(m, bits, ceiling, *, group=128, zero=False, activations="float", dtype=jnp.bfloat16):
    """A case of `packed_matmul`."""
    groups = K // group
    codes, scale = array(layout.words(K, bits), N), array(groups, N, dtype=jnp.float16)
    static = {"bits": bits, "group_size": group, "activations": activations}
    args = (
        array(m, K, dtype=dtype),
        codes,
        scale if groups > 1 else array(1, 1, dtype=jnp.float32),
    )
    args += (array(groups, layout.words(N, bits)) if zero else None,)
    shape = contraction.shape(args[0], activations)
    size = shape.columns * tiles.depth(layout.unit(bits)[0], group, K, activations, shape.depth)
    return Case(
        partial(packed.packed_matmul, **static), args, f"packed_matmul_{bits}", size, ceiling
    )


def other(op, m, arrays, kernel, columns, depth, ceiling=8, **static):
    """A case of an op of another format; a program decodes [depth, columns] in a pass."""
    x = array(m, K, dtype=jnp.bfloat16)
    return Case(partial(KERNELS[op].call, **static), (x, *arrays), kernel, columns * depth, ceiling)


def grouped(tokens, ceiling, *, k=2048, n=768, experts=128, bits=4, zero=False):
    """A case of `grouped_packed_matmul`: tokens that have 8 experts each, of Qwen3-30B-A3B."""
    m, groups, words = 8 * tokens, k // 128, layout.words(n, bits)
    args = (
        array(m, k, dtype=jnp.bfloat16), array(experts, layout.words(k, bits), n),
        HALF(experts, groups, n), array(experts, groups, words) if zero else None, array(experts),
    )  # fmt: skip
    call = partial(KERNELS["grouped_packed_matmul"].call, bits=bits, group_size=128)
    size = contraction.of_rows(row_tiles.size(m, experts)).columns * 128
    return Case(call, args, f"grouped_packed_matmul_{bits}", size, ceiling)


EIGHTS = tuple(i / 8 for i in range(-8, 8))
CODEBOOK = partial(
    other, "codebook_matmul", arrays=(array(K // 8, N), HALF(K // 128, N)),
    kernel="codebook_matmul_4", columns=128, depth=64, table=EIGHTS, bits=4, group_size=128,
)  # fmt: skip


def transposed(m, ceiling, k=8192, n=22016, dtype=jnp.bfloat16):
    """A case of `codebook_matmul_transposed` of NF4 in groups of 64."""
    static = {"table": EIGHTS, "bits": 4, "group_size": 64, "k": k}
    args = (array(m, n, dtype=dtype), array(k // 8, n), array(k // 64, n, dtype=jnp.float32))
    call = partial(KERNELS["codebook_matmul_transposed"].call, **static)
    return Case(call, args, "codebook_matmul_transposed_4", 64 * 32, ceiling)


E8P = partial(
    other, "e8p_matmul", arrays=(array(K // 16, N), None, ONE), kernel="e8p_matmul", columns=128,
    depth=128, bits=2,
)  # fmt: skip
TRELLIS = partial(
    other, "trellis_matmul", arrays=(array(K, N // 16), ONE), kernel="trellis_matmul",
    columns=256, depth=16, rates=(2,), code="mul1",
)  # fmt: skip
PLANES = (
    array(K // 8, N), array(K // 4, N), array(1, N, dtype=jnp.uint8), None, array(4096),
    array(4096, dtype=jnp.uint8),
)  # fmt: skip
ADDITIVE = partial(other, "additive_matmul", kernel="additive_matmul", columns=128, group=8)
CASES = {
    "packed 2 bits, M 8": integer(8, 2, 2.2),
    "packed 2 bits, M 16": integer(16, 2, 2.2),
    "packed 2 bits, M 32": integer(32, 2, 9),
    "packed 2 bits, one scale": integer(8, 2, 2.2, group=K),
    "packed 2 bits, zero points": integer(8, 2, 2.2, zero=True),
    "packed 2 bits, float32": integer(8, 2, 2.2, dtype=jnp.float32),
    "packed 2 bits, int8": integer(8, 2, 2.2, activations="int8"),
    "packed 2 bits, int8/256": integer(8, 2, 2.2, activations="int8/256"),
    "packed 2 bits, M 64": integer(64, 2, 10),
    "packed 2 bits, M 512": integer(512, 2, 10),
    "packed 3 bits, M 8": integer(8, 3, 9),
    "packed 4 bits, M 8": integer(8, 4, 4.4),
    "packed 4 bits, int8": integer(8, 4, 4.4, activations="int8"),
    "packed 8 bits, M 8": integer(8, 8, 8.8),
    "grouped 4 bits, 1 token": grouped(1, 4.4),
    "grouped 4 bits, zero points, 64 tokens": grouped(64, 4.4, zero=True),
    "grouped 2 bits, 256 tokens": grouped(256, 2.6, bits=2),
    "codebook 4 bits, M 8": CODEBOOK(8),
    "codebook 4 bits, M 16": CODEBOOK(16),
    "codebook 4 bits, M 64": CODEBOOK(64, columns=64, ceiling=12),
    "codebook 4 bits transposed, M 1": transposed(1, 9),
    "codebook 4 bits transposed, M 512": transposed(512, 14),
    "codebook 4 bits transposed, M 512, float32": transposed(512, 18, 4096, 11008, jnp.float32),
    "e8p 2 bits, M 64": E8P(64, columns=64, ceiling=18),
    "trellis 2 bits, L 16, M 64": TRELLIS(64, L=16),
    "e8p 2 bits, M 8": E8P(8),
    "e8p 2 bits, M 16": E8P(16),
    "trellis 2 bits, L 16, M 8": TRELLIS(8, L=16),
    "trellis 2 bits, L 12, M 16": TRELLIS(16, L=12),
    **{
        f"float planes 4 bits, M {m}": other(
            "float_planes_matmul",
            m,
            PLANES,
            "float_planes_matmul_4",
            contraction.of_rows(m).columns,
            128,
            ceiling,
            dtype="bfloat16",
            bits=4,
        )
        for m, ceiling in ((8, 5.5), (16, 7), (64, 14))
    },
    "additive 2 x 8 bits, M 8": ADDITIVE(
        8, (array(K // 16, N), HALF(2, 256, 8), HALF(1, N)), bits=8, depth=64
    ),
    "additive 1 x 16 bits, M 8": ADDITIVE(
        8, (array(K // 16, N), HALF(1, 1 << 16, 8), HALF(1, N)), bits=16, depth=128
    ),
}


def user(k: int, n: int, m: int, format: str, kernel: str, **options) -> Case:
    """A product as a user asks for it, of which no more is judged than that it compiles."""
    function, args = real.product(k=k, n=n, m=m, format=format, kernels="cuda", **options)
    return Case(function, args, kernel, 0, float("inf"))


# Widths of real models, that no tile divides among them.
WIDTHS = {
    f"{k} x {n}, M {m}, {format}": user(k, n, m, format, kernel)
    for k, n, m, format, kernel in (
        (7168, 2560, 1, "2 bits", "packed_matmul_2"),
        (4544, 4544, 8, "2 bits", "packed_matmul_2"),
        (576, 5120, 128, "4 bits", "packed_matmul_4"),
        (5376, 896, 1, "4 bits, zero points", "packed_matmul_4"),
        (2880, 2304, 128, "3 bits", "packed_matmul_3"),
        (896, 576, 8, "8 bits", "packed_matmul_8"),
        (5120, 4544, 1, "ternary", "packed_matmul_2"),
        (2304, 2880, 8, "NF4", "codebook_matmul_4"),
        (4544, 576, 1, "E8P", "e8p_matmul"),
        (53248, 16384, 8, "4 bits", "packed_matmul_4"),
    )
}
WIDTHS["2304 x 2880, M 128, NF4, backward"] = user(
    2304, 2880, 128, "NF4", "codebook_matmul_transposed_4", backward=True
)
