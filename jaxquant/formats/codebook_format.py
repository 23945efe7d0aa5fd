"""Base of formats with learned codebooks: rounding, storage, and re-selection of codes."""

import abc
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jaxquant.core.protocols import Grid, GridFormat
from jaxquant.formats.scales import check_values
from pallas_kernels.codecs import lookup

BEAM = 5  # beam width of `recoded`


class CodebookFormat(GridFormat):
    """Base of a format that learns its codebooks (`grids`) and searches codes in them (`search`).

    A grid holds the codebooks (`tables`) and whatever else is stored beside the codes. One code
    covers a tile of rows and columns, and selects one vector from each of m tables. Codes are
    therefore [g, m, v], for g rows of tiles and v tiles in each.
    """

    recodes: ClassVar[bool] = True

    @abc.abstractmethod
    def learn(self, w: Float[Array, "k n"], weights: Float[Array, " k"], key: Array) -> Grid:
        """Learn the tables of a matrix and return the grid.

        Args:
          w: matrix [k, n].
          weights: weights [k] of the squared errors of the rows.
          key: random key for the initial vectors.
        """

    @abc.abstractmethod
    def stored(self, grid: Grid) -> Grid:
        """Return the grid as it is after storage."""

    @abc.abstractmethod
    def search(
        self, target: Float[Array, "d n"], row: Grid, root: Float[Array, "d d"] | None, beam: int
    ) -> tuple[Int32[Array, "m v"], Float[Array, "d n"]]:
        """Search codes for one row of tiles and return them with their values.

        Args:
          target: rows [d, n] to approximate.
          row: grid entry for these rows.
          root: matrix [d, d] such that the metric is root root^T; None for the squared error.
          beam: beam width.
        """

    @abc.abstractmethod
    def rounded(self, w: Float[Array, "k n"], grid: Grid, beam: int) -> Int32[Array, "g m v"]:
        """Return the codes of a matrix that are near in squared error, by beam search."""

    @abc.abstractmethod
    def values(self, codes: Int[Array, "g m v"], grid: Grid) -> Float[Array, "k n"]:
        """Return the matrix that these codes represent."""

    @abc.abstractmethod
    def unpack(self, data: dict[str, Array], k: int) -> tuple[Int32[Array, "g m v"], Grid]:
        """Invert `pack`: return the codes and the grid."""

    def round(
        self, target: Float[Array, "d n"], row: Grid
    ) -> tuple[Int32[Array, "m v"], Float[Array, "d n"]]:
        """Return codes near in squared error, found with a beam of 1, and their values."""
        return self.search(target, row, None, 1)

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Learn codebooks with equal weights, round to nearest and pack.

        Raises:
          ValueError: stored values would be outside the range of float16.
        """
        check_values(self, w)
        grid = self.grids(w)
        return self.pack(self.rounded(w, grid, 1), grid)

    def recoded(
        self, data: dict[str, Array], target: Float[Array, "k n"], share: float
    ) -> dict[str, Array]:
        """Return the packed arrays with a fraction of the codes moved nearer to the target.

        Args:
          data: packed arrays.
          target: matrix [k, n] to approximate.
          share: maximum fraction of the codes to replace; those that reduce the squared error most
            are chosen.
        """
        (k, n), (rows, columns) = target.shape, self.tile
        old, grid = self.unpack(data, k)
        new = self.rounded(target, grid, BEAM)

        def error(codes: Array) -> Array:
            square = (self.values(codes, grid) - target) ** 2
            return jnp.sum(square.reshape(k // rows, rows, n // columns, columns), (1, 3))

        chosen = lookup.most(error(old) - error(new), share)
        return self.pack(jnp.where(chosen[:, None], new, old), grid)
