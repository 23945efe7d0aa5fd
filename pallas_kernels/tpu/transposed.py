"""g @ w.T on the packed words of w: the cotangent of x, without a floating-point copy of w.

Scales vary along n, which is summed over here, so they multiply g, once for each group of rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import activations as forms
from pallas_kernels.codecs import layout
from pallas_kernels.tpu import planes, unpack
from pallas_kernels.tpu.blocks import DEPTH, LANES
from pallas_kernels.tpu.product import Decoder, by_slice, sliced

_NT = (((1,), (1,)), ((), ()))
ROWS = 128  # rows of g at a time
COLUMNS = 512  # columns of w in a step
K = 1024  # rows of w in a step


def packed_matmul_transposed(
    g: Float[Array, "m n"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    zero: Int32[Array, "g wn"] | None,
    *,
    bits: int,
    group_size: int,
    k: int,
    interpret: bool = False,
) -> Float[Array, "m k"]:
    """Return g @ (scale * (code - zero)).T; see "packed_matmul_transposed" in `reference.OPS`.

    Scaled g is rounded to 16 bits (to 8, as in the reference, if it is bfloat16).

    Args:
      g: [m, n], float32, bfloat16 or float16.
      codes, scale, zero, bits, group_size: as in `ops.packed_matmul`.
      k: number of rows of w.
      interpret: whether to run in interpret mode, on any device.
    """
    g, factor = forms.finite_rows(g)
    m, n = g.shape
    groups = scale.shape[0]
    group = group_size if groups > 1 else 1 << 20
    rows = min(ROWS, -(-m // 8) * 8)
    block = min(K, -(-k // DEPTH) * DEPTH)
    columns = min(COLUMNS, -(-n // LANES) * LANES)
    grid = (-(-m // rows), -(-k // block), -(-n // columns))
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (groups, n))
    padding = grid[2] * columns - n
    padded = jnp.pad(g, ((0, grid[0] * rows - m), (0, padding)))
    decoder = unpack.decoder(bits, planes.BFLOAT16, "")
    size, parts = sliced(group, decoder._replace(longest=256))
    # Padded, since they are small and memory past the end may hold infinities.
    scales = jnp.pad(scale, ((0, 0), (0, padding)))
    scales, per = by_slice(scales, group, size, block // size, grid[1])
    place = jnp.arange(block, dtype=jnp.int32)[None]
    place = decoder.order(place) if decoder.order else place
    body = partial(_body, decoder=decoder, grouped=groups > 1, size=size, parts=parts)
    y = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, columns), lambda i, j, s: (i, s)),
            pl.BlockSpec((block * bits // 32, columns), lambda i, j, s: (j, s)),
            pl.BlockSpec((per, 1, columns), lambda i, j, s: (j * (groups > 1), 0, s)),
            pl.BlockSpec((1, block), lambda i, j, s: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, block), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, grid[1] * block if decoder.order else k), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            bytes_accessed=codes.size * 4 + grid[1] * g.size * g.dtype.itemsize + 4 * m * k,
            transcendentals=0,
        ),
        name=f"packed_matmul_transposed_{bits}",
        interpret=interpret,
    )(padded, codes, scales, place % size // (size // parts))
    if decoder.order:
        y = jnp.take(y.reshape(m, -1, block), jnp.argsort(place[0]), axis=-1).reshape(m, -1)
    y = y[:, :k] * factor
    if zero is None:
        return y
    z = layout.unpack(zero.T, bits, n).T * scale
    sums = jnp.matmul(g.astype(jnp.float32), z.T, precision="highest")
    return y - jnp.repeat(sums, group_size if groups > 1 else k, axis=1)[:, :k]


def _body(
    g_ref, w_ref, s_ref, owner_ref, o_ref, *, decoder: Decoder, grouped: bool, size: int,
    parts: int,
):  # fmt: skip
    step = pl.program_id(2)
    bits, factor = decoder.bits[0], decoder.weights[0]
    for at in range(0, o_ref.shape[1], size):
        part = slice(at, at + size)
        (w,) = decoder.planes([w_ref[at * bits // 32 : (at + size) * bits // 32]], [])
        total = jnp.zeros((o_ref.shape[0], size), jnp.float32)
        for i in range(parts):
            scale = s_ref[at // size * parts + i if grouped else 0]
            scaled = g_ref[...].astype(jnp.float32) * (scale * factor)
            product = _product(scaled, w, g_ref.dtype)
            total = jnp.where(owner_ref[:, part] == i, product, total) if parts > 1 else product

        @pl.when(step == 0)
        def _(total=total, part=part) -> None:
            o_ref[:, part] = total

        @pl.when(step > 0)
        def _(total=total, part=part) -> None:
            o_ref[:, part] += total


def _product(g: Float[Array, "m n"], w: Array, dtype: jnp.dtype) -> Float[Array, "m k"]:
    """Return the product, with g split into two bfloat16 parts; one if it was bfloat16."""
    high = g.astype(jnp.bfloat16)
    terms = [high]
    if dtype != jnp.bfloat16:
        terms.append((g - high.astype(jnp.float32)).astype(jnp.bfloat16))
    product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    return sum(product(term, w, _NT) for term in terms)
