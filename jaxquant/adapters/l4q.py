"""L4Q: a low-rank change and the steps of the grid are trained together on the rounded sum."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.adapters.adapted import LORA_A as A
from jaxquant.adapters.adapted import LORA_B as B
from jaxquant.adapters.lora import check_fits, check_rank, random_a, scaling_of
from jaxquant.adapters.pooled import offset_format, with_offsets
from jaxquant.adapters.requantized import Requantized, check_integer, summed
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Data, Format, Known
from jaxquant.estimators.bins import in_bin
from jaxquant.formats.integer import spread
from jaxquant.formats.offset import Offset, Shifted


@dataclasses.dataclass(frozen=True)
class L4Q(Requantized):
    """y = x Q(W + scaling * A B), with A, B and the scales and offsets of Q trained together.

    W stays in floating point until the merge, which stores the codes of the last rounding: the
    merged model computes what was trained, bit for bit. The backward pass keeps x, W, A, B, scales
    and offsets, and rounds again. A weight whose format is not an `Offset` is put into one, as for
    `QALoRA`; its levels must be those of `Integer`.

    Attributes:
      rank: number of columns of A [k, rank], at least 1 and at most min(k, n).
      alpha: numerator of `scaling`, which is alpha / rank; positive. Default: twice the rank.
      init: "format" (the default) starts from the grid and the codes that the quantized weight
        has: W is its float value, moved into the bin of its code where it is outside. "range"
        starts from the floats and scales max(|min W / lowest code|, |max W / highest code|), as in
        the paper. Without the argument `floats` of `jaxquant.adapt`, both start from the values of
        the codes.
      dtype: dtype in which A and B are kept, "bfloat16" or "float32" (the default).
    Raises:
      ValueError: a field is out of its range; or, at `jaxquant.adapt`, the rank exceeds what a
        matrix allows, or its format does not suit.

    Source: Jeon et al. 2024, arXiv:2402.04902; it has no released code.

    >>> L4Q(rank=4, alpha=2).scaling
    0.5
    """

    rank: int
    alpha: float | None = None
    init: Literal["format", "range"] = "format"
    dtype: Literal["bfloat16", "float32"] = "float32"

    floating: ClassVar[bool] = True
    needs_floats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_rank(self.rank, self.alpha)

    @property
    def scaling(self) -> float:
        """The factor of the low-rank change."""
        return scaling_of(self.rank, self.alpha)

    def labels(self, format: Any) -> Mapping[str, str]:
        return {A: A, B: B, "scale": "scale", "offset": "scale"}

    def home(self, format: Any) -> Format:
        """Return the format with offsets in which the merged matrix is stored."""
        return offset_format(format)

    def check(self, format: Format, k: int, n: int) -> None:
        """Raise ValueError unless matrices [k, n] in this format can be adapted this way."""
        check_integer("L4Q learns the steps of integers", self.home(format), format)
        format.check_shape(k, n)
        check_fits(self.rank, k, n)

    def start(self, format: Any, data: Data, known: Known) -> Data:
        home: Any = self.home(format)
        data = data if home == format else with_offsets(format, home, data)
        w = home.decode(data, known.k) if known.floats is None else known.floats
        if self.init == "range":
            grid = _range_grid(home, w)
        else:
            grid = home.stored_grid(data)
            rows = spread(grid, home.rows_per_group(known.k), known.k)
            values = home.decode(data, known.k)
            w = in_bin(w, values, rows.base.scale, lambda a: home.round(a, rows)[1])
        return {
            "codes": w,
            "scale": grid.base.scale,
            "offset": grid.offset,
            A: random_a(known.key, known.k, self.rank).astype(self.dtype),
            B: jnp.zeros((self.rank, known.n), self.dtype),
        }

    def merged(self, format: Any, data: Data, k: int) -> Data:
        w, grid = self._whole(data), self._grid(format, data)
        rows = spread(grid, format.rows_per_group(k), k)
        # The barriers keep XLA from fusing the rounding with other code, which could change it.
        w, rows = jax.lax.optimization_barrier((w, rows))
        return format.pack(format.round(w, rows)[0], grid)

    def cotangents(self, format: Any, data: Data, g: Float[Array, "k n"]) -> Data:
        """Return the cotangents of all arrays.

        Let v = (W + sAB - offset) / scale, c the level nearest to it, and M = 1 inside the range:

            dW = g M;  dA = s dW B^T;  dB = s A^T dW;  doffset = sum g (1 - M);
            dscale = sum g (c - v inside, c outside), summed over the rows of a group.
        """
        count = format.rows_per_group(len(g))
        rows = spread(self._grid(format, data), count, len(g))
        v = (self._whole(data) - rows.offset) / rows.base.scale
        inside = format.format.inside(v, jnp.zeros(()))
        level = format.format.level(v, jnp.zeros(()))
        within = jnp.where(inside, g, 0.0)
        a, b = (data[name].astype(jnp.float32) for name in (A, B))
        return {
            A: self.scaling * (within @ b.T),
            B: self.scaling * (a.T @ within),
            "scale": summed(count, g * jnp.where(inside, level - v, level)),
            "offset": summed(count, g - within),
            "codes": within,
        }

    def _whole(self, data: Data) -> Float[Array, "k n"]:
        w = data["codes"].astype(jnp.float32)
        return w + self.scaling * (data[A].astype(jnp.float32) @ data[B].astype(jnp.float32))

    def _grid(self, format: Offset, data: Data) -> Shifted:
        """Return the scales and offsets as they will be stored."""
        base = format.format.stored(data["scale"])
        return Shifted(base, data["offset"].astype(format.dtype).astype(jnp.float32))


def _range_grid(format: Offset, w: Float[Array, "k n"]) -> Shifted:
    """Return the paper's initial grid: it reaches both ends of the range, without offsets."""
    k, n = w.shape
    g = format.rows_per_group(k)
    w = jnp.pad(w, ((0, -k % g), (0, 0)), mode="edge").reshape(-1, g, n)
    low, high = format.format.ends
    scale = jnp.maximum(jnp.abs(w.min(1) / low), jnp.abs(w.max(1) / high))
    return Shifted(format.format.stored(scale), jnp.zeros_like(scale))
