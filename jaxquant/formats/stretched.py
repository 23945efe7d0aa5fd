"""Stretched codes: two bits without a zero, evenly spread about it."""

import dataclasses
from typing import ClassVar, Literal

from jaxquant.formats.table import Table


@dataclasses.dataclass(frozen=True)
class Stretched(Table):
    """Codes 0 to 3 for -3/4, -1/4, 1/4 and 3/4 times a scale, which begins as the absmax.

    Attributes:
      group_size: rows of k that share a scale; -1 (or "channel") one per output, "tensor" one
        per matrix.
      scale_dtype: storage of the scales; codes are chosen with the stored scale.
      pad: allow a group size that does not divide k (the last group is short).

    Source: the two-bit grid of ParetoQ (Liu et al. 2025, arXiv:2502.02631). We differ: ties go to
    the lower value, so that a weight of exactly 0 becomes -1/4, there 1/4.

    >>> import jax.numpy as jnp
    >>> f = Stretched()
    >>> f.dequantize(f.encode(jnp.array([[1.0], [0.5], [0.1], [-0.5]])), 4).ravel().tolist()
    [0.75, 0.25, 0.25, -0.75]
    """

    group_size: int | Literal["channel", "tensor"] = -1
    scale_dtype: str = "float16"
    pad: bool = False

    bits: ClassVar[int] = 2
    trained: ClassVar[tuple[str, ...]] = ("scale",)  # what healing may train
    table: ClassVar[tuple[float, ...]] = (-0.75, -0.25, 0.25, 0.75)
    largest: ClassVar[float] = 1.0
    stretch: ClassVar[float] = 1.0
