"""A factor per channel: what evens channels out before rounding, and what healing trains."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.fields import check_fields

_RANGE = 64.0  # factors lie within this of their geometric mean, either way


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The map x -> x * factors of n channels; invertible, not orthonormal.

    Its array: "factors", n float16.

    Attributes:
      power: factors are the mean square that a channel's vectors have (inputs x on the input side,
        loss gradients on the output side), to this power, over their geometric mean (1 for a dead
        channel). At -1/2 all channels come to count alike, and a rounder that weighs outputs alike
        is right to; 0: ones, to be trained.

    >>> Scaling(-0.5).fit(jnp.ones(2), jnp.array([4.0, 1.0]), jax.random.key(0))["factors"].tolist()
    [0.70703125, 1.4140625]
    """

    power: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_moment(self) -> bool:
        """Whether the second moment on this side decides the factors."""
        return self.power != 0

    @property
    def fitted(self) -> bool:
        """Whether its arrays depend on the weight, and so cannot be shared."""
        return self.needs_moment

    def size(self, n: int) -> int:
        """Channels after it: as many."""
        return n

    def fit(
        self, weights: Float[Array, "n"], moment: Float[Array, "n"], key: Array
    ) -> dict[str, Array]:
        """Its arrays, for channels of these mean squares of weights and of vectors."""
        del weights, key
        alive = moment > 0
        log = self.power * jnp.log(jnp.where(alive, moment, 1.0))
        mean = jnp.sum(log) / jnp.maximum(jnp.sum(alive), 1)
        log = jnp.clip(jnp.where(alive, log - mean, 0.0), -jnp.log(_RANGE), jnp.log(_RANGE))
        return {"factors": jnp.exp(log).astype(jnp.float16)}

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that `fit` makes."""
        return {"factors": jax.ShapeDtypeStruct((n,), jnp.float16)}

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """x A, for row vectors x."""
        return x * arrays["factors"].astype(x.dtype)

    def transposed(
        self, y: Float[Array, "... n"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """y A^T: the same product."""
        return self.apply(y, arrays)

    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """x A^-T: what weights become where the vectors they meet become x A."""
        return x / arrays["factors"].astype(x.dtype)
