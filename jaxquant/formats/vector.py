"""Learned vectors (VPTQ): consecutive outputs of an input channel coded by one codebook vector."""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.formats.codebook_format import CodebookFormat
from jaxquant.formats.kmeans import residual_kmeans
from jaxquant.formats.scales import check_half, through
from jaxquant.formats.tiled_format import TiledFormat
from pallas_kernels.codecs import lookup


class VectorGrid(NamedTuple):
    """Codebooks of a matrix and, with outliers, which rows have codebooks of their own.

    Attributes:
      tables: one float32 array per stage, [1, K, length], or [1, 2, K, length] with outliers.
      kind: int32 [k], 1 for outlier rows and else 0; a single entry without outliers.
    """

    tables: tuple[Float[Array, "... K d"], ...]
    kind: Int32[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Vector(CodebookFormat, TiledFormat):
    """w[i, j : j + length] is a codebook vector, plus one of a second codebook if `residual_bits`.

    Codebooks are learned for each matrix. There are no scales; use transforms for that.

    Attributes:
      length: number of consecutive output channels that a code covers.
      bits: number of bits per code, up to 16 and a multiple of 2 or 3; the codebook has 2**bits
        vectors.
      residual_bits: the same for a second codebook, learned on the residuals of the first; 0 for
        none.
      outliers: fraction of the rows (input channels) that have codebooks of their own: those with
        the largest second moment of the inputs (`Beam`), or else with the largest mean square of
        the weights. One bit per row marks them.

    Source: Liu et al. 2024, arXiv:2409.17066. This implementation differs from the paper: there
    are no column norms, and outlier rows use the same vector length and codebook sizes as the
    others.

    >>> f = Vector(length=2, bits=2, residual_bits=0)
    >>> data = f.encode(jnp.array([[3.0, -3.0, 1.0, 0.0]]))
    >>> {name: a.shape for name, a in data.items()}
    {'codes': (1, 2), 'codebook': (1, 4, 2)}
    >>> f.dequantize(data, 1).tolist()
    [[3.0, -3.0, 1.0, 0.0]]
    """

    length: int = 8
    bits: int = 8
    residual_bits: int = 8
    outliers: float = 0.0

    wide: ClassVar[bool] = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_fields(self)
        lookup.digit(self.bits)
        if self.residual_bits:
            lookup.digit(self.residual_bits)
        check_positive(self, "length")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers must be a fraction in [0, 1), got {self.outliers}")

    @property
    def tile(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns that one code covers."""
        return 1, self.length

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        if n % self.length:
            raise ValueError(
                f"vectors cover {self.length} outputs, and {self.length} does not divide n = {n}; "
                f"choose a length that does"
            )

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return ""; nothing is lost within the range of float16.

        Raises:
          ValueError: the weights are outside the range of float16.
        """
        return check_half(w)

    # --- codes ------------------------------------------------------------------------------

    def rows_per_group(self, k: int) -> int:
        """Return k, since all rows share codebooks, or 1 if rows can be outliers."""
        return 1 if self.outliers else k

    @partial(jax.jit, static_argnums=0)
    def learn(self, w: Float[Array, "k n"], weights: Float[Array, "k"], key: Array) -> VectorGrid:
        """Learn codebooks by residual k-means; weights[i] weights the squared errors of row i."""
        k, n = w.shape
        count = round(self.outliers * k)
        kind = jnp.zeros(k, jnp.int32).at[jnp.argsort(-weights)[:count]].set(1)
        mass = jnp.broadcast_to(weights[:, None], (k, n))
        vectors = w.reshape(-1, self.length)
        kinds = jnp.repeat(kind, n // self.length)[:, None]

        def tables(of: tuple[Array, Array]) -> tuple[Array, ...]:
            mine = jnp.where(kinds == of[0], mass.reshape(-1, self.length), 0.0)
            return residual_kmeans(vectors, mine, self._sizes, of[1])

        groups = 2 if self.outliers else 1
        learned = jax.lax.map(tables, (jnp.arange(groups), jax.random.split(key, groups)))
        if not self.outliers:
            return self.stored(VectorGrid(learned, kind[:1]))
        return self.stored(VectorGrid(tuple(t[None] for t in learned), kind))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(1 << b for b in (self.bits, self.residual_bits) if b)

    def stored(self, grid: VectorGrid) -> VectorGrid:
        """Return the grid with its tables rounded to float16."""
        return grid._replace(tables=tuple(through(t, "float16") for t in grid.tables))

    def grids(self, w: Float[Array, "k n"]) -> VectorGrid:
        """Learn codebooks by k-means; outliers are the rows with the most energy."""
        weights = jnp.mean(w**2, 1) if self.outliers else jnp.ones(len(w))
        return self.learn(w, weights, jax.random.key(0))

    def rescaled(self, grid: VectorGrid, factor: Array) -> VectorGrid:
        """Return the grid with its vectors multiplied by `factor`, rounded to float16."""
        return self.stored(grid._replace(tables=tuple(t * factor for t in grid.tables)))

    def search(
        self, target: Float[Array, "1 n"], row: VectorGrid, root: Array | None, beam: int
    ) -> tuple[Int32[Array, "m v"], Float[Array, "1 n"]]:
        """Return codes near in squared error, found by beam search, and their values.

        For a single row the metric is only a factor, so `root` has no effect.
        """
        tables = [t[row.kind] for t in row.tables] if self.outliers else row.tables
        code = lookup.nearest(target.reshape(-1, self.length).T, tables, beam)
        return code, lookup.total(code, tables).reshape(target.shape)

    def values(self, codes: Int[Array, "k m v"], grid: VectorGrid) -> Float[Array, "k n"]:
        """Return the matrix that these codes represent."""
        tables = [t[0] for t in grid.tables]
        if self.outliers:  # join the two tables and offset the codes of outlier rows
            codes = codes + grid.kind[:, None, None] * np.asarray(self._sizes)[:, None]
            tables = [t.reshape(-1, self.length) for t in tables]
        w = lookup.total(jnp.moveaxis(codes, 1, 0), tables)
        return w.reshape(len(codes), codes.shape[2] * self.length)

    # --- storage ----------------------------------------------------------------------------

    def pack(self, codes: Int[Array, "k m v"], grid: VectorGrid) -> dict[str, Array]:
        """Return the packed arrays for the codes of k rows and a grid."""
        k = codes.shape[0]
        data = {}
        for i, (name, codebook, bits) in enumerate(self._parts):
            data[name] = lookup.pack(codes[:, i : i + 1], bits)
            table = grid.tables[i].astype("float16")
            data[codebook] = table[0] if self.outliers else table
        if self.outliers:
            flags = jnp.pad(grid.kind, (0, -k % 32)).reshape(-1, 32)
            data["outliers"] = jnp.sum(flags << np.arange(32), axis=1, dtype=jnp.int32)
        return data

    @property
    def _parts(self) -> tuple[tuple[str, str, int], ...]:
        """For each stage, the names of its codes and of its codebook, and the number of bits."""
        parts = (
            ("codes", "codebook", self.bits),
            ("residual", "residual_codebook", self.residual_bits),
        )
        return parts if self.residual_bits else parts[:1]

    @property
    def trained(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the arrays that healing may train."""
        return tuple(codebook for _, codebook, _ in self._parts)

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        return self.values(*self.unpack(data, k))

    @property
    def spans(self) -> dict[str, int]:
        return {name: self.length for name, _, _ in self._parts}

    def unpack(self, data: dict[str, Array], k: int) -> tuple[Int32[Array, "k m v"], VectorGrid]:
        """Invert `pack`."""
        codes = [lookup.unpack(data[name], bits, k, 1) for name, _, bits in self._parts]
        return jnp.concatenate(codes, 1), self._grid(data, jnp.arange(k))

    def rounded(self, w: Float[Array, "k n"], grid: VectorGrid, beam: int) -> Int32[Array, "k m v"]:
        """Return the codes of all rows that are nearest in squared error."""
        shared = VectorGrid(tuple(t[0] for t in grid.tables), grid.kind[0])
        one = lambda t: self.search(t[0][None], shared._replace(kind=t[1]), None, beam)[0]
        return jax.lax.map(one, (w, jnp.broadcast_to(grid.kind, len(w))))

    def _grid(self, data: dict[str, Array], ids: Array) -> VectorGrid:
        """Return the grid with the kinds of rows `ids`."""
        tables = [data[codebook].astype(jnp.float32) for _, codebook, _ in self._parts]
        if not self.outliers:
            return VectorGrid(tuple(tables), jnp.zeros(1, jnp.int32))
        kind = data["outliers"][ids // 32] >> ids % 32 & 1
        return VectorGrid(tuple(t[None] for t in tables), kind)

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        codes = [lookup.take(data[name], ids, bits, 1) for name, _, bits in self._parts]
        return self.values(jnp.concatenate(codes, 1), self._grid(data, ids))

    def kernel(self) -> str:
        """Describe what runs a matmul, for `explain`."""
        sizes = " and ".join(map(str, self._sizes))
        return (
            f"no kernel for vector codebooks: XLA decodes the weight (vectors of {self.length}, "
            f"codebooks of {sizes} entries)"
        )
