"""Entropy coding: trellis-coded weights in one stream of a fixed number of bytes per matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int16

from jaxquant.codebooks.scales import check_wide
from jaxquant.fields import check_fields, check_positive
from jaxquant.magnitude import unit
from pallas_kernels import activations as forms
from pallas_kernels import coded, student, tcq
from pallas_kernels.coded import Coded

WORD = 16  # bits
SLOPE = 0.41  # squared steps that a bit is worth: the best for the codes of `tcq`
_TINY = 1e-30


class Row(NamedTuple):
    """What a row, or a chain of one, is rounded with (with a leading axis: many of them).

    Attributes:
      step: of its values.
      level: scale of the source over the step, quarter octaves.
      price: of a bit, in squared steps.
      prior: of the energy of values, in squared steps; what `price` has been charged for already.
    """

    step: Float[Array, "..."]
    level: Int[Array, "..."]
    price: Float[Array, "..."]
    prior: Float[Array, "..."]


Trial = Callable[[Float[Array, ""]], Coded]


@dataclasses.dataclass(frozen=True)
class EntropyCoded:
    """A step per row, trellis-coded values, arithmetic coding: each matrix in just `bits` a weight.

    The rounder makes the steps as fine as the bytes allow. A weight costs what it is worth: rows
    that matter little, or are small, take few bits or none, and outliers many.

    A stream cannot be cut: to split a weight along its outputs (`shard_map`), split it before.
    One that is damaged decodes to NaN.

    Attributes:
      bits: per weight, everything counted; rounded down to whole words of 16 bits per column.
      states: of the trellis, 1 (none) or 4 to 256. More are nearer to Shannon's bound, and only
        encoding takes longer.
      chain: weights of a row that share a trellis, at most. Each start of one costs a little; but
        what an error does to the outputs is made up for by other chains only.
      lanes: rows decoded at a time; each takes 16 bits of the stream.

    Source: steps by water-filling, Lifar et al. 2026, arXiv:2603.04956 (WaterSIC), with another
    code, and the rate in bytes.

    >>> f = EntropyCoded(bits=3, lanes=4)
    >>> data = f.encode(jnp.linspace(-1, 1, 64 * 96).reshape(64, 96))
    >>> data["codes"].shape, data["codes"].dtype.name
    ((12, 96), 'uint16')
    """

    bits: float = 2.0
    states: int = 64
    chain: int = 256
    lanes: int = 32

    tile: ClassVar[tuple[int, int]] = (1, 1)
    codes_ndim: ClassVar[int] = 2
    wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.bits <= 12:
            raise ValueError(f"bits must be above 0, at most 12, got {self.bits}")
        if self.states not in tcq.STATES:
            raise ValueError(f"states must be one of {tcq.STATES}, got {self.states}")
        check_positive(self, "chain", "lanes")

    def check(self, w: Float[Array, "k n"]) -> str:
        """Nothing is lost of weights within the range of float32; ValueError outside of it."""
        return check_wide(w)

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        """The data of a matrix 2**e times as large."""
        words = data["codes"].reshape(-1)
        return {"codes": coded.scaled(words, e).reshape(data["codes"].shape)}

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        side, whole = self.side_bits(k, n), WORD * n * self.words(k)
        if whole < 2 * side:
            raise ValueError(
                f"a matrix [{k}, {n}] of {self.bits} bits per weight has {whole} bits, too few "
                f"where about {side} tell of its rows and lanes; use more bits or fewer lanes"
            )

    def words(self, k: int) -> int:
        """Words of 16 bits for a column of k weights."""
        return int(self.bits * k / WORD)

    def side_bits(self, k: int, n: int) -> int:
        """About what is not codes: header, states of the lanes, steps and scales."""
        return WORD * (coded.HEADER + self.lanes) + 7 * k + 5 * n

    # --- codes ------------------------------------------------------------------------------

    def rows_per_group(self, k: int) -> int:
        """Every row has its own step."""
        return 1

    def grids(self, w: Float[Array, "k n"]) -> Any:
        raise ValueError(
            "EntropyCoded shares out a number of bytes: use the rounder Waterfill, or Nearest"
        )

    def searched(
        self, t: Float[Array, "p c"], columns: Int[Array, "p c"], shape: Int[Array, ""], rows: Row
    ) -> tuple[Int16[Array, "p c"], Float[Array, "p c"]]:
        """Values of c chains, least in distortion plus rate, and the weights that they mean.

        Args:
          t: targets, over the widths of their columns.
          columns: scales of the columns over their widths, quarter octaves.
          shape: of the source, an index into `student.SHAPES`.
          rows: of each chain.
        """
        source = coded.index(rows.level, columns)
        branches = tcq.branches(t / rows.step, source, shape, rows.price, rows.prior)
        v = tcq.search(branches, self.states)
        return v.astype(jnp.int16), v * rows.step

    def finished(self, trial: Coded) -> Coded:
        """The same values with the levels that make them shortest."""
        values = trial.values.astype(jnp.int32)
        q = values & 1
        symbol = student.symbol((values + q) >> 1)
        prices = jnp.asarray(student.prices())[trial.shape]

        def bits(offset: Array) -> Array:
            source = coded.index((trial.levels + offset)[:, None], trial.columns)
            return jnp.sum(prices[source, q, symbol], axis=1)

        offsets = jnp.arange(-4, 5)
        best = offsets[jnp.argmin(jax.lax.map(bits, offsets), axis=0)]
        return trial._replace(levels=trial.levels + best)

    def fill(self, trial: Trial, start: Array, k: int, n: int, trials: int) -> dict[str, Array]:
        """The data of the finest trial that fits.

        Args:
          trial: what is coded with a unit of steps 2**x; its size falls as x grows, nearly evenly.
          start: x to begin with.
          trials: after these no better one is sought.
        """
        size = n * self.words(k)
        slope = min(max(self.bits / 2, 0.35), 1.0) * k * n / WORD  # words of an octave, about
        goal = size * (1 - 2e-4) - 2

        def one(state: _Search) -> _Search:
            words, used = coded.write(trial(state.x), size, self.lanes)
            here, fits = jnp.stack([state.x, used.astype(jnp.float32)]), used <= size
            long = jnp.where(fits, state.long, here)
            short = jnp.where(fits & (here[0] <= state.short[0]), here, state.short)
            best = jnp.where(fits & (here[0] <= state.short[0]), words, state.words)
            newton = here[0] + (here[1] - goal) / slope
            part = (long[1] - goal) / jnp.maximum(long[1] - short[1], 1)
            between = long[0] + jnp.clip(part, 0.02, 0.98) * (short[0] - long[0])
            both = jnp.isfinite(long[0]) & jnp.isfinite(short[0])
            return _Search(jnp.where(both, between, newton), long, short, best, state.tries + 1)

        def going(state: _Search) -> Array:
            full = state.short[1] >= size * (1 - 5e-4) - 4
            none = ~jnp.isfinite(state.short[0])
            return (~full & (state.tries < trials)) | (none & (state.tries < 4 * trials))

        long, short = (jnp.array([s, 0], jnp.float32) for s in (-jnp.inf, jnp.inf))
        first = _Search(start, long, short, jnp.zeros(size, jnp.uint16), jnp.int32(0))
        words = jax.lax.while_loop(going, one, first).words
        return {"codes": words.reshape(self.words(k), n)}

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """All rows with one step, as fine as the bytes allow."""
        w, e = unit(w)
        return self.scaled(self._encode(w), e)

    def _encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        k, n = w.shape
        self.check_shape(k, n)
        columns, shape = profile(w)
        chains = coded.laid(columns, self.chain)
        ones, none = jnp.ones(k), jnp.zeros(k, jnp.int32)

        def trial(x: Array) -> Coded:
            base = jnp.round(x * coded.FINE).astype(jnp.int32)
            step = jnp.exp2(base / coded.FINE) * ones
            rows = Row(step, levels(w / step[:, None], columns, shape), SLOPE * ones, 0 * ones)

            def row(one: tuple) -> Array:
                target, of = one
                each = jax.tree.map(lambda a: jnp.full(chains.shape[1], a), of)
                values, _ = self.searched(coded.laid(target, self.chain), chains, shape, each)
                return values.reshape(-1)[:n]

            values = jax.lax.map(row, (w, rows), batch_size=32)
            return self.finished(Coded(base, shape, none, rows.level, 0 * columns, columns, values))

        start = self.first_step(jnp.mean(w**2, 1), ones, n)
        return self.fill(trial, start, k, n, trials=6)

    def first_step(self, energy: Float[Array, " k"], weight: Float[Array, " k"], n: int) -> Array:
        """log2 of the unit that reverse water-filling of rows of this energy asks for."""
        k = len(energy)
        left = (WORD * n * self.words(k) - self.side_bits(k, n)) / (k * n)
        log = jnp.log2(jnp.maximum(energy * weight, _TINY)) / 2

        def half(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            long = jnp.mean(jnp.maximum(log - middle, 0)) > left
            return jnp.where(long, middle, low), jnp.where(long, high, middle)

        ends = jnp.min(log) - self.bits, jnp.max(log)
        return jax.lax.fori_loop(0, 30, half, ends)[1] + 0.9

    # --- storage ----------------------------------------------------------------------------

    def dequantize(self, data: dict[str, Array], k: int) -> Float[Array, "... k n"]:
        words = data["codes"]
        if words.ndim > 2:
            return jax.vmap(lambda words: self.dequantize({"codes": words}, k))(words)
        got, whole = coded.read(
            words.reshape(-1), k, words.shape[1],
            lanes=self.lanes, states=self.states, chain=self.chain,
        )  # fmt: skip
        return jnp.where(whole, coded.weights(got), jnp.nan)

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        x = forms.rounded(x, activations)
        w = self.dequantize(data, x.shape[-1]).astype(x.dtype)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    def matmul_transposed(
        self, g: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        g = forms.rounded(g, "float")
        w = self.dequantize(data, k).astype(g.dtype)
        return jnp.dot(g, w.T, preferred_element_type=jnp.float32)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        return self.dequantize(data, k)[:, ids]

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        return self.dequantize(data, k)[ids]

    def outputs(self, data: dict[str, Array]) -> int:
        """Columns that the packed arrays hold."""
        return data["codes"].shape[-1]

    def kernel(self) -> str:
        """Which implementation of the kernel table serves a matmul."""
        return "coded (XLA): decodes the whole stream for every product; jaxquant.transcoded, once"


class _Search(NamedTuple):
    """Of `fill`: the next trial; (x, words) of the finest too long and short enough; its stream."""

    x: Array
    long: Array
    short: Array
    words: Array
    tries: Array


def octaves(quarters: Int[Array, "..."]) -> Float[Array, "..."]:
    """2**(quarters / 4)."""
    return jnp.exp2(quarters / 4)


def quarters(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The power of 2**(1/4) nearest to x >= 0.

    >>> quarters(jnp.array([1.0, 2.0, 0.6])).tolist()
    [0, 4, -3]
    """
    return jnp.round(4 * jnp.log2(jnp.maximum(x, _TINY))).astype(jnp.int32)


def levels(
    t: Float[Array, "k n"], columns: Int[Array, " n"], shape: Int[Array, ""]
) -> Int[Array, " k"]:
    """Scales of rows of targets, in steps, quarter octaves."""
    spread = jnp.mean(jnp.abs(t) / octaves(columns), axis=1) / jnp.asarray(student.MEANS)[shape]
    return jnp.maximum(quarters(spread), -2 * student.UNIT)  # of a row of zeros, say


def profile(w: Float[Array, "k n"]) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Scales of the columns, quarter octaves about 0, and the shape of what is left."""
    size = jnp.maximum(jnp.abs(w), _TINY)
    column = jnp.ones(w.shape[1])
    for _ in range(3):
        row = jnp.mean(size / column, axis=1, keepdims=True)
        column = jnp.mean(size / row, axis=0)
    left = size / row / column
    peak = jnp.mean(left) / jnp.sqrt(jnp.mean(left**2))
    shape = jnp.argmin(jnp.abs(peak - jnp.asarray(student.PEAKS))).astype(jnp.int32)
    columns = quarters(column)
    return columns - jnp.round(jnp.mean(columns)).astype(jnp.int32), shape
