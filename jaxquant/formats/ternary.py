"""Ternary codes -1, 0 and 1 in 2-bit words, with one scale per group."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols import OpArguments
from jaxquant.formats.integer import Grid, Integer
from jaxquant.formats.scales import as_stored
from pallas_kernels.codecs import layout


@dataclasses.dataclass(frozen=True)
class Ternary(Integer):
    """Codes {-1, 0, 1} times a scale, in the 2-bit words of `Integer`; five codes a byte on disk.

    The scale minimizes the squared error by alternation: choose the codes for the current scale,
    then set scale = <w, c> / <c, c>. Li et al. 2016, arXiv:1605.04711, solve this approximately in
    one step.

    Attributes:
      bits: always 2.
      symmetric: always True.
      group_size, scale_dtype, pad: see `Integer`; `mse` and `clip` have no effect.

    >>> import jax.numpy as jnp
    >>> f = Ternary(group_size=-1)
    >>> f.dequantize(f.encode(jnp.array([[2.0], [0.1], [-2.0], [0.0]])), 4).ravel().tolist()
    [2.0, 0.0, -2.0, 0.0]
    """

    bits: int = 2
    symmetric: bool = True

    storage: ClassVar[str] = "ternary"
    stretch: ClassVar[float] = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 2 or not self.symmetric:
            raise ValueError(
                "Ternary needs bits=2 and symmetric=True, its defaults; leave both out"
            )

    @property
    def limits(self) -> tuple[int, int]:
        return -1, 1

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        return (data["codes"], data["scale"]), {"group_size": self.rows_per_group(k)}

    def to_disk(self, data: dict[str, Array], k: int) -> dict[str, Array]:
        """Return the arrays of a checkpoint, with codes packed five to a byte (1.6 bits)."""
        return data | {"codes": layout.pack_base3(data["codes"], k)}

    def from_disk(self, kept: dict[str, Array], k: int) -> dict[str, Array]:
        """Invert `to_disk`."""
        return kept | {"codes": layout.unpack_base3(kept["codes"], k)}

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return "ternary_matmul, 2-bit words"

    def fit(self, w: Float[Array, "g n"]) -> Grid:
        axes = (-1, -2) if self.group_size == "tensor" else (-2,)

        def improve(_: int, scale: Array) -> Array:
            c = jnp.clip(jnp.round(w / jnp.where(scale > 0, scale, 1.0)), -1, 1)
            return jnp.sum(w * c, axes, keepdims=True) / jnp.maximum(
                jnp.sum(c * c, axes, keepdims=True), 1
            )

        scale = jnp.mean(jnp.abs(w), axes, keepdims=True)
        scale = jax.lax.fori_loop(0, 8, improve, scale)
        scale = as_stored(jnp.atleast_1d(scale.squeeze(axes)), self.scale_dtype)
        return Grid(scale, jnp.zeros(scale.shape, jnp.int32))
