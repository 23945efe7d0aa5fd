"""Products with packed integer codes, including ternary ones, and zero points."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import activations as forms
from pallas_kernels import row_tiles
from pallas_kernels.codecs import layout
from pallas_kernels.tpu import planes, unpack
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.product import fitting, product, tile


def packed_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    zero: Int32[Array, "g wn"] | None,
    *,
    bits: int,
    group_size: int,
    activations: str = "float",
    unit: str = planes.INT8,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Return x @ (scale * (code - zero)); see `reference.packed_matmul`.

    Args:
      x, codes, scale, zero, bits, group_size, activations: as in `ops.packed_matmul`.
      unit: dtype of the matrix unit's operands, one of `planes.UNITS`: "int8" where supported; on
        TPU7x "float8_e4m3fn", but "bfloat16" at 8 bits.
      blocks: sizes of the blocks; None computes them.
      interpret: whether to run in interpret mode, on any device. A jitted function must then take
        the arrays as arguments: XLA for CPUs (JAX 0.10) folds constants of int4 wrongly.
    """
    y = product(
        x, (codes,), scale, unpack.decoder(bits, unit, f"packed_matmul_{bits}"),
        group=group_size, activations=activations, unit=unit, blocks=blocks, interpret=interpret,
    )  # fmt: skip
    if zero is None:
        return y
    return y - _zeros(x, scale, zero, bits, group_size, activations)


def ternary_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    *,
    group_size: int,
    **options,
) -> Float[Array, "m n"]:
    """Return x @ (scale * code) for 2-bit words of codes -1, 0 and 1.

    Args:
      x, codes, scale, group_size: as in `ops.ternary_matmul`.
      **options: activations, unit, blocks and interpret, as in `packed_matmul`.
    """
    return packed_matmul(x, codes, scale, None, bits=2, group_size=group_size, **options)


def grouped_packed_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "e w n"],
    scale: Float[Array, "e g n"],
    zero: Int32[Array, "e g wn"] | None,
    group_sizes: Int32[Array, "e"],
    *,
    bits: int,
    group_size: int,
    activations: str = "float",
    unit: str = planes.INT8,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Return the products of rows sorted by expert with the matrices of their experts.

    Args:
      x: activations [m, k].
      codes, scale, zero: as in `ops.packed_matmul`, each with a leading axis of experts.
      group_sizes: number of rows of each expert.
      bits, group_size, activations, unit, interpret: as in `packed_matmul`.
    """
    decoder = unpack.decoder(bits, unit, f"grouped_packed_matmul_{bits}")
    (m, k), n, groups = x.shape, codes.shape[-1], scale.shape[1]
    facts = {"groups": groups, "group": group_size, "activations": activations, "unit": unit}
    rows = tile(m, len(codes), x.dtype, decoder, **facts)
    tiles = row_tiles.cut(group_sizes, m, rows)
    x, scale = tiles.gathered(x), scale[tiles.experts]
    blocks = fitting(rows, k, n, x.dtype, decoder, **facts)._replace(m=rows)
    y = product(
        x.reshape(-1, k), (codes,), scale, decoder, group=group_size, activations=activations,
        unit=unit, blocks=blocks, tiles=tiles, interpret=interpret,
    ).reshape(*x.shape[:2], n)  # fmt: skip
    if zero is not None:
        of_tile = partial(_zeros, bits=bits, group_size=group_size, activations=activations)
        y = y - jax.vmap(of_tile)(x, scale, zero[tiles.experts])
    return tiles.scattered(y)


def _zeros(
    x: Array, scale: Array, zero: Array, bits: int, group_size: int, activations: str
) -> Float[Array, "m n"]:
    """Return the contribution of zero points: sum over groups of (sum of x) * scale * zero.

    It takes 1 / group_size of the product's work.
    """
    groups, n = scale.shape
    z = layout.unpack(zero.T, bits, n).T * scale.astype(jnp.float32)
    x = forms.rounded(x, activations).astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, groups * group_size - x.shape[1])))
    sums = jnp.sum(x.reshape(len(x), groups, group_size), axis=-1)
    return jnp.matmul(sums, z, precision="highest")
