"""Products with packed integer codes, with ternary ones, and what zero points add."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import activations as forms
from pallas_kernels.codecs import layout
from pallas_kernels.tpu import planes, unpack
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.product import product


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
    """x @ (scale * (code - zero)); see `reference.packed_matmul`.

    Args:
      unit: type of the matrix unit's operands, one of `planes.UNITS`: "int8" where there is such
        a unit; on TPU7x "float8_e4m3fn", but "bfloat16" at 8 bits.
      blocks: of the grid, by closed form if None.
      interpret: run it by XLA, anywhere.
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
    """x @ (scale * code) for 2-bit words of codes -1, 0, 1. Options as of `packed_matmul`."""
    return packed_matmul(x, codes, scale, None, bits=2, group_size=group_size, **options)


def _zeros(
    x: Array, scale: Array, zero: Array, bits: int, group_size: int, activations: str
) -> Float[Array, "m n"]:
    """sum over groups of (sum of x) * scale * zero: 1 / group_size of the product's work."""
    groups, n = scale.shape
    z = layout.unpack(zero.T, bits, n).T * scale.astype(jnp.float32)
    x = forms.rounded(x, activations).astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, groups * group_size - x.shape[1])))
    sums = jnp.sum(x.reshape(len(x), groups, group_size), axis=-1)
    return jnp.matmul(sums, z, precision="highest")
