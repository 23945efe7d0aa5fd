"""Interface of adapters: few trained numbers beside the packed arrays of a frozen matrix."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols.formats import Data, Format


class Known(NamedTuple):
    """What is known of one matrix when an adapter is started on it.

    All matrices are those that the format stores, that is after the transforms of the weight.

    Attributes:
      k, n: number of rows and of columns.
      floats: the matrix before it was quantized, [k, n]; None if unknown.
      gram: mean of x x^T over the inputs x, [k, k]; None if unknown.
      key: PRNG key for random initial values.
    """

    k: int
    n: int
    floats: Float[Array, "k n"] | None
    gram: Float[Array, "k k"] | None
    key: Array


class Adapter(abc.ABC):
    """How a matrix whose packed arrays are frozen is adapted to a task by a few trained numbers.

    The trained arrays are stored beside those of the format, under names of their own, or in the
    place of some of them (scales, for example).

    Capabilities:
      exact: whether `merged` gives packed arrays that compute what was trained.
      floating: whether the array "codes" holds the unrounded matrix during training.
      needs_floats: whether `start` reads the matrix before it was quantized, if it is known.
      needs_gram: whether `start` reads the second moment of the inputs.
    """

    exact: ClassVar[bool] = False
    floating: ClassVar[bool] = False
    needs_floats: bool = False
    needs_gram: bool = False

    @abc.abstractmethod
    def labels(self, format: Any) -> Mapping[str, str]:
        """Return the label of every trained array by its name; see `jaxquant.labels`.

        Args:
          format: the format `home`.
        """

    @abc.abstractmethod
    def check(self, format: Format, k: int, n: int) -> None:
        """Raise ValueError unless matrices can be adapted this way.

        Args:
          format: format of the matrix before it is adapted, or the format `home`; an adapter that
            takes the one must take the other.
          k, n: number of rows and of columns of the stored matrix.
        """

    def home(self, format: Any) -> Format:
        """Return the format in which the adapted matrix is stored: by default, its own.

        Args:
          format: format of the matrix before it is adapted.
        """
        return format

    @abc.abstractmethod
    def start(self, format: Any, data: Data, known: Known) -> Data:
        """Return the arrays of the adapted matrix at the start of training.

        Args:
          format: format of the matrix before it is adapted.
          data: its packed arrays.
          known: what else is known of it.

        Returns:
          The arrays in the format `home`, and the trained arrays.
        """

    @abc.abstractmethod
    def product(
        self, format: Any, form: Any, x: Float[Array, "m k"], data: Data, of_inputs: Data
    ) -> Float[Array, "m n"]:
        """Return x @ w for the adapted matrix w, differentiable in x and in the trained arrays.

        Args:
          format: the format `home`.
          form: the `jaxquant.Activations` by which the packed product rounds its inputs; None for
            no rounding.
          x: the inputs, one per row.
          data: all arrays of the adapted matrix.
          of_inputs: arrays "scale" and "zero" of a static activation format; else none.

        Returns:
          The product, float32.
        """

    def product_transposed(
        self, format: Any, g: Float[Array, "m n"], data: Data, k: int
    ) -> Float[Array, "m k"]:
        """Return g @ w.T for the adapted matrix w, as a tied output matrix needs it.

        Args:
          format: the format `home`.
          g: the rows.
          data: all arrays of the adapted matrix.
          k: number of rows of w.

        Returns:
          The product, float32.
        """
        w = self.value(format, data, k).astype(g.dtype)
        return jnp.dot(g, w.T, preferred_element_type=jnp.float32)

    @abc.abstractmethod
    def value(self, format: Any, data: Data, k: int) -> Float[Array, "k n"]:
        """Return the adapted matrix, float32, differentiable in the trained arrays.

        Args:
          format: the format `home`.
          data: all arrays of the adapted matrix.
          k: number of rows.

        Returns:
          The matrix.
        """

    def merged(self, format: Any, data: Data, k: int) -> Data:
        """Return packed arrays that compute what was trained; only for adapters that are `exact`.

        Args:
          format: the format `home`.
          data: all arrays of the adapted matrix.
          k: number of rows.

        Returns:
          The arrays in the format `home`.

        Raises:
          NotImplementedError: the adapter is not `exact`.
        """
        raise NotImplementedError
