"""Uniform integers: codes of 2, 3, 4 or 8 bits, a scale and an optional zero point per group."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.fields import check_fields
from jaxquant.core.magnitude import exponent, shifted
from jaxquant.core.protocols import LevelFormat, OpArguments
from jaxquant.core.straight_through import nearest_codes
from jaxquant.formats.op_format import WHOLE_BITS, OpFormat
from jaxquant.formats.scales import (
    as_stored,
    check_grouping,
    check_scales,
    check_values,
    group_sizes,
    rows_per_group,
)
from pallas_kernels.codecs import layout

Spread = TypeVar("Spread")


class Grid(NamedTuple):
    """Scales and zero points of a matrix or of one group: value = scale * (code - zero).

    Attributes:
      scale: float32 [..., n].
      zero: int32 [..., n]; zeros for symmetric codes.
    """

    scale: Float[Array, "... n"]
    zero: Int[Array, "... n"]


@dataclasses.dataclass(frozen=True)
class Integer(LevelFormat, OpFormat):
    """Packed integers, w = scale * (code - zero).

    Attributes:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: consecutive rows (input channels) that share a scale; -1 or "channel" for one
        scale per output channel, "tensor" for one per matrix.
      symmetric: whether codes have no zero point. Otherwise the scale and a zero point of `bits`
        bits cover the min-max range of each group, extended to include zero.
      mse: search the clipping range of each group for the least squared error.
      scale_dtype: storage dtype of the scales, "float16", "bfloat16" or "float32"; codes are chosen
        with the stored scale.
      pad: allow a group size that does not divide k; the last group is then short.
      clip: fraction of the range kept, in (0, 1]; weights outside are clamped.

    >>> import jax.numpy as jnp
    >>> f = Integer(bits=4, group_size=2, symmetric=False)
    >>> data = f.encode(jnp.array([[0.0], [1.5], [-3.0], [0.0]]))
    >>> f.dequantize(data, 4).ravel().round(2).tolist()
    [0.0, 1.5, -3.0, 0.0]
    """

    bits: int = dataclasses.field(default=4, metadata=WHOLE_BITS)
    group_size: int | Literal["channel", "tensor"] = 64
    symmetric: bool = False
    mse: bool = False
    scale_dtype: str = "float16"
    pad: bool = False
    clip: float = 1.0

    storage: ClassVar[str] = "packed"
    integral: ClassVar[bool] = True
    fits: ClassVar[bool] = True
    trained: ClassVar[tuple[str, ...]] = ("scale",)  # arrays that healing may train

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits not in layout.BITS:
            raise ValueError(f"bits must be one of {layout.BITS}, got {self.bits}")
        check_grouping(self.group_size, self.scale_dtype)
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be in (0, 1], got {self.clip}")

    @property
    def wide(self) -> bool:  # type: ignore[override]
        """Whether scales of any magnitude can be stored."""
        return self.scale_dtype != "float16"

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if scales lose precision in their dtype on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        found = group_sizes(w, self.rows_per_group(len(w)), self.group_size == "tensor")
        return check_scales(found, self.limits[1], self.bits, self.scale_dtype)

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        self.rows_per_group(k)

    # --- codes ------------------------------------------------------------------------------

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def rows_per_group(self, k: int) -> int:
        """Return the number of rows that share a scale in a matrix of k rows.

        Raises:
          ValueError: the group size does not divide k and `pad` is off.
        """
        return rows_per_group(self.group_size, self.pad, k)

    def fit(self, w: Float[Array, "g n"]) -> Grid:
        """Return the grid of one group of rows: scale and zero point [n], or [1] for "tensor"."""
        axes = (-1, -2) if self.group_size == "tensor" else (-2,)
        low = jnp.minimum(w.min(axes), 0.0) * self.clip
        high = jnp.maximum(w.max(axes), 0.0) * self.clip
        low, high = (jnp.atleast_1d(a) for a in (low, high))
        if not self.mse:
            return self._grid(low, high)
        return self._search(w, low, high, axes)

    def _grid(self, low: Array, high: Array) -> Grid:
        bottom, top = self.limits
        if self.symmetric:
            scale = jnp.maximum(-low, high) / top
            return Grid(as_stored(scale, self.scale_dtype), jnp.zeros(scale.shape, jnp.int32))
        scale = as_stored((high - low) / (top - bottom), self.scale_dtype)
        zero = jnp.clip(jnp.round(bottom - low / scale), bottom, top)
        return Grid(scale, zero.astype(jnp.int32))

    def _search(self, w: Array, low: Array, high: Array, axes: tuple[int, ...]) -> Grid:
        """Search ranges from 100 % to 30 % in steps of 2 % for each group's least squared error."""

        e = exponent(w, axes)  # squares of w may overflow or underflow float32

        def error(shrink: Array) -> tuple[Grid, Array]:
            grid = self._grid(low * shrink, high * shrink)
            _, value = self.round(w, grid)
            return grid, jnp.atleast_1d(jnp.sum(shifted(w - value, -e) ** 2, axes))

        def better(best: tuple, shrink: Array) -> tuple[tuple, None]:
            new = error(shrink)
            take = new[1] < best[1]
            return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, best), None

        start = error(jnp.float32(1))
        best, _ = jax.lax.scan(better, start, 1 - 0.02 * jnp.arange(1, 36, dtype=jnp.float32))
        return best[0]

    def round(self, w: Float[Array, "... n"], grid: Grid) -> tuple[Array, Array]:
        """Return the nearest codes (int8) and their values; the grid broadcasts against w."""
        bottom, top = self.limits
        code = jnp.clip(jnp.round(w / grid.scale) + grid.zero, bottom, top).astype(jnp.int32)
        return code.astype(jnp.int8), grid.scale * (code - grid.zero)

    def rescaled(self, grid: Grid, factor: Array) -> Grid:
        """Return the grid with its scale multiplied by `factor`, rounded to the storage dtype."""
        return grid._replace(scale=as_stored(grid.scale * factor, self.scale_dtype))

    # --- storage ----------------------------------------------------------------------------

    def pack(self, codes: Int[Array, "k n"], grid: Grid) -> dict[str, Array]:
        """Return the packed arrays for codes and a grid.

        Args:
          codes: integers [k, n] or, one row per block, [k, 1, n].
          grid: scales and zero points [groups, n], or [1, 1] for one scale per matrix.
        """
        data = {
            "codes": layout.pack(codes.reshape(-1, codes.shape[-1]), self.bits),
            "scale": grid.scale.astype(self.scale_dtype),
        }
        if not self.symmetric:
            data["zero"] = layout.pack(grid.zero.astype(jnp.int32).T, self.bits).T
        return data

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Round a matrix to nearest and pack it.

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        check_values(self, w)
        grid = self.grids(w)
        rows = spread(grid, self.rows_per_group(w.shape[0]), w.shape[0])
        return self.pack(self.round(w, rows)[0], grid)

    def grids(self, w: Float[Array, "k n"]) -> Grid:
        """Return the grid [groups, n] of all groups of rows."""
        k, n = w.shape
        g = self.rows_per_group(k)
        # The last group is padded with copies of the last row, which do not change its range.
        w = jnp.pad(w, ((0, -k % g), (0, 0)), mode="edge")
        return jax.vmap(self.fit)(w.reshape(-1, g, n))

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        arrays = (data["codes"], data["scale"], data.get("zero"))
        return arrays, {"bits": self.bits, "group_size": self.rows_per_group(k)}

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        codes = layout.unpack_rows(data["codes"], self.bits, ids)
        grid = self.stored_grid(data)
        group = ids // self.rows_per_group(k)
        row = jax.tree.map(lambda a: a[jnp.minimum(group, a.shape[0] - 1)], grid)
        return row.scale * (codes - row.zero)

    # --- levels -----------------------------------------------------------------------------

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest code."""
        return self.limits

    @property
    def reach(self) -> float:
        """The largest level in units of the scale; with zero points, the number of codes - 1."""
        bottom, top = self.limits
        return float(top if self.symmetric else top - bottom)

    def make_grid(self, scale: Array, zero: Array | None = None) -> Grid:
        """Return a grid of these scales and zero points; None means zero points of 0."""
        return Grid(scale, jnp.zeros(scale.shape, jnp.int32) if zero is None else zero)

    def zero_of(self, grid: Grid) -> Array:
        """Return the zero points as float32."""
        return grid.zero.astype(jnp.float32)

    def stored(self, scale: Float[Array, "g n"]) -> Grid:
        """Return the grid of these scales, rounded to the storage dtype."""
        return self.make_grid(as_stored(scale, self.scale_dtype))

    def level(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the nearest code to v minus the zero point, with v in units of the scale."""
        return jnp.clip(jnp.round(v) + zero, *self.limits) - zero

    def inside(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Bool[Array, "..."]:
        """Return whether v, in units of the scale, is within the range of the codes.

        With zero points, the comparison is made after rounding.
        """
        if self.symmetric:
            return super().inside(v, zero)
        bottom, top = self.limits
        rounded = jnp.round(v) + zero
        return (rounded >= bottom) & (rounded <= top)

    def place(self, codes: Int[Array, "..."]) -> Int[Array, "..."]:
        """Return the position of each code among the levels, which is the code itself."""
        return codes

    def value_at(self, place: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
        """Return the values of the codes at these positions."""
        return grid.scale * (place - grid.zero)

    def nearest(self, w: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """Return the matrix rounded to nearest, with straight-through derivatives.

        Derivatives go through the scales too.
        """
        grid = spread(self.grids(w), self.rows_per_group(w.shape[0]), w.shape[0])
        zero = jax.lax.stop_gradient(grid.zero)
        return grid.scale * (nearest_codes(w / grid.scale, zero, self.limits) - zero)

    def stored_grid(self, data: dict[str, Array]) -> Grid:
        scale = data["scale"].astype(jnp.float32)
        if self.symmetric:
            return Grid(scale, jnp.zeros(scale.shape, jnp.int32))
        return Grid(scale, layout.unpack(data["zero"].T, self.bits, scale.shape[-1]).T)

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"packed_matmul, {self.bits}-bit words"


def spread(grid: Spread, rows: int, k: int) -> Spread:
    """Repeat the grid of each group for each of its rows: [groups, n] -> [k, n].

    Args:
      grid: arrays [groups, n]; a grid with a single group is returned unchanged.
      rows: number of rows per group.
      k: number of rows of the matrix.
    """
    if jax.tree.leaves(grid)[0].shape[0] == 1:
        return grid
    return jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0)[:k], grid)
