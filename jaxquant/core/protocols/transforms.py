"""Interface of transforms: a change of variables on one side of a weight."""

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

    Its arrays have names and belong to one matrix, or to all matrices that read one input
    (`joint`).

    Capabilities, which say what `fit` reads and who shares its arrays:
      needs_gram, needs_channels, needs_sample: whether `fit` needs the second moments, the channel
        magnitudes, and sample rows of the inputs.
      fitted: whether the arrays depend on the weight, so that weights with one input cannot share
        them.
      joint: whether the arrays are fitted jointly to all weights that read one input.
      searched: whether `candidates` is defined: of several sets of arrays, the best is kept.
      learns: whether `latent` and `learned` are defined, so that the arrays can be trained.
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
        """Compute the arrays.

        Args:
          channels: the channels to fit to.
          key: a random key.
        """

    @abc.abstractmethod
    def apply(self, x: Float[Array, "... n"], arrays: Data) -> Float[Array, "... s"]:
        """Return x A.

        Args:
          x: row vectors, [..., n].
          arrays: the arrays of the transform.
        """

    @abc.abstractmethod
    def transposed(self, y: Float[Array, "... s"], arrays: Data, n: int) -> Float[Array, "... n"]:
        """Return y A^T.

        Args:
          y: row vectors, [..., s].
          arrays: the arrays of the transform.
          n: number of channels before the transform.
        """

    @abc.abstractmethod
    def inverse(self, x: Float[Array, "... n"], arrays: Data) -> Float[Array, "... s"]:
        """Return x A^-T: how weights change where the vectors they are multiplied with become x A.

        Args:
          x: row vectors, [..., n].
          arrays: the arrays of the transform.
        """

    def size(self, n: int) -> int:
        """Return the number of channels after the transform; by default n."""
        return n

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the arrays that `fit` makes for n channels."""
        weights = jax.ShapeDtypeStruct((1, n), jnp.float32)
        fit = lambda weights, key: self.fit(Channels(weights), key)
        return jax.eval_shape(fit, weights, jax.eval_shape(jax.random.key, 0))

    def candidates(self, channels: Channels, key: Array) -> Iterator[Data]:
        """Yield the candidates of a search; only for transforms that are `searched`.

        Args:
          channels: the channels to fit to.
          key: a random key.

        Yields:
          Sets of arrays, each as `fit` would return it.
        """
        raise NotImplementedError

    def latent(self, arrays: Data) -> Data:
        """Return the parameters that training starts from; only if the transform `learns`."""
        raise NotImplementedError

    def learned(self, arrays: Data, change: Data) -> Data:
        """Return the arrays after a change of the parameters; only if the transform `learns`.

        Args:
          arrays: the arrays before.
          change: the parameters, as from `latent`, after some training; the result is
            differentiable in them.
        """
        raise NotImplementedError

    def healing_bytes(self, n: int) -> int:
        """Return how many bytes healing adds to the arrays for n channels; by default 0."""
        return 0
