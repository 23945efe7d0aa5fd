"""E8P: eight rows of a column to a point of the lattice E8 + 1/4, one scale per matrix."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxquant.core.fields import check_fields
from jaxquant.core.magnitude import shifted, unit
from jaxquant.core.protocols import GridFormat, OpArguments
from jaxquant.formats.op_format import OpFormat
from pallas_kernels.codecs import e8p, lookup

_CHUNK = 1 << 15  # octets rounded at a time


class LatticeGrid(NamedTuple):
    """The scale of a matrix, [1, 1]: value = scale * point."""

    scale: Float[Array, "... 1"]


@dataclasses.dataclass(frozen=True)
class E8P(GridFormat, OpFormat):
    """QuIP#'s codebook at 2 bits a weight; 3 and 4 bits code the residual with a second point.

    The scale is rms(w) over the one best for Gaussian weights: rotate the matrix first. Stored
    are bytes packed along k: `codes` two an octet (of eight rows), `residual` one or two.

    Attributes:
      bits: 2, 3 or 4. At 4 bits a trellis or even a scalar code does better on Gaussian weights.

    Source: Tseng et al. 2024, arXiv:2402.04396; see `pallas_kernels.codecs.e8p`.

    >>> f = E8P()
    >>> data = f.encode(jnp.array([[0.7]] * 7 + [[-1.1]]))
    >>> {name: a.shape for name, a in data.items()}
    {'codes': (1, 1), 'scale': (1, 1)}
    >>> print(np.asarray(f.dequantize(data, 8)[6:, 0]).round(2))
    [ 0.55 -0.92]
    """

    bits: int = 2

    storage: ClassVar[str] = "e8p"
    tile: ClassVar[tuple[int, int]] = (8, 1)  # rows, columns that one code covers

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits not in e8p.OPT_SCALE:
            raise ValueError(f"bits must be 2, 3 or 4, got {self.bits}")

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        if k % 8:
            raise ValueError(f"E8P codes eight rows together, and 8 does not divide k = {k}")

    # --- codes ------------------------------------------------------------------------------

    def rows_per_group(self, k: int) -> int:
        """One scale serves all rows."""
        return k

    def grids(self, w: Float[Array, "k n"]) -> LatticeGrid:
        """The scale of a matrix; never zero."""
        w, e = unit(w)
        scale = jnp.sqrt(jnp.mean(w**2)) / e8p.OPT_SCALE[self.bits]
        return LatticeGrid(shifted(jnp.where(scale > 0, scale, 1e-30), e).reshape(1, 1))

    def rescaled(self, grid: LatticeGrid, factor: Array) -> LatticeGrid:
        """The grid with its scale times a factor."""
        return LatticeGrid(grid.scale * factor)

    def round(
        self, target: Float[Array, "8 n"], row: LatticeGrid
    ) -> tuple[Int32[Array, "n"], Float[Array, "8 n"]]:
        """Nearest codes, of 8 `bits` bits, and their values."""
        code, point = e8p.nearest(target / row.scale, self.bits)
        return code, row.scale * point

    # --- storage ----------------------------------------------------------------------------

    def pack(self, codes: Int[Array, "o n"], grid: LatticeGrid) -> dict[str, Array]:
        """Storage of the codes of o octets."""
        data = {"codes": lookup.pack(codes[:, None], 16)}
        if self.bits > 2:
            data["residual"] = lookup.pack(codes[:, None] >> 16, self._fine)
        return data | {"scale": grid.scale}

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Round a matrix to nearest and pack it."""
        k, n = w.shape
        self.check_shape(k, n)
        grid = self.grids(w)
        octets = w.astype(jnp.float32).reshape(k // 8, 8, n)
        row = jax.tree.map(lambda a: a[0], grid)
        codes = jax.lax.map(lambda t: self.round(t, row)[0], octets, batch_size=max(1, _CHUNK // n))
        return self.pack(codes, grid)

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        return (data["codes"], data.get("residual"), data["scale"]), {"bits": self.bits}

    @property
    def _fine(self) -> int:
        """Bits of a residual's code."""
        return 8 * (self.bits - 2)

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        codes = lookup.take(data["codes"], ids // 8, 16, 1)
        if self.bits > 2:
            codes = codes | lookup.take(data["residual"], ids // 8, self._fine, 1) << 16
        wanted = (ids % 8)[:, None, None] == np.arange(8)[:, None]
        points = e8p.decode(codes[:, 0], self.bits)
        return data["scale"] * jnp.sum(jnp.where(wanted, points, 0), axis=1)

    def kernel(self) -> str:
        """The op that serves a matmul."""
        return f"e8p_matmul, codes of {8 * self.bits} bits"
