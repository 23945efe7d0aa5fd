"""Rounding of every weight to its nearest code."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols import Format, Moments, Rounder


@dataclasses.dataclass(frozen=True)
class Nearest(Rounder):
    """Round to nearest; needs no statistics."""

    def __call__(
        self,
        w: Float[Array, "k n"],
        format: Format,
        moments: Moments | None = None,
        key: Array | None = None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the packed arrays of w and a report.

        Args:
          w: float32 matrix [k, n].
          format: any format with `encode`.
          moments, key: ignored.
        Returns:
          Packed arrays, and a report in which the damping and the number of dead channels are 0.
        """
        del moments, key
        return format.encode(w), {"damping": jnp.float32(0), "dead": jnp.int32(0)}
