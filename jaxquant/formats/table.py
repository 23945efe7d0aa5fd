"""Tables: scalar codes whose value is a scale times an entry of a fixed table.

A format defines its table and how scales are stored; `Table` does the rest. Rounders treat these
formats as they treat `Integer`: given a row of the grid, they round to the nearest value.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import LevelFormat, OpArguments
from jaxquant.formats.op_format import OpFormat
from jaxquant.formats.scales import (
    SCALE_DTYPES,
    as_stored,
    check_grouping,
    check_scales,
    check_values,
    group_sizes,
    rows_per_group,
)
from pallas_kernels.codecs import layout, tables


class Scales(NamedTuple):
    """Scales of a matrix or of one group, as they are after storage.

    Attributes:
      scale: float32 [..., n].
      parts: for scales that are themselves quantized, their codes and second-level scales,
        broadcast over the groups; else empty.
    """

    scale: Float[Array, "... n"]
    parts: dict[str, Array]


class Table(LevelFormat, OpFormat):
    """Base of table formats: w = scale * table[code], with one scale per group of rows.

    Attributes:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: consecutive rows (input channels) that share a scale; -1 or "channel" for one
        scale per output channel, "tensor" for one per matrix.
      scale_dtype: storage dtype of the scales; codes are chosen with the stored scale.
      pad: allow a group size that does not divide k; the last group is then short.
      table: values in the order of their codes, or the name of a float8 dtype whose bit patterns
        are the codes.
      largest: magnitude to which the largest weight of a group is mapped, by default the largest in
        the table.
    """

    bits: int
    group_size: int | Literal["channel", "tensor"]
    scale_dtype: str
    pad: bool
    fits: ClassVar[bool] = True
    storage: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        check_fields(self)
        check_grouping(self.group_size, self.scale_dtype)

    @property
    def table(self) -> tuple[float, ...] | str:
        raise NotImplementedError

    @property
    def largest(self) -> float:
        return float(np.abs(search(self.table)[0]).max())

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        self.rows_per_group(k)

    @property
    def wide(self) -> bool:  # type: ignore[override]
        """Whether scales of any magnitude can be stored."""
        return self.scale_dtype != "float16"

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if scales lose precision in their dtype on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        return check_scales(self.groups(w), self.largest, self.bits, self.scale_dtype)

    def groups(self, w: Float[Array, "k n"]) -> Float[np.ndarray, "g n"]:
        """Return the largest magnitude in each group."""
        return group_sizes(w, self.rows_per_group(len(w)), self.group_size == "tensor")

    # --- codes ------------------------------------------------------------------------------

    def rows_per_group(self, k: int) -> int:
        """Return the number of rows that share a scale in a matrix of k rows.

        Raises:
          ValueError: the group size does not divide k and `pad` is off.
        """
        return rows_per_group(self.group_size, self.pad, k)

    def grids(self, w: Float[Array, "k n"]) -> Scales:
        """Return the scales [groups, n] of all groups of rows ([1, 1] for one scale per matrix)."""
        k, n = w.shape
        g = self.rows_per_group(k)
        w = jnp.pad(jnp.abs(w), ((0, -k % g), (0, 0)))
        absmax = jnp.max(w.reshape(-1, g, n), 1)
        if self.group_size == "tensor":
            absmax = jnp.max(absmax, 1, keepdims=True)
        return self.stored(self.wanted(absmax))

    def fit(self, w: Float[Array, "g n"]) -> Scales:
        """Return the scales [n] of one group of rows."""
        return jax.tree.map(lambda a: a[0], self.grids(w))

    def rescaled(self, grid: Scales, factor: Array) -> Scales:
        """Return the grid with its scale multiplied by `factor`, rounded to the storage dtype."""
        return self.stored(grid.scale * factor)

    def wanted(self, absmax: Float[Array, "g n"]) -> Float[Array, "g n"]:
        """Return the scales for groups with these largest magnitudes, before storage."""
        return absmax / self.largest

    def stored(self, scale: Float[Array, "g n"]) -> Scales:
        """Return the grid of these scales, rounded to the storage dtype."""
        return Scales(as_stored(scale, self.scale_dtype), {})

    def round(self, w: Float[Array, "... n"], grid: Scales) -> tuple[Array, Array]:
        """Return the nearest codes (int8) and their values; the grid broadcasts against w."""
        values, codes, between = search(self.table)
        i = jnp.searchsorted(between, w / grid.scale, method="compare_all")
        return jnp.asarray(codes)[i], grid.scale * jnp.asarray(values)[i]

    # --- storage ----------------------------------------------------------------------------

    def pack(self, codes: Int[Array, "..."], grid: Scales) -> dict[str, Array]:
        """Return the packed arrays for codes and a grid.

        Args:
          codes: integers [k, n] or, one row per block, [k, 1, n].
          grid: scales [groups, n].
        """
        codes = codes.reshape(-1, codes.shape[-1])
        return {"codes": layout.pack(codes, self.bits), **self.pack_scales(grid)}

    def pack_scales(self, grid: Scales) -> dict[str, Array]:
        """Return the stored arrays of the scales."""
        return {"scale": grid.scale.astype(self.scale_dtype)}

    def opened(self, data: dict[str, Array]) -> dict[str, Array]:
        """Return packed arrays that each either split along columns or are shared by all columns.

        Formats that quantize their scales decode them here.
        """
        return data

    def stored_grid(self, data: dict[str, Array]) -> Scales:
        """Return the grid of packed arrays."""
        return Scales(self.scales(self.opened(data)).astype(jnp.float32), {})

    # --- levels -----------------------------------------------------------------------------

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        if isinstance(self.table, str):
            return -self.largest, self.largest
        return float(min(self.table)), float(max(self.table))

    def make_grid(self, scale: Array, zero: Array | None = None) -> Scales:
        """Return a grid of these scales; table formats have no zero points."""
        return Scales(scale, {})

    def level(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the nearest levels to v, in units of the scale."""
        return self.round(v, Scales(jnp.ones(()), {}))[1]

    @property
    def countable(self) -> bool:  # type: ignore[override]
        """Whether codes have positions among the levels: tables do, float8 dtypes do not."""
        return not isinstance(self.table, str)

    def place(self, codes: Int[Array, "..."]) -> Int[Array, "..."]:
        """Return the position of each code: the number of levels below its own."""
        levels = np.asarray(self.table, np.float32)
        places = np.searchsorted(search(tuple(levels))[0], levels)
        return jnp.asarray(places, jnp.int8)[codes]

    def value_at(self, place: Float[Array, "..."], grid: Scales) -> Float[Array, "..."]:
        """Return the values of the codes at these positions."""
        return grid.scale * jnp.asarray(search(self.table)[0])[place.astype(jnp.int32)]

    def scales(self, data: dict[str, Array]) -> Float[Array, "... g n"]:
        """Return the scales of opened packed arrays, in a dtype that the op accepts."""
        scale = data["scale"]
        return scale if scale.dtype.name in SCALE_DTYPES else scale.astype(jnp.float32)

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Round a matrix to nearest and pack it.

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        check_values(self, w)
        k = w.shape[0]
        grid = self.grids(w)
        rows = grid._replace(scale=grid.scale[jnp.arange(k) // self.rows_per_group(k)])
        return self.pack(self.round(w, rows)[0], grid)

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        arrays = (data["codes"], self.scales(self.opened(data)))
        group_size = self.rows_per_group(k)
        return arrays, {"table": self.table, "bits": self.bits, "group_size": group_size}

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        x, (data,) = _tied(x, data)
        return super().matmul(x, data, activations)

    def matmuls(
        self, x: Float[Array, "m k"], several: Sequence[dict[str, Array]], activations: str
    ) -> tuple[Float[Array, "m n"], ...]:
        return super().matmuls(*_tied(x, *several), activations)

    def matmul_transposed(
        self, g: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        g, (data,) = _tied(g, data)
        return super().matmul_transposed(g, data, k)

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        codes = layout.unpack_rows(data["codes"], self.bits, ids)
        scale = self.scales(self.opened(data))[ids // self.rows_per_group(k)]
        return scale.astype(jnp.float32) * tables.values(codes, self.table)

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"codebook_matmul, {self.bits}-bit words"


def _tied(x: Array, *several: dict[str, Array]) -> tuple[Array, list[dict[str, Array]]]:
    """Tie the scales to x, so that XLA does not hoist opened scales out of a decoding loop."""
    scales = [{name: a for name, a in data.items() if name != "codes"} for data in several]
    x, scales = jax.lax.optimization_barrier((x, scales))
    return x, [data | new for data, new in zip(several, scales, strict=True)]


@lru_cache
def search(table: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorted values of a table, their codes (int8) and the bounds between them.

    The bounds are such that a tie rounds to the even code.

    Args:
      table: values in the order of their codes; of equal values the first is used.
    Returns:
      Arrays values [m], codes [m] and bounds [m - 1], where `searchsorted(bounds, x)` is the index
      of the value nearest to x.

    >>> [a.tolist() for a in search((0.0, 1.0, 3.0, -1.0))]
    [[-1.0, 0.0, 1.0, 3.0], [3, 0, 1, 2], [-0.5000000596046448, 0.5, 1.9999998807907104]]
    """
    values, codes = np.unique(np.asarray(table, np.float32), return_index=True)
    between = (values[:-1] + values[1:]) / 2
    # `searchsorted` counts the bounds strictly below x: lowered by one ulp, a bound rounds ties up.
    rises = codes[:-1] % 2 == 1
    lowered = np.nextafter(between, np.float32(-np.inf))
    # The number below 0 is subnormal, which devices take for 0; the next that they tell from it:
    lowered = np.where(between == 0, -np.finfo(np.float32).tiny, lowered)
    between = np.where(rises, lowered, between)
    return values, codes.astype(np.int8), between
