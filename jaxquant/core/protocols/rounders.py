"""Interface of rounders: how codes are chosen for a given format."""

import abc
from typing import ClassVar, NamedTuple

from jaxtyping import Array, Float

from jaxquant.core.protocols.formats import Data, Format


class Moments(NamedTuple):
    """Second moments that a rounder may use.

    The loss is tr(H_in E H_out E^T) for a quantization error E [k, n], with H_out = I if unknown.

    Attributes:
      input: H_in, [k, k], from the inputs; None if it was not measured.
      output: H_out, [n, n], from the loss gradients at the outputs; None if it was not measured.
    """

    input: Float[Array, "k k"] | None = None
    output: Float[Array, "n n"] | None = None


class Rounder(abc.ABC):
    """How codes are chosen for a given format.

    Capabilities:
      needs_gram, needs_output: whether it needs the second moment of the inputs, and that of the
        loss gradients at the outputs.
      damping: fraction of the mean diagonal that is added to second moments at first; it may be
        raised.
      takes_ranges: whether `within` is defined, which fits grids to another matrix than the one it
        rounds.
    """

    needs_gram: bool = False
    needs_output: bool = False
    damping: float = 0.0
    takes_ranges: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[Data, Data]:
        """Choose codes for a matrix.

        Args:
          w: the matrix, [k, n].
          format: the format.
          moments: the second moments.
          key: a random key, for rounders that draw random numbers.

        Returns:
          The packed arrays, and a report of two scalars: "damping" used, and the number of "dead"
          channels.

        Raises:
          ValueError: it cannot round to this format, or a moment is missing.
        """

    def within(
        self,
        ranges: Float[Array, "k n"],
        w: Float[Array, "k n"],
        format: Format,
        moments: Moments,
        key: Array | None = None,
    ) -> tuple[Data, Data]:
        """Choose codes with grids fitted to `ranges`; only for rounders with `takes_ranges`.

        Args:
          ranges: the matrix that grids are fitted to, [k, n].
          w, format, moments, key: as for a call.

        Returns:
          As a call does.
        """
        raise NotImplementedError
