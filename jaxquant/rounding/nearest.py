"""Round every weight to its nearest code."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols import Format, Moments, Rounder


@dataclasses.dataclass(frozen=True)
class Nearest(Rounder):
    """Nearest rounding; needs no statistics."""

    def __call__(
        self,
        w: Float[Array, "k n"],
        format: Format,
        moments: Moments | None = None,
        key: Array | None = None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Packed data of w [k, n] (float32), and a report (empty figures)."""
        del moments, key
        return format.encode(w), {"damping": jnp.float32(0), "dead": jnp.int32(0)}
