"""Dense: the weights in floating point, for methods that round only activations, or once frozen."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols import Format
from jaxquant.formats.scales import rescaled
from pallas_kernels import activations as forms


@dataclasses.dataclass(frozen=True)
class Dense(Format):
    """Floats in place of codes, for weights that are not rounded, or frozen and decoded once.

    >>> Dense().matmul(jnp.ones((1, 2)), {"codes": jnp.ones((2, 3))}).tolist()
    [[2.0, 2.0, 2.0]]
    """

    wide: ClassVar[bool] = True

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        """Return the arrays of a matrix 2**e times as large."""
        return rescaled(data, e, "codes")

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Return the weights in float32."""
        return {"codes": w.astype(jnp.float32)}

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        return data["codes"].astype(jnp.float32)

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        # Cast directly to the dtype of x, which the codes may already have, not via float32.
        x = forms.rounded(x, activations)
        return jnp.dot(x, data["codes"].astype(x.dtype), preferred_element_type=jnp.float32)

    def matmul_transposed(
        self, g: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        g = forms.rounded(g, "float")
        return jnp.dot(g, data["codes"].astype(g.dtype).T, preferred_element_type=jnp.float32)

    def kernel(self) -> str:
        """Return the name of what computes products."""
        return "XLA's dot of floats"
