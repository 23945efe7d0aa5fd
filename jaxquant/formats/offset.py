"""Offset: levels of another format, shifted by a real number per group of rows and output."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.core.fields import check_fields
from jaxquant.core.magnitude import exponent, shifted
from jaxquant.core.protocols import Grid, GridFormat, LevelFormat
from jaxquant.core.straight_through import through as straight
from jaxquant.formats.integer import spread
from jaxquant.formats.scales import (
    SCALE_DTYPES,
    check_scales,
    check_values,
    group_sizes,
    rescaled,
    through,
)
from pallas_kernels import activations as forms

WIDER_OFFSETS = 'use Offset(dtype="bfloat16") or "float32", or rescale the weights'


class Shifted(NamedTuple):
    """The grid of a matrix or of one group: value = value in `base` + offset.

    Attributes:
      base: grid of the format that is shifted.
      offset: float32 [..., n].
    """

    base: Grid
    offset: Float[Array, "... n"]


@dataclasses.dataclass(frozen=True)
class Offset(GridFormat):
    """w = scale * level + offset, with one scale and one offset per group of rows and output.

    The offset is a float, so anything that is constant within a group can be added to it without
    rounding the weights again; a merge of QA-LoRA relies on that. A product is that of the shifted
    format, plus the sums of the inputs over each group times the offsets.

    Attributes:
      format: format of the levels, whose zero point (if it had one) the offset replaces: `Integer`
        with `symmetric=True`, or a table such as `NormalFloat`; with groups of rows, or one group
        per output.
      dtype: storage dtype of the offsets, "float16" (the default), "bfloat16" or "float32".
      mse: search the clipping range of each group for the least squared error. Default: False.
    Raises:
      ValueError: `dtype` is another, or `format` has zero points, scales that are quantized, or one
        scale for the whole matrix.

    >>> from jaxquant.formats import Integer
    >>> f = Offset(Integer(bits=2, group_size=4, symmetric=True))
    >>> data = f.encode(jnp.array([[1.0], [2.0], [4.0], [3.0]]))
    >>> f.dequantize(data, 4).ravel().tolist(), data["offset"].tolist()
    ([1.0, 2.0, 4.0, 3.0], [[3.0]])
    """

    format: LevelFormat
    dtype: str = "float16"
    mse: bool = False

    fits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype not in SCALE_DTYPES:
            raise ValueError(f"dtype must be one of {SCALE_DTYPES}, got {self.dtype!r}")
        if not isinstance(self.format, LevelFormat) or not self.format.learnable:
            raise ValueError(
                "format must have levels and scales that are not quantized (Integer, NormalFloat "
                f"without double_quant, ...), got {self.format}"
            )
        if not self.format.symmetric or self.format.group_size == "tensor":
            raise ValueError(
                "format must have no zero points, which offsets replace, and scales per group of "
                f"rows or per output: symmetric=True, group_size=64 for example; got {self.format}"
            )

    @property
    def wide(self) -> bool:  # type: ignore[override]
        """Whether scales and offsets of any magnitude can be stored."""
        return self.format.wide and self.dtype != "float16"

    @property
    def trained(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the arrays that healing may train."""
        return (*self.format.trained, "offset")

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        self.format.check_shape(k, n)

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if scales lose precision in their dtype on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the scales or of the offsets.
        """
        groups = group_sizes(w, self.rows_per_group(len(w)))
        lost = self.format.check(w)
        check_scales(groups, 1.0, 1, self.dtype, WIDER_OFFSETS, "offsets")
        return lost

    # --- grids and codes --------------------------------------------------------------------------

    def rows_per_group(self, k: int) -> int:
        """Return the number of rows that share a scale and an offset in a matrix of k rows.

        Raises:
          ValueError: the group size does not divide k and `pad` is off.
        """
        return self.format.rows_per_group(k)

    def grids(self, w: Float[Array, "k n"]) -> Shifted:
        """Return the grid [groups, n] of all groups of rows."""
        k, n = w.shape
        g = self.rows_per_group(k)
        # The last group is padded with copies of the last row, which do not change its range.
        w = jnp.pad(w, ((0, -k % g), (0, 0)), mode="edge")
        return jax.vmap(self.fit)(w.reshape(-1, g, n))

    def fit(self, w: Float[Array, "g n"]) -> Shifted:
        """Return the scales and offsets [n] of one group of rows."""
        low, high = w.min(-2), w.max(-2)
        if not self.mse:
            return self._between(low, high)
        middle, half = (low + high) / 2, (high - low) / 2
        e = exponent(w, (-2,))  # squares of w may overflow or underflow float32

        def error(shrink: Array) -> tuple[Shifted, Array]:
            grid = self._between(middle - half * shrink, middle + half * shrink)
            return grid, jnp.sum(shifted(w - self.round(w, grid)[1], -e) ** 2, -2)

        def better(best: tuple, shrink: Array) -> tuple[tuple, None]:
            new = error(shrink)
            take = new[1] < best[1]
            return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, best), None

        start = error(jnp.float32(1))
        best, _ = jax.lax.scan(better, start, 1 - 0.02 * jnp.arange(1, 36, dtype=jnp.float32))
        return best[0]

    def _between(self, low: Array, high: Array) -> Shifted:
        """Return the grid whose lowest and highest levels are these."""
        bottom, top = self.format.ends
        base = self.format.stored((high - low) / (top - bottom))
        return self._centred(base, (low + high) / 2)

    def _centred(self, base: Grid, middle: Array) -> Shifted:
        """Return the grid of these scales, with the middle of its range as close as can be."""
        offset = middle - base.scale * sum(self.format.ends) / 2
        return Shifted(base, through(offset, self.dtype))

    def rescaled(self, grid: Shifted, factor: Array) -> Shifted:
        """Return the grid with its scale multiplied by `factor` about the middle of its range."""
        middle = grid.offset + grid.base.scale * sum(self.format.ends) / 2
        return self._centred(self.format.rescaled(grid.base, factor), middle)

    def round(self, w: Float[Array, "... n"], grid: Shifted) -> tuple[Array, Array]:
        """Return the nearest codes (int8) and their values; the grid broadcasts against w."""
        codes, values = self.format.round(w - grid.offset, grid.base)
        return codes, values + grid.offset

    def stored_grid(self, data: dict[str, Array]) -> Shifted:
        """Return the grid of packed arrays."""
        return Shifted(self.format.stored_grid(data), data["offset"].astype(jnp.float32))

    # --- storage ----------------------------------------------------------------------------------

    def pack(self, codes: Int[Array, "..."], grid: Shifted) -> dict[str, Array]:
        """Return the packed arrays for codes and a grid.

        Args:
          codes: integers [k, n] or, one row per block, [k, 1, n].
          grid: scales and offsets [groups, n].
        """
        return {**self.format.pack(codes, grid.base), "offset": grid.offset.astype(self.dtype)}

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Round a matrix to nearest and pack it.

        Raises:
          ValueError: the weights are outside the range of the scales or of the offsets, or the
            group size does not divide k and `pad` is off.
        """
        check_values(self, w)
        grid = self.grids(w)
        rows = spread(grid, self.rows_per_group(len(w)), len(w))
        return self.pack(self.round(w, rows)[0], grid)

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        """Return the packed arrays of a matrix 2**e times as large."""
        return rescaled(self.format.scaled(data, e), e, "offset")

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        group = jnp.arange(k) // self.rows_per_group(k)
        return self.format.decode(levels(data), k) + data["offset"].astype(jnp.float32)[group]

    def outputs(self, data: dict[str, Array]) -> int:
        return self.format.outputs(data)

    # --- products ---------------------------------------------------------------------------------

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        y = self.format.matmul(x, levels(data), activations)
        rounded = forms.rounded(x, activations)
        if activations not in ("float", "codes"):  # kernels have the gradient of unrounded rows
            rounded = straight(x.astype(jnp.float32), rounded.astype(jnp.float32))
        sums = self.pooled(rounded)
        return y + sums @ data["offset"].astype(jnp.float32)

    def matmul_transposed(
        self, g: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        y = self.format.matmul_transposed(g, levels(data), k)
        of_groups = g.astype(jnp.float32) @ data["offset"].astype(jnp.float32).T
        return y + of_groups[:, jnp.arange(k) // self.rows_per_group(k)]

    def pooled(self, x: Float[Array, "m k"]) -> Float[Array, "m g"]:
        """Return the sum of every row over each group of inputs, in float32.

        Args:
          x: the rows.

        >>> from jaxquant.formats import Integer
        >>> Offset(Integer(4, 2, symmetric=True)).pooled(jnp.array([[1.0, 2.0, 3.0, 4.0]])).tolist()
        [[3.0, 7.0]]
        """
        m, k = x.shape
        g = self.rows_per_group(k)
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -k % g)))
        return jnp.sum(x.reshape(m, x.shape[1] // g, g), axis=-1)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        group = jnp.arange(k) // self.rows_per_group(k)
        offset = data["offset"].astype(jnp.float32)[:, ids]
        return self.format.columns(levels(data), ids, k) + offset[group]

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        offset = data["offset"].astype(jnp.float32)[ids // self.rows_per_group(k)]
        return self.format.rows(levels(data), ids, k) + offset

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"{self.format.kernel()}, and offsets of groups"


def levels(data: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays of the shifted format, without the offsets.

    Args:
      data: packed arrays of an `Offset`.
    """
    return {name: a for name, a in data.items() if name != "offset"}
