"""Stretched codes: a 2-bit grid without zero, symmetric about it."""

import dataclasses
from typing import ClassVar, Literal

from jaxquant.formats.table import Table


@dataclasses.dataclass(frozen=True)
class Stretched(Table):
    """Codes 0 to 3 for -3/4, -1/4, 1/4 and 3/4 times a scale, initially the largest magnitude.

    Attributes:
      group_size: consecutive rows (input channels) that share a scale; -1 or "channel" for one
        scale per output channel, "tensor" for one per matrix.
      scale_dtype: storage dtype of the scales; codes are chosen with the stored scale.
      pad: allow a group size that does not divide k; the last group is then short.

    Source: the 2-bit grid of ParetoQ (Liu et al. 2025, arXiv:2502.02631). Ties round to the even
    code as in its released code, so a weight of exactly 0 becomes 1/4 times the scale.

    >>> import jax.numpy as jnp
    >>> f = Stretched()
    >>> f.dequantize(f.encode(jnp.array([[1.0], [0.5], [0.0], [-0.5]])), 4).ravel().tolist()
    [0.75, 0.25, 0.25, -0.75]
    """

    group_size: int | Literal["channel", "tensor"] = -1
    scale_dtype: str = "float16"
    pad: bool = False

    bits: ClassVar[int] = 2
    trained: ClassVar[tuple[str, ...]] = ("scale",)  # arrays that healing may train
    table: ClassVar[tuple[float, ...]] = (-0.75, -0.25, 0.25, 0.75)
    largest: ClassVar[float] = 1.0
    stretch: ClassVar[float] = 1.0
