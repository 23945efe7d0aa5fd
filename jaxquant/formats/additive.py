"""Additive codebooks (AQLM): groups of rows, each coded as a scaled sum of learned vectors."""

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.hosts import on_host
from jaxquant.core.magnitude import exponent, shifted
from jaxquant.core.protocols import OpArguments
from jaxquant.formats.codebook_format import CodebookFormat
from jaxquant.formats.kmeans import residual_kmeans
from jaxquant.formats.op_format import OpFormat
from jaxquant.formats.scales import RESCALE, as_stored, check_scales, through
from pallas_kernels.codecs import lookup


class Codebooks(NamedTuple):
    """Codebooks and scales of a matrix.

    Attributes:
      tables: M float32 arrays [1, K, group].
      scale: float32 [1, n].
    """

    tables: tuple[Float[Array, "... K d"], ...]
    scale: Float[Array, "... n"]


@dataclasses.dataclass(frozen=True)
class Additive(CodebookFormat, OpFormat):
    """w = scale * (sum of one vector from each codebook), with codebooks learned for each matrix.

    Attributes:
      codebooks: number M of vectors added for each group of rows.
      bits: number of bits B per code, up to 16 and a multiple of 2 or 3; a codebook has 2**B
        vectors. AQLM's 2-bit layouts are 2 x 8 and 1 x 16 with groups of 8.
      group: number of consecutive rows (input channels) that a code covers.

    Source: Egiazarian et al. 2024, arXiv:2401.06118. This implementation differs from the paper:
    the scale is the rms of an output channel, not its norm.

    >>> f = Additive(codebooks=1, bits=2, group=2)
    >>> data = f.encode(jnp.array([[3.0], [-3.0], [3.0], [-3.0]]))
    >>> {name: a.shape for name, a in data.items()}
    {'codes': (1, 1), 'codebooks': (1, 4, 2), 'scale': (1, 1)}
    >>> f.dequantize(data, 4).ravel().tolist()
    [3.0, -3.0, 3.0, -3.0]
    """

    codebooks: int = 2
    bits: int = 8
    group: int = 8

    storage: ClassVar[str] = "additive"
    wide: ClassVar[bool] = False  # type: ignore[misc]
    trained: ClassVar[tuple[str, ...]] = ("codebooks", "scale")  # arrays that healing may train

    def __post_init__(self) -> None:
        check_fields(self)
        lookup.digit(self.bits)
        check_positive(self, "codebooks", "group")

    @property
    def tile(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns that one code covers."""
        return self.group, 1

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        if k % self.group:
            raise ValueError(
                f"additive codes cover {self.group} rows, and {self.group} does not divide "
                f"k = {k}; choose a group that does"
            )

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if float16 scales lose precision on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        e = exponent(w, 0)
        rms = on_host(jnp.sqrt(jnp.mean(shifted(w, -e) ** 2, 0))).astype(np.float64)
        return check_scales(np.ldexp(rms, on_host(e[0])), 1.0, self.bits, "float16", RESCALE)

    # --- codes ------------------------------------------------------------------------------

    def rows_per_group(self, k: int) -> int:
        """Return k, since one set of codebooks and scales serves all rows."""
        return k

    @partial(jax.jit, static_argnums=0)
    def learn(self, w: Float[Array, "k n"], weights: Float[Array, "k"], key: Array) -> Codebooks:
        """Learn codebooks by residual k-means; weights[i] weights the squared errors of row i."""
        scale = as_stored(jnp.sqrt(jnp.mean(w**2, 0, keepdims=True)), "float16")
        mass = jnp.broadcast_to(weights[:, None] * scale**2, w.shape)
        sizes = (1 << self.bits,) * self.codebooks
        tables = residual_kmeans(self._vectors(w / scale), self._vectors(mass), sizes, key)
        return self.stored(Codebooks(tuple(t[None] for t in tables), scale))

    def _vectors(self, w: Float[Array, "k n"]) -> Float[Array, "N group"]:
        k, n = w.shape
        return jnp.moveaxis(w.reshape(k // self.group, self.group, n), 1, 2).reshape(-1, self.group)

    def stored(self, grid: Codebooks) -> Codebooks:
        """Return the grid rounded to float16."""
        return jax.tree.map(lambda a: through(a, "float16"), grid)

    def grids(self, w: Float[Array, "k n"]) -> Codebooks:
        """Learn codebooks by k-means with equal weights."""
        return self.learn(w, jnp.ones(len(w)), jax.random.key(0))

    def rescaled(self, grid: Codebooks, factor: Array) -> Codebooks:
        """Return the grid with its scales multiplied by `factor`, rounded to float16."""
        return self.stored(grid._replace(scale=grid.scale * factor))

    def search(
        self,
        target: Float[Array, "d n"],
        row: Codebooks,
        root: Float[Array, "d d"] | None,
        beam: int,
    ) -> tuple[Int32[Array, "m n"], Float[Array, "d n"]]:
        """Return codes near in the metric root root^T, found by beam search, and their values."""
        target, tables = target / row.scale, row.tables
        if root is not None:
            target, tables = root.T @ target, tuple(t @ root for t in tables)
        code = lookup.nearest(target, tables, beam)
        return code, lookup.total(code, row.tables).T * row.scale

    def values(self, codes: Int[Array, "g m n"], grid: Codebooks) -> Float[Array, "k n"]:
        """Return the matrix that these codes represent."""
        q = lookup.total(jnp.moveaxis(codes, 1, 0), [t[0] for t in grid.tables])
        return jnp.swapaxes(q, 1, 2).reshape(-1, codes.shape[-1]) * grid.scale

    # --- storage ----------------------------------------------------------------------------

    def pack(self, codes: Int[Array, "g m n"], grid: Codebooks) -> dict[str, Array]:
        """Return the packed arrays for the codes of g groups of rows and a grid."""
        return {
            "codes": lookup.pack(codes, self.bits),
            "codebooks": jnp.concatenate(grid.tables).astype("float16"),
            "scale": grid.scale.astype("float16"),
        }

    def unpack(self, data: dict[str, Array], k: int) -> tuple[Int32[Array, "g m n"], Codebooks]:
        """Invert `pack`."""
        codes = lookup.unpack(data["codes"], self.bits, k // self.group, self.codebooks)
        return codes, self._grid(data)

    def rounded(self, w: Float[Array, "k n"], grid: Codebooks, beam: int) -> Int32[Array, "g m n"]:
        """Return the codes of all groups that are nearest in squared error."""
        row = jax.tree.map(lambda a: a[0], grid)
        groups = w.reshape(-1, self.group, w.shape[1])
        return jax.lax.map(lambda t: self.search(t, row, None, beam)[0], groups)

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        static = {"bits": self.bits, "group": self.group}
        return (data["codes"], data["codebooks"], data["scale"]), static

    def _grid(self, data: dict[str, Array]) -> Codebooks:
        tables = jnp.split(data["codebooks"].astype(jnp.float32), self.codebooks)
        return Codebooks(tuple(tables), data["scale"].astype(jnp.float32))

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        codes = lookup.take(data["codes"], ids // self.group, self.bits, self.codebooks)
        grid = self._grid(data)
        # Select column ids % group of every table.
        tables = [t[0].T[ids % self.group][..., None] for t in grid.tables]
        pick = jax.vmap(lambda codes, tables: lookup.total(codes, tables)[..., 0])
        return pick(codes, tables) * grid.scale

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"additive_matmul, {self.codebooks} x {self.bits}-bit codebooks"
