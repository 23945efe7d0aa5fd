"""Trellis codes: 16 x 16 tiles of weights as paths in a bit-shift trellis, with block scales."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from jaxquant.core.fields import check_fields
from jaxquant.core.magnitude import exponent, shifted
from jaxquant.core.protocols import Format, GridFormat, OpArguments
from jaxquant.formats.op_format import WHOLE_BITS, OpFormat
from jaxquant.formats.scales import check_wide, rescaled
from pallas_kernels import viterbi
from pallas_kernels.codecs import trellis

SIDE = trellis.SIDE
# Best scale for Gaussian weights in units of their rms, by rate, and the resulting distortion
# ("mul1", L = 12), measured by `tests/benchmarks/trellis_distortion.py`.
_SCALE = (1.0, 0.9, 1.03, 1.1, 1.15, 1.15, 1.15, 1.15, 1.15)
DISTORTION = (1.0, 0.283, 0.0729, 0.0190, 0.00503, 0.00135, 0.00036, 0.0001, 0.00003)


class TrellisGrid(NamedTuple):
    """The scale and the rate of each block of rows.

    Attributes:
      scale: float32 [groups, 1].
      rate: int32 [groups], index into the sorted distinct rates.
    """

    scale: Float[Array, "... 1"]
    rate: Int32[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Trellis(GridFormat, OpFormat):
    """QTIP's trellis-coded quantization; rotate the weights first, so that they look Gaussian.

    Attributes:
      rates: bits per weight, 0 to 8, of equal blocks of rows, first to last; a single rate serves
        all.
      L: number of bits of a state. Going from 12 to 16 closes a quarter of the distortion's gap to
        Shannon's bound and makes the search 16 times as long.
      code: function from states to values, one of `pallas_kernels.codecs.trellis.CODES`.

    Source: Tseng et al. 2024, arXiv:2406.11235. Rates that differ by block are ours.

    >>> f = Trellis(rates=(2,), L=8)
    >>> data = f.encode(jnp.ones((16, 32)))
    >>> {name: a.shape for name, a in data.items()}
    {'codes': (16, 2), 'scale': (1, 1)}
    """

    rates: tuple[int, ...] = dataclasses.field(default=(2,), metadata=WHOLE_BITS)
    L: int = 12
    code: str = "mul1"

    storage: ClassVar[str] = "trellis"
    tile: ClassVar[tuple[int, int]] = (SIDE, SIDE)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.code not in trellis.CODES:
            raise ValueError(f"code must be one of {', '.join(trellis.CODES)}, got {self.code!r}")
        whole = all(isinstance(rate, int) for rate in self.rates)
        if not whole or not any(self.rates) or min(self.rates) < 0:
            raise ValueError(
                f"rates must be whole numbers of bits from 0 to 8, not all 0, got {self.rates}"
            )
        for rate in {*self.rates} - {0}:
            trellis.check(self.L, rate, self.V)

    @property
    def V(self) -> int:
        """The number of weights per step of the trellis."""
        return trellis.CODES[self.code]

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        if k % (SIDE * len(self.rates)) or n % SIDE:
            raise ValueError(
                f"a trellis has tiles of 16 x 16 in {len(self.rates)} blocks of rows, so "
                f"k must be a multiple of {SIDE * len(self.rates)} and n of 16, got k = "
                f"{k}, n = {n}"
            )

    def rows_per_group(self, k: int) -> int:
        """Return the number of rows of one block."""
        return k // len(self.rates)

    # --- codes ------------------------------------------------------------------------------

    def grids(self, w: Float[Array, "k n"]) -> TrellisGrid:
        """Return the best scale for the rms of each block, and the block's rate."""
        blocks = w.astype(jnp.float32).reshape(len(self.rates), -1)
        e = exponent(blocks, 1)
        rms = shifted(jnp.sqrt(jnp.mean(shifted(blocks, -e) ** 2, 1)), e[:, 0])
        scale = jnp.where(rms > 0, rms, 1e-30) * jnp.asarray([_SCALE[r] for r in self.rates])
        return TrellisGrid(scale[:, None], jnp.asarray(np.searchsorted(self._distinct, self.rates)))

    def rescaled(self, grid: TrellisGrid, factor: Array) -> TrellisGrid:
        """Return the grid with its scales multiplied by `factor`."""
        return grid._replace(scale=grid.scale * factor)

    @property
    def _distinct(self) -> list[int]:
        return sorted(set(self.rates))

    def round(
        self, target: Float[Array, "16 n"], row: TrellisGrid
    ) -> tuple[Int32[Array, "words t"], Float[Array, "16 n"]]:
        """Return the paths found nearest to the t = n / 16 tiles, and their values."""
        return self.round_where(target, row, None)

    def round_where(
        self, target: Float[Array, "16 n"], row: TrellisGrid, valid: Bool[Array, "t"] | None
    ) -> tuple[Int32[Array, "words t"], Float[Array, "16 n"]]:
        """Round as `round` does, but only the valid tiles; the others become zeros."""
        tiles = trellis.tiles(target / row.scale, self.V)
        most = 8 * max(self.rates)
        table = jnp.asarray(trellis.values(self.code, self.L, self.V))

        def search(tiles: Array, rate: int) -> tuple[Array, Array]:
            if rate == 0:
                return jnp.zeros((most, len(tiles)), jnp.int32), jnp.zeros_like(tiles)
            words, values = viterbi.encode(tiles, table, L=self.L, K=rate, V=self.V, valid=valid)
            return jnp.pad(words.T, ((0, most - 8 * rate), (0, 0))), values

        branches = [lambda tiles, rate=rate: search(tiles, rate) for rate in self._distinct]
        one = len(branches) == 1
        words, values = branches[0](tiles) if one else jax.lax.switch(row.rate, branches, tiles)
        return words, row.scale * trellis.untiled(values, self.V)

    # --- storage ----------------------------------------------------------------------------

    def pack(self, codes: Int32[Array, "b words t"], grid: TrellisGrid) -> dict[str, Array]:
        """Return the packed arrays for b blocks of 16 rows, each with the words of its rate."""
        per = len(codes) // len(self.rates)
        blocks = codes.reshape(len(self.rates), per, *codes.shape[1:])
        kept = [b[:, : 8 * rate] for b, rate in zip(blocks, self.rates, strict=True)]
        words = [b.reshape(-1, codes.shape[-1]) for b in kept]
        return {"codes": jnp.concatenate(words), "scale": grid.scale}

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Round a matrix to nearest and pack it.

        Raises:
          ValueError: the shape does not fit the tiles and blocks.
        """
        k, n = w.shape
        self.check_shape(k, n)
        grid = self.grids(w)
        group = np.arange(k // SIDE) * len(self.rates) * SIDE // k
        rows = jax.tree.map(lambda a: a[group], grid)
        blocks = w.astype(jnp.float32).reshape(-1, SIDE, n)
        return self.pack(jax.lax.map(lambda b: self.round(*b)[0], (blocks, rows)), grid)

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        static = {"rates": self.rates, "L": self.L, "code": self.code}
        return (data["codes"], data["scale"]), static

    def outputs(self, data: dict[str, Array]) -> int:
        return data["codes"].shape[-1] * SIDE

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        return self.dequantize(data, k)[ids]

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        rates = "/".join(map(str, self._distinct))
        return f"trellis_matmul, {self.code}, L = {self.L}, {rates} bits"


@dataclasses.dataclass(frozen=True)
class TrellisBudget(Format):
    """A `Trellis` whose rates per block of rows are chosen for a given average rate.

    Each bit goes to the block where it reduces the loss most. The rows should be sorted by energy
    and rotated in the same blocks first: `Rotation(block, sort=True)`. All matrices of a stack
    share rates.

    Attributes:
      bits: average number of bits per weight, above 0 and at most 8.
      block: number of rows in a block, a multiple of 16.
      L, code: see `Trellis`.

    Source: ours; reverse water-filling with a fixed-rate code in every block.

    >>> TrellisBudget(bits=2.5, block=32).planned(np.array([90.0, 1.0])).rates
    (4, 1)
    """

    bits: float = 2.0
    block: int = 128
    L: int = 12
    code: str = "mul1"

    tile: ClassVar[tuple[int, int]] = (SIDE, SIDE)
    wide: ClassVar[bool] = True
    plans: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.bits <= len(DISTORTION) - 1:
            raise ValueError(f"bits must be above 0 and at most 8, got {self.bits}")
        if self.block < SIDE or self.block % SIDE:
            raise ValueError(f"block must be a multiple of {SIDE}, got {self.block}")
        Trellis((1,), self.L, self.code)  # raises the error of a bad L or code

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return ""; nothing is lost within the range of float32 scales.

        Raises:
          ValueError: the weights are outside this range.
        """
        return check_wide(w)

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        """Return the packed arrays of a matrix 2**e times as large."""
        return rescaled(data, e, "scale")

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        if k % self.block:
            raise ValueError(f"blocks of {self.block} rows do not divide k = {k}")
        self.planned(np.ones(k // self.block)).check_shape(k, n)

    def planned(self, importance: Float[np.ndarray, "blocks"]) -> Trellis:
        """Allocate rates greedily: each bit goes where it reduces the loss most.

        Args:
          importance: loss per unit of relative distortion of each block.
        Returns:
          The `Trellis` with these rates.
        """
        rates = np.zeros(len(importance), int)
        gain = np.append(-np.diff(DISTORTION), 0.0)
        for _ in range(int(self.bits * len(rates) + 1e-6)):
            rates[np.argmax(importance * gain[rates])] += 1
        return Trellis(tuple(map(int, rates)), self.L, self.code)

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Encode with rates for blocks of equal importance, which take the same bytes."""
        return self.planned(np.ones(len(w) // self.block)).encode(w)

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        return self.planned(np.ones(k // self.block)).decode(data, k)
