"""What a rounder must offer, and what it is told: how codes are chosen for a given format."""

import abc
from typing import ClassVar, NamedTuple

from jaxtyping import Array, Float

from jaxquant.core.protocols.formats import Data, Format


class Moments(NamedTuple):
    """Second moments that a rounder may use; None where they were not measured.

    The loss is tr(H_in E H_out E^T) for an error E [k, n], H_out = I if unknown.
    """

    input: Float[Array, "k k"] | None = None
    output: Float[Array, "n n"] | None = None


class Rounder(abc.ABC):
    """How codes are chosen for a given format.

    Capabilities:
      needs_gram, needs_output: the second moments of inputs, of loss gradients at outputs.
      damping: fraction of the mean diagonal that is added to second moments, before any raise.
      takes_ranges: `within` fits grids to another matrix than the one that is rounded.
    """

    needs_gram: bool = False
    needs_output: bool = False
    damping: float = 0.0
    takes_ranges: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[Data, Data]:
        """Packed arrays of w, and a report: "damping" used, "dead" channels (both scalars).

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
        """As a call, with grids fitted to `ranges` in place of w; of those that `takes_ranges`."""
        raise NotImplementedError
