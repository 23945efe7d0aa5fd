"""What formats of learned codebooks share: rounding, storage, and codes chosen anew."""

import abc
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jaxquant.core.protocols import Grid, GridFormat
from jaxquant.formats.scales import check_values
from pallas_kernels.codecs import lookup

BEAM = 5  # partial sums kept where codes are chosen anew


class CodebookFormat(GridFormat):
    """Base of a format that learns its tables (`grids`) and looks codes up in them (`search`).

    A grid is its tables, and what else storage holds beside the codes. Codes are [rows, m, columns]
    of what one code covers (`tile`), m tables each.
    """

    recodes: ClassVar[bool] = True

    @abc.abstractmethod
    def learn(self, w: Float[Array, "k n"], weights: Float[Array, " k"], key: Array) -> Grid:
        """A grid whose tables are learned, the squared errors of row i weighted by weights[i]."""

    @abc.abstractmethod
    def stored(self, grid: Grid) -> Grid:
        """The grid as storage will give it back."""

    @abc.abstractmethod
    def search(
        self, target: Float[Array, "d n"], row: Grid, root: Float[Array, "d d"] | None, beam: int
    ) -> tuple[Int32[Array, "m v"], Float[Array, "d n"]]:
        """Codes of a row of them near in the metric root root^T, by beam search, and their values.

        None: in squared error.
        """

    @abc.abstractmethod
    def rounded(self, w: Float[Array, "k n"], grid: Grid, beam: int) -> Int32[Array, "g m v"]:
        """Codes of all rows of them, near in squared error."""

    @abc.abstractmethod
    def values(self, codes: Int[Array, "g m v"], grid: Grid) -> Float[Array, "k n"]:
        """The matrix of these codes."""

    @abc.abstractmethod
    def unpack(self, data: dict[str, Array], k: int) -> tuple[Int32[Array, "g m v"], Grid]:
        """Inverse of `pack`: codes and grid."""

    def round(
        self, target: Float[Array, "d n"], row: Grid
    ) -> tuple[Int32[Array, "m v"], Float[Array, "d n"]]:
        """Codes near in squared error, and their values."""
        return self.search(target, row, None, 1)

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Learn codebooks with equal weights, round to nearest, pack.

        Raises:
          ValueError: what is stored would leave the range of float16.
        """
        check_values(self, w)
        grid = self.grids(w)
        return self.pack(self.rounded(w, grid, 1), grid)

    def recoded(
        self, data: dict[str, Array], target: Float[Array, "k n"], share: float
    ) -> dict[str, Array]:
        """The data with a share of the codes chosen anew: those that so come nearest the target."""
        (k, n), (rows, columns) = target.shape, self.tile
        old, grid = self.unpack(data, k)
        new = self.rounded(target, grid, BEAM)

        def error(codes: Array) -> Array:
            square = (self.values(codes, grid) - target) ** 2
            return jnp.sum(square.reshape(k // rows, rows, n // columns, columns), (1, 3))

        chosen = lookup.most(error(old) - error(new), share)
        return self.pack(jnp.where(chosen[:, None], new, old), grid)
