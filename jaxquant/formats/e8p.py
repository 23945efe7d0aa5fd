"""E8P: eight rows of a column coded as a point of the lattice E8 + 1/4, one scale per matrix."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxquant.core.fields import check_fields
from jaxquant.core.magnitude import shifted, unit
from jaxquant.core.protocols import GridFormat, OpArguments
from jaxquant.formats.op_format import WHOLE_BITS, OpFormat
from pallas_kernels.codecs import e8p, lookup

_CHUNK = 1 << 15  # number of octets (eight rows of a column) rounded at a time


class LatticeGrid(NamedTuple):
    """The scale of a matrix, float32 [1, 1]: value = scale * point."""

    scale: Float[Array, "... 1"]


@dataclasses.dataclass(frozen=True)
class E8P(GridFormat, OpFormat):
    """QuIP#'s lattice codebook at 2 bits per weight, with a residual code at 3 and 4 bits.

    The scale is rms(w) over a constant that is best for Gaussian weights, so rotate the matrix
    first. Codes are packed along k: `codes` takes two bytes per octet (eight rows of a column), and
    `residual` one or two.

    Attributes:
      bits: number of bits per weight: 2, 3 or 4. At 4 bits a trellis code or even a scalar code
        does better on Gaussian weights.

    Source: Tseng et al. 2024, arXiv:2402.04396; see `pallas_kernels.codecs.e8p`.

    >>> f = E8P()
    >>> data = f.encode(jnp.array([[0.7]] * 7 + [[-1.1]]))
    >>> {name: a.shape for name, a in data.items()}
    {'codes': (1, 1), 'scale': (1, 1)}
    >>> print(np.asarray(f.dequantize(data, 8)[6:, 0]).round(2))
    [ 0.55 -0.92]
    """

    bits: int = dataclasses.field(default=2, metadata=WHOLE_BITS)

    storage: ClassVar[str] = "e8p"
    tile: ClassVar[tuple[int, int]] = (8, 1)  # rows and columns that one code covers

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
        """Return k, since one scale serves all rows."""
        return k

    def grids(self, w: Float[Array, "k n"]) -> LatticeGrid:
        """Return the scale of a matrix; it is never zero."""
        w, e = unit(w)
        scale = jnp.sqrt(jnp.mean(w**2)) / e8p.OPT_SCALE[self.bits]
        return LatticeGrid(shifted(jnp.where(scale > 0, scale, 1e-30), e).reshape(1, 1))

    def rescaled(self, grid: LatticeGrid, factor: Array) -> LatticeGrid:
        """Return the grid with its scale multiplied by `factor`."""
        return LatticeGrid(grid.scale * factor)

    def round(
        self, target: Float[Array, "8 n"], row: LatticeGrid
    ) -> tuple[Int32[Array, "n"], Float[Array, "8 n"]]:
        """Return the nearest codes, of 8 * `bits` bits, and their values."""
        code, point = e8p.nearest(target / row.scale, self.bits)
        return code, row.scale * point

    # --- storage ----------------------------------------------------------------------------

    def pack(self, codes: Int[Array, "o n"], grid: LatticeGrid) -> dict[str, Array]:
        """Return the packed arrays for the codes of o octets and a grid."""
        data = {"codes": lookup.pack(codes[:, None], 16)}
        if self.bits > 2:
            data["residual"] = lookup.pack(codes[:, None] >> 16, self._fine)
        return data | {"scale": grid.scale}

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Round a matrix to nearest and pack it.

        Raises:
          ValueError: 8 does not divide k.
        """
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
        """The number of bits of a residual code."""
        return 8 * (self.bits - 2)

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        codes = lookup.take(data["codes"], ids // 8, 16, 1)
        if self.bits > 2:
            codes = codes | lookup.take(data["residual"], ids // 8, self._fine, 1) << 16
        wanted = (ids % 8)[:, None, None] == np.arange(8)[:, None]
        points = e8p.decode(codes[:, 0], self.bits)
        return data["scale"] * jnp.sum(jnp.where(wanted, points, 0), axis=1)

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"e8p_matmul, codes of {8 * self.bits} bits"
