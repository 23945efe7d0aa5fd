"""What formats of learned codebooks share: rounding, storage, and codes chosen anew."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jaxquant.formats.scales import check_values
from pallas_kernels.codecs import lookup

BEAM = 5  # partial sums kept where codes are chosen anew


class Learned:
    """Base of a format that learns its tables (`grids`) and looks codes up in them (`search`).

    A grid is its tables, and what else storage holds beside the codes. Codes are [rows, m, columns]
    of what one code covers (`tile`), m tables each.
    """

    @property
    def tile(self) -> tuple[int, int]:
        """Rows, columns that one code covers."""
        raise NotImplementedError

    def grids(self, w: Float[Array, "k n"]) -> Any:
        """A grid for these weights."""
        raise NotImplementedError

    def search(
        self, target: Float[Array, "d n"], row: Any, root: Float[Array, "d d"] | None, beam: int
    ) -> tuple[Int32[Array, "m v"], Float[Array, "d n"]]:
        """Codes of a row of them near in the metric root root^T, by beam search, and their values.

        None: in squared error.
        """
        raise NotImplementedError

    def rounded(self, w: Float[Array, "k n"], grid: Any, beam: int) -> Int32[Array, "g m v"]:
        """Codes of all rows of them, near in squared error."""
        raise NotImplementedError

    def values(self, codes: Int[Array, "g m v"], grid: Any) -> Float[Array, "k n"]:
        """The matrix of these codes."""
        raise NotImplementedError

    def pack(self, codes: Int[Array, "g m v"], grid: Any) -> dict[str, Array]:
        """Storage."""
        raise NotImplementedError

    def unpack(self, data: dict[str, Array], k: int) -> tuple[Int32[Array, "g m v"], Any]:
        """Inverse of `pack`: codes and grid."""
        raise NotImplementedError

    def round(
        self, target: Float[Array, "d n"], row: Any
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
