"""What a transform must offer: a change of variables on one side of a weight."""

import abc
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.channels import Channels
from jaxquant.core.protocols.formats import Data


class Transform(abc.ABC):
    """A change of variables A of the channels on one side of a weight: x @ w = (x A) @ (A^-1 w).

    Its arrays are named and belong to one matrix, or to all that read one input (`joint`).

    Capabilities, all of which say what `fit` reads or who shares its arrays:
      needs_gram, needs_channels, needs_sample: second moments, sizes of channels, rows of inputs.
      fitted: the arrays depend on the weight, so that weights of one input cannot share them.
      joint: the arrays are fitted to all weights that read an input together.
      searched: `candidates` offers several, of which the best is kept.
      learns: `learned` makes the arrays of parameters that start at `latent`, for training.
    """

    needs_gram: bool = False
    needs_channels: bool = False
    needs_sample: bool = False
    fitted: bool = False
    joint: bool = False
    searched: bool = False
    learns: ClassVar[bool] = False

    @abc.abstractmethod
    def fit(self, channels: Channels, key: Array) -> Data:
        """Its arrays, for these channels."""

    @abc.abstractmethod
    def apply(self, x: Float[Array, "... n"], arrays: Data) -> Float[Array, "... s"]:
        """x A, for row vectors x."""

    @abc.abstractmethod
    def transposed(self, y: Float[Array, "... s"], arrays: Data, n: int) -> Float[Array, "... n"]:
        """y A^T."""

    @abc.abstractmethod
    def inverse(self, x: Float[Array, "... n"], arrays: Data) -> Float[Array, "... s"]:
        """x A^-T: what weights become where the vectors they meet become x A."""

    def size(self, n: int) -> int:
        """Channels stored for n channels; by default as many."""
        return n

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that `fit` makes."""
        weights = jax.ShapeDtypeStruct((1, n), jnp.float32)
        fit = lambda weights, key: self.fit(Channels(weights), key)
        return jax.eval_shape(fit, weights, jax.eval_shape(jax.random.key, 0))

    def candidates(self, channels: Channels, key: Array) -> Iterator[Data]:
        """Arrays of which a search keeps the best; of transforms that are `searched`."""
        raise NotImplementedError

    def latent(self, arrays: Data) -> Data:
        """Parameters that training begins at; of transforms that `learns`."""
        raise NotImplementedError

    def learned(self, arrays: Data, change: Data) -> Data:
        """The arrays after a change of these parameters, differentiable in it."""
        raise NotImplementedError

    def healing_bytes(self, n: int) -> int:
        """Bytes that healing adds to its arrays, for n channels."""
        return 0
