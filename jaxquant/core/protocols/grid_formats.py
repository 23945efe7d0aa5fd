"""Interface of formats whose codes are chosen row by row, given a grid."""

import abc
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float

from jaxquant.core.protocols.formats import Codes, Data, Format

Grid = Any  # scales, tables, zero points: a pytree defined by the format


class GridFormat(Format):
    """A format that chooses codes row by row (or tile by tile), given a grid.

    A grid holds what decoding needs besides codes. It is a pytree, and each of its arrays has a
    leading axis over the groups of rows that share an entry. All rounders accept such a format:
    nearest, error feedback, two-sided feedback.

    Capabilities:
      fits: whether `fit` is defined: the entry of a group is then computed from its rows after
        error feedback has changed them, rather than fixed beforehand.
    """

    fits: ClassVar[bool] = False

    @abc.abstractmethod
    def rows_per_group(self, k: int) -> int:
        """Return how many rows share an entry of the grid, for a matrix of k rows."""

    @abc.abstractmethod
    def grids(self, w: Float[Array, "k n"]) -> Grid:
        """Compute the grid for a matrix.

        Args:
          w: the matrix, [k, n].

        Returns:
          The grid, with the precision of its storage.
        """

    @abc.abstractmethod
    def round(self, target: Float[Array, "d n"], row: Grid) -> tuple[Codes, Float[Array, "d n"]]:
        """Choose the codes nearest to the d rows of a tile.

        Args:
          target: the rows, [d, n].
          row: one entry of the grid, or entries that broadcast against the target.

        Returns:
          The codes, and the values they decode to, [d, n].
        """

    @abc.abstractmethod
    def pack(self, codes: Codes, grid: Grid) -> Data:
        """Pack codes and a grid.

        Args:
          codes: the codes of all tiles, [k / d, ...], as returned by `round`.
          grid: the grid.

        Returns:
          The packed arrays by name.
        """

    def rescaled(self, grid: Grid, factor: Float[Array, ""]) -> Grid:
        """Multiply the scales of a grid by a factor.

        Args:
          grid: the grid.
          factor: a scalar.

        Returns:
          The new grid, with the precision of its storage.

        Raises:
          ValueError: the format does not define it.
        """
        raise ValueError(
            f"{type(self).__name__} does not define rescaled, which this rounder needs"
        )

    def fit(self, w: Float[Array, "g n"]) -> Grid:
        """Compute the grid's entry for one group of rows; only for formats that have `fits`.

        Args:
          w: the rows of the group, [g, n].
        """
        raise NotImplementedError

    def round_where(
        self, target: Float[Array, "d n"], row: Grid, valid: Bool[Array, " t"] | None
    ) -> tuple[Codes, Float[Array, "d n"]]:
        """Round as `round` does, where only some tiles matter.

        Args:
          target: the rows, [d, n].
          row: entries of the grid, as for `round`.
          valid: [t], True for the tiles that matter (None: all); the results of the others are
            arbitrary.
        """
        return self.round(target, row)
