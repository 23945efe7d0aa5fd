"""Float8: codes are the bit patterns of e4m3 or e5m2 numbers."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.formats.scales import through
from jaxquant.formats.table import Scales, Table

DTYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclasses.dataclass(frozen=True)
class Float8(Table):
    """8-bit floats times a scale: nearest, ties to even, saturating (never NaN or infinity).

    Attributes:
      variant: "e4m3" (3 mantissa bits, up to 448) or "e5m2" (2 mantissa bits, up to 57344).
      group_size: consecutive rows (input channels) that share a scale; -1 or "channel" for one
        scale per output channel, "tensor" for one per matrix.
      scale_dtype: storage dtype of the scales; codes are chosen with the stored scale.
      pad: allow a group size that does not divide k; the last group is then short.

    Source: Micikevicius et al. 2022, arXiv:2209.05433.

    >>> import jax.numpy as jnp
    >>> f = Float8("e4m3")
    >>> f.dequantize(f.encode(jnp.array([[448.0], [-17.0], [0.3], [0.0]])), 4).ravel().tolist()
    [448.0, -16.0, 0.3125, 0.0]
    """

    variant: Literal["e4m3", "e5m2"] = "e4m3"
    group_size: int | Literal["channel", "tensor"] = -1
    scale_dtype: str = "float32"
    pad: bool = False

    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in DTYPES:
            raise ValueError(f"variant must be one of {tuple(DTYPES)}, got {self.variant!r}")

    trained: ClassVar[tuple[str, ...]] = ("scale",)  # arrays that healing may train

    @property
    def table(self) -> str:
        return DTYPES[self.variant]

    @property
    def largest(self) -> float:
        return float(jnp.finfo(self.table).max)

    def round(self, w: Float[Array, "... n"], grid: Scales) -> tuple[Array, Array]:
        """Return the nearest codes (int8) and their values; the grid broadcasts against w."""
        # The cast alone would turn values above the largest into NaN or infinity.
        near = through(jnp.clip(w / grid.scale, -self.largest, self.largest), self.table)
        code = jax.lax.bitcast_convert_type(near.astype(self.table), jnp.int8)
        return code, grid.scale * near
