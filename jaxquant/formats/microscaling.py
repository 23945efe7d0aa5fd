"""Microscaling: 4-bit e2m1 floats in short blocks along k, with one 8-bit scale per block."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.fields import check_fields
from jaxquant.core.magnitude import shifted
from jaxquant.formats.scales import RESCALE, as_stored, check_scales, check_wide, lost, rescaled
from jaxquant.formats.table import Scales, Table

# A code holds the sign, two exponent bits and one mantissa bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclasses.dataclass(frozen=True)
class Microscaling(Table):
    """Base of formats that store e2m1 floats in short blocks.

    Attributes:
      pad: allow a number of rows that the block size does not divide; the last block is then short.
    """

    pad: bool = False

    bits: ClassVar[int] = 4
    group_size: ClassVar[int]  # type: ignore[override]
    table: ClassVar[tuple[float, ...]] = E2M1

    __post_init__ = check_fields

    def rows_per_group(self, k: int) -> int:
        if k % self.group_size and not self.pad:
            raise ValueError(
                f"{type(self).__name__} has blocks of {self.group_size} rows, which do not divide "
                f"k = {k}; use pad=True, or a format with another group size"
            )
        return self.group_size


@dataclasses.dataclass(frozen=True)
class MXFP4(Microscaling):
    """e2m1 floats in blocks of 32 with a power-of-two scale (e8m0): 4.25 bits per weight.

    The scale is 2^(floor(log2 max|w|) - 2), so the largest magnitude of a block lands in [4, 8)
    units; values above 6 saturate.

    Attributes:
      pad: allow a k that 32 does not divide; the last block is then short.

    Source: OCP Microscaling Formats (MX) v1.0, 2023. This implementation differs from the
    specification: scales below 2^-126 are not used, since they are subnormal in float32.

    >>> import jax.numpy as jnp
    >>> f = MXFP4(pad=True)
    >>> f.dequantize(f.encode(jnp.array([[0.7], [-0.3], [0.05], [0.0]])), 4).ravel().tolist()
    [0.75, -0.25, 0.0625, 0.0]
    """

    group_size: ClassVar[int] = 32
    scale_dtype: ClassVar[str] = "float8_e8m0fnu"

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if scales lose precision in their dtype on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        return check_scales(self.groups(w), 4.0, self.bits, self.scale_dtype, RESCALE)

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        scale = as_stored(shifted(data["scale"], e), self.scale_dtype)
        return data | {"scale": scale.astype(self.scale_dtype)}

    def wanted(self, absmax: Float[Array, "g n"]) -> Float[Array, "g n"]:
        exponent = jax.lax.bitcast_convert_type(absmax, jnp.int32) & 0x7F800000
        return jax.lax.bitcast_convert_type(exponent, jnp.float32) / 4


@dataclasses.dataclass(frozen=True)
class NVFP4(Microscaling):
    """e2m1 floats in blocks of 16 with an e4m3 scale, and a float32 scale per matrix: 4.5 bits.

    The matrix scale is max|w| / (6 * 448). The scale of a block is max|w_block| / 6 in units of the
    matrix scale, so the largest weight of the matrix is exact.

    Attributes:
      pad: allow a k that 16 does not divide; the last block is then short.

    Source: NVIDIA, Pretraining large language models with NVFP4, 2025, arXiv:2509.25149.

    >>> import jax.numpy as jnp
    >>> f = NVFP4(pad=True)
    >>> f.dequantize(f.encode(jnp.array([[6.0], [-0.9], [2.6], [0.0]])), 4).ravel().tolist()
    [6.0, -1.0, 3.0, 0.0]
    """

    group_size: ClassVar[int] = 16
    scale_dtype: ClassVar[str] = "float32"
    block_dtype: ClassVar[str] = "float8_e4m3fn"

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if scales lose precision in their dtype on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        groups, info = self.groups(w), jnp.finfo(self.block_dtype)
        least = groups.max() * float(info.tiny) / float(info.max)
        return check_wide(w) or lost(groups, least, self.block_dtype, "use another format")

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        return rescaled(data, e, "matrix_scale")

    def fit(self, w: Float[Array, "g n"]) -> Scales:
        raise ValueError(
            "NVFP4 has a scale for the whole matrix, so its groups cannot be fitted "
            "one at a time: use LDLQ(act_order=True)"
        )

    def stored(self, scale: Float[Array, "g n"]) -> Scales:
        most = float(jnp.finfo(self.block_dtype).max)
        matrix = as_stored(jnp.max(scale, keepdims=True) / most, self.scale_dtype)
        block = as_stored(scale / matrix, self.block_dtype)
        parts = {"block": block, "matrix": jnp.broadcast_to(matrix, (len(scale), 1))}
        return Scales(block * matrix, parts)

    def pack_scales(self, grid: Scales) -> dict[str, Array]:
        return {
            "scale": grid.parts["block"].astype(self.block_dtype),
            "matrix_scale": grid.parts["matrix"][:1],
        }

    def scales(self, data: dict[str, Array]) -> Float[Array, "... g n"]:
        return data["scale"].astype(jnp.float32) * data["matrix_scale"]
