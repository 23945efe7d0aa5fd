"""The data that a transform is fitted to: the weights on its side, and the vectors they meet."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Channels(NamedTuple):
    """Channels on one side of a weight, or of several weights that multiply the same vectors.

    Attributes:
      weights: [r, n], one row for every channel on the other side, of all these weights.
      gram: mean of v v^T over the vectors v, [n, n]; None if unknown.
      magnitude: mean |v| per channel, [n]; None if unknown.
      low, high: the largest -v and the largest v per channel, at least 0, [n]; None if unknown.
      sample: some of the vectors, [t, n], including those with the largest entries; None if
        unknown.
    """

    weights: Float[Array, "r n"]
    gram: Float[Array, "n n"] | None = None
    magnitude: Float[Array, " n"] | None = None
    low: Float[Array, " n"] | None = None
    high: Float[Array, " n"] | None = None
    sample: Float[Array, "t n"] | None = None

    @staticmethod
    def of(weights: Float[Array, "r n"], vectors: Float[Array, "t n"]) -> "Channels":
        """Build the statistics from weights and all vectors they are multiplied with.

        Args:
          weights: [r, n].
          vectors: [t, n].

        >>> Channels.of(jnp.eye(2), jnp.array([[1.0, -3.0], [2.0, 0.0]])).low.tolist()
        [0.0, 3.0]
        """
        low, high = (jnp.maximum(jnp.max(a, axis=0, initial=0.0), 0) for a in (-vectors, vectors))
        gram = vectors.T @ vectors / max(1, len(vectors))
        return Channels(weights, gram, jnp.mean(jnp.abs(vectors), axis=0), low, high, vectors)

    @property
    def energy(self) -> Float[Array, " n"]:
        """Mean square of the weights, per channel."""
        return jnp.mean(self.weights**2, axis=0)

    @property
    def moment(self) -> Float[Array, " n"]:
        """Mean square of the vectors, per channel; ones if unknown."""
        one = jnp.ones(self.weights.shape[1])
        return one if self.gram is None else jnp.diagonal(self.gram)

    @property
    def largest(self) -> Float[Array, " n"]:
        """max |v| per channel.

        Raises:
          ValueError: it is unknown.
        """
        if self.low is None or self.high is None:
            raise ValueError("the ranges of the channels are unknown: pass the result of calibrate")
        return jnp.maximum(self.low, self.high)

    @property
    def rows(self) -> Float[Array, "t n"]:
        """The sample of vectors.

        Raises:
          ValueError: there is none.
        """
        if self.sample is None:
            raise ValueError("no rows of the input were kept: calibrate with sample=256")
        return self.sample

    def through(self, side: Any, arrays: dict[str, Array]) -> "Channels":
        """Return the channels after a change of variables: vectors v A, and weights to match.

        `magnitude`, `low` and `high` are exact if the transform only multiplies channels by
        factors. Otherwise they are taken from the sample, and unknown without one.

        Args:
          side: the transform A.
          arrays: its arrays.
        """
        apply = lambda v: side.apply(v, arrays)
        gram = None if self.gram is None else apply(apply(self.gram).T)  # A^T H A
        sample = None if self.sample is None else apply(self.sample)
        after = Channels(side.inverse(self.weights, arrays), gram, sample=sample)
        if set(arrays) == {"factors"}:
            scaled = lambda a: None if a is None else a * jnp.abs(arrays["factors"].astype(a.dtype))
            return after._replace(
                magnitude=scaled(self.magnitude), low=scaled(self.low), high=scaled(self.high)
            )
        if sample is None:
            return after
        found = Channels.of(after.weights, sample)
        return after._replace(magnitude=found.magnitude, low=found.low, high=found.high)
