"""What is compiled: every kernel at the shapes of a decoder layer."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.tpu import blocks as choice
from pallas_kernels.tpu import packed


def packed_matmul(m, k, n, bits, group, activations="float", unit="int8", dtype="bfloat16", zero=False, scale="float32", blocks=None):
    a = jax.ShapeDtypeStruct
    g = -(-k // group)
    args = [a((m, k), jnp.dtype(dtype)), a((layout.words(k, bits), n), jnp.int32), a((g, n), jnp.dtype(scale)),
            a((g, layout.words(n, bits)), jnp.int32) if zero else None]
    f = partial(packed.packed_matmul, bits=bits, group_size=group, activations=activations, unit=unit, blocks=blocks and choice.Blocks(*blocks))
    return f, args


def e8p_matmul(m, k, n, activations="float", unit="int8", dtype="bfloat16", blocks=None, group=0):
    from pallas_kernels.tpu import lattice
    a = jax.ShapeDtypeStruct
    args = [a((m, k), jnp.dtype(dtype)), a((k // 16, n), jnp.int32), a((1, 1), jnp.float16)]
    f = lambda x, c, s: lattice.e8p_matmul(x, c, None, s, bits=2, activations=activations, unit=unit, blocks=blocks and choice.Blocks(*blocks))
    return f, args

def codebook_matmul(m, k, n, bits, group, activations="float", unit="int8", dtype="bfloat16", blocks=None, table=None):
    from pallas_kernels.tpu import table as tb
    a = jax.ShapeDtypeStruct
    g = -(-k // group)
    args = [a((m, k), jnp.dtype(dtype)), a((layout.words(k, bits), n), jnp.int32), a((g, n), jnp.float32)]
    f = lambda x, c, s: tb.codebook_matmul(x, c, s, table=tuple(table), bits=bits, group_size=group, activations=activations, unit=unit, blocks=blocks and choice.Blocks(*blocks))
    return f, args
