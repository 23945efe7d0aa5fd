"""Entropy coding: trellis-coded weights in one stream of a fixed number of bytes per matrix.

Scales, widths and steps (over a common unit) are powers of 2**(1/4). They are stored as integer
logarithms, in quarter octaves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int16, UInt16

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.magnitude import unit
from jaxquant.core.protocols import Format
from jaxquant.formats.scales import check_wide
from pallas_kernels.codecs import entropy_stream, student_t, trellis_coded
from pallas_kernels.codecs.entropy_stream import Coded

WORD = 16  # bits
SLOPE = 0.41  # price of a bit in squared steps: the best one for the codes of `trellis_coded`
FAINT = 120  # negated scale, in quarter octaves, of columns that are not worth coding
_AUDIBLE = 64  # columns farther below the largest, in quarter octaves, are not worth coding
_TINY = 1e-30


class Row(NamedTuple):
    """Parameters for rounding a row or one chain of it; with a leading axis, for many of them.

    Attributes:
      step: step size of the values.
      level: scale of the source distribution over the step, in quarter octaves.
      price: price of a bit, in squared steps.
      prior: coefficient of v**2 to subtract from the cost of a value v, in squared steps, because
        the targets already account for it.
    """

    step: Float[Array, "..."]
    level: Int[Array, "..."]
    price: Float[Array, "..."]
    prior: Float[Array, "..."]


Trial = Callable[[Float[Array, ""]], Coded]


@dataclasses.dataclass(frozen=True)
class EntropyCoded(Format):
    """Trellis-coded values with a step per row, arithmetic-coded into exactly `bits` per weight.

    The rounder makes the steps as fine as the bytes allow. Rows that matter little or are small
    take few bits or none, and outliers take many.

    A stream cannot be cut, so to shard a weight along its outputs (`shard_map`), split it before
    quantizing. A damaged stream decodes to NaN.

    Attributes:
      bits: number of bits per weight, everything included, above 0 and at most 12; rounded down to
        whole words of 16 bits per column.
      states: number of trellis states, 1 (no trellis) or 4 to 256. More states come nearer to
        Shannon's bound, and only encoding takes longer.
      chain: maximum number of weights of a row that share a trellis. Each start of a chain costs a
        little, but two-sided feedback can compensate the errors of a chain only in other chains.
      lanes: number of rows decoded at a time; each lane takes 16 bits of the stream.

    Source: steps by water-filling, Lifar et al. 2026, arXiv:2603.04956 (WaterSIC). This
    implementation differs from the paper: the code is another one, and the rate is exact in bytes.

    >>> f = EntropyCoded(bits=3, lanes=4)
    >>> data = f.encode(jnp.linspace(-1, 1, 64 * 96).reshape(64, 96))
    >>> data["codes"].shape, data["codes"].dtype.name
    ((12, 96), 'uint16')
    """

    bits: float = 2.0
    states: int = 64
    chain: int = 256
    lanes: int = 32

    wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.bits <= 12:
            raise ValueError(f"bits must be above 0, at most 12, got {self.bits}")
        if self.states not in trellis_coded.STATES:
            raise ValueError(f"states must be one of {trellis_coded.STATES}, got {self.states}")
        check_positive(self, "chain", "lanes")

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return ""; nothing is lost within the range of float32.

        Raises:
          ValueError: the weights are outside this range.
        """
        return check_wide(w)

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        """Return the packed arrays of a matrix 2**e times as large."""
        words = data["codes"].reshape(-1)
        return {"codes": entropy_stream.scaled(words, e).reshape(data["codes"].shape)}

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        side, whole = self.side_bits(k, n), WORD * n * self.words(k)
        if whole < 2 * side:
            raise ValueError(
                f"a matrix [{k}, {n}] at {self.bits} bits per weight has {whole} bits, "
                f"which is too few, since its rows and lanes need about {side} bits of "
                "side information; use more bits or fewer lanes"
            )

    def words(self, k: int) -> int:
        """Return the number of 16-bit words for a column of k weights."""
        return int(self.bits * k / WORD)

    def side_bits(self, k: int, n: int) -> int:
        """Return the approximate number of bits for the header, lane states, steps and scales."""
        return WORD * (entropy_stream.HEADER + self.lanes) + 7 * k + 5 * n

    # --- codes ------------------------------------------------------------------------------

    def searched(
        self, t: Float[Array, "p c"], columns: Int[Array, "p c"], shape: Int[Array, ""], rows: Row
    ) -> tuple[Int16[Array, "p c"], Float[Array, "p c"]]:
        """Return the values of c chains with the least distortion plus rate, and their weights.

        Args:
          t: targets, divided by the widths of their columns.
          columns: scales of the columns over their widths, in quarter octaves.
          shape: shape of the source distribution, an index into `student_t.SHAPES`.
          rows: rounding parameters of each chain.
        """
        source = entropy_stream.index(rows.level, columns)
        branches = trellis_coded.branches(t / rows.step, source, shape, rows.price, rows.prior)
        v = trellis_coded.search(branches, self.states)
        return v.astype(jnp.int16), v * rows.step

    def finished(self, trial: Coded) -> Coded:
        """Return the same values with the levels that code them in the fewest bits."""
        values = trial.values.astype(jnp.int32)
        q = values & 1
        symbol = student_t.symbol((values + q) >> 1)
        prices = jnp.asarray(student_t.prices())[trial.shape]

        def bits(offset: Array) -> Array:
            source = entropy_stream.index((trial.levels + offset)[:, None], trial.columns)
            return jnp.sum(prices[source, q, symbol], axis=1)

        offsets = jnp.arange(-4, 5)
        best = offsets[jnp.argmin(jax.lax.map(bits, offsets), axis=0)]
        return trial._replace(levels=trial.levels + best)

    def fill(
        self, trial: Trial, start: Array, least: Array, share: Array, k: int, n: int, trials: int
    ) -> dict[str, Array]:
        """Search the finest trial that fits, and return its stream, verified by decoding.

        The stream decodes to NaN if no trial fits, if verification fails, or if `start` is not
        finite.

        Args:
          trial: function that rounds with a step unit of 2**x; its size falls nearly linearly with
            x.
          start: initial x.
          least: x below which nothing becomes finer.
          share: fraction of the columns that are worth coding.
          k, n: shape of the matrix.
          trials: maximum number of trials, unless none has fitted yet.
        """
        size = n * self.words(k)
        octave = min(max(self.bits / 2, 0.35), 1.0) * k * n / WORD
        slope, goal = octave * share, size * (1 - 2e-4) - 2  # words saved per octave, roughly

        def one(state: _Search) -> _Search:
            tried = trial(state.x)
            words, used = entropy_stream.write(tried, size, self.lanes)
            here, fits = jnp.stack([state.x, used.astype(jnp.float32)]), used <= size
            better = fits & (here[0] <= state.short[0])
            long = jnp.where(fits, state.long, here)
            short = jnp.where(better, here, state.short)
            kept = lambda a, b: jax.tree.map(lambda a, b: jnp.where(better, a, b), a, b)
            best = kept(words, state.words), kept(tried, state.coded)
            # From the third trial on, the distance doubles while trials are too long: one must fit.
            far = jnp.where(fits, 1.0, jnp.exp2(jnp.maximum(state.tries - 1, 0)))
            newton = here[0] + far * (here[1] - goal) / slope
            part = (long[1] - goal) / jnp.maximum(long[1] - short[1], 1)
            between = long[0] + jnp.clip(part, 0.02, 0.98) * (short[0] - long[0])
            both = jnp.isfinite(long[0]) & jnp.isfinite(short[0])
            x = jnp.maximum(jnp.where(both, between, newton), least)
            return _Search(x, long, short, *best, state.tries + 1)

        def going(state: _Search) -> Array:
            full = state.short[1] >= size * (1 - 5e-4) - 4
            none = ~jnp.isfinite(state.short[0])
            return (~full & (state.tries < trials)) | (none & (state.tries < 4 * trials))

        long, short = (jnp.array([s, 0], jnp.float32) for s in (-jnp.inf, jnp.inf))
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(trial, start))
        first = _Search(start, long, short, jnp.zeros(size, jnp.uint16), nothing, jnp.int32(0))
        found = jax.lax.while_loop(going, one, first)
        right = jnp.isfinite(start) & self._tells(found.words, found.coded)
        words = jnp.where(right, found.words, 0)  # a stream of zeros decodes to NaN
        return {"codes": words.reshape(self.words(k), n)}

    def _tells(self, words: UInt16[Array, " size"], meant: Coded) -> Bool[Array, ""]:
        """Return whether a stream decodes to exactly what was encoded."""
        got, whole = self._read(words, *meant.values.shape)
        equal = jax.tree.map(lambda a, b: jnp.all(a == b), got, meant)
        return whole & jnp.all(jnp.stack(jax.tree.leaves(equal)))

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Encode all rows with one step, as fine as the bytes allow.

        Raises:
          ValueError: no stream could be made. If the weights are traced, the stream decodes to NaN
            instead.
        """
        w, e = unit(w)
        return self.scaled(self._encode(w), e)

    def _encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        k, n = w.shape
        self.check_shape(k, n)
        columns, shape = profile(w)
        heard = columns > -FAINT
        w, share = jnp.where(heard, w, 0 * w), jnp.mean(heard)
        chains = entropy_stream.laid(columns, self.chain)
        ones, widths = jnp.ones(k), jnp.where(heard, 0, -FAINT)

        def trial(x: Array) -> Coded:
            base = jnp.round(x * entropy_stream.FINE).astype(jnp.int32)
            steps = coarse_enough(jnp.zeros(k, jnp.int32), w, base)
            step = jnp.exp2(base / entropy_stream.FINE) * octaves(steps)
            level = levels(w / step[:, None], columns, shape)
            rows = Row(step, level, SLOPE * octaves(-2 * steps), 0 * ones)

            def row(one: tuple) -> Array:
                target, of = one
                each = jax.tree.map(lambda a: jnp.full(chains.shape[1], a), of)
                values, _ = self.searched(
                    entropy_stream.laid(target, self.chain), chains, shape, each
                )
                return values.reshape(-1)[:n]

            values = jax.lax.map(row, (w, rows), batch_size=32)
            return self.finished(Coded(base, shape, steps, level, widths, columns, values))

        start = self.first_step(jnp.mean(w**2, 1) / share, ones, share, n)
        data = self.fill(trial, start, finest(w), share, k, n, trials=6)
        if not isinstance(data["codes"], jax.core.Tracer) and not bool(jnp.any(data["codes"])):
            raise ValueError(
                f"a matrix [{k}, {n}] could not be coded in {self.bits} bits per weight: "
                "make sure that its weights are finite, or use more bits"
            )
        return data

    def first_step(
        self, energy: Float[Array, " k"], weight: Float[Array, " k"], share: Array, n: int
    ) -> Array:
        """Return log2 of the step unit that reverse water-filling gives for rows of this energy."""
        k = len(energy)
        left = (WORD * n * self.words(k) - self.side_bits(k, n)) / (k * n) / share
        log = jnp.log2(jnp.maximum(energy * weight, _TINY)) / 2

        def half(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            long = jnp.mean(jnp.maximum(log - middle, 0)) > left
            return jnp.where(long, middle, low), jnp.where(long, high, middle)

        ends = jnp.min(log) - self.bits, jnp.max(log)
        return jax.lax.fori_loop(0, 30, half, ends)[1] + 0.9

    # --- storage ----------------------------------------------------------------------------

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        words = data["codes"]
        got, whole = self._read(words.reshape(-1), k, words.shape[1])
        return jnp.where(whole, entropy_stream.weights(got), jnp.nan)

    def _read(self, words: UInt16[Array, " size"], k: int, n: int) -> tuple[Coded, Bool[Array, ""]]:
        return entropy_stream.read(
            words, k, n, lanes=self.lanes, states=self.states, chain=self.chain
        )

    def kernel(self) -> str:
        """Return what computes products."""
        return "decoded (XLA), the whole stream for every product; see jaxquant.formats.transcoded"


class _Search(NamedTuple):
    """State of the search in `fill`.

    Attributes:
      x: next trial.
      long, short: pairs (x, words) of the finest trial that was too long and of the finest that
        fitted.
      words, coded: stream and contents of the latter.
      tries: number of trials so far.
    """

    x: Array
    long: Array
    short: Array
    words: Array
    coded: Coded
    tries: Array


def octaves(quarters: Int[Array, "..."]) -> Float[Array, "..."]:
    """Return 2**(quarters / 4)."""
    return jnp.exp2(quarters / 4)


def quarters(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Return the exponent q of the power 2**(q / 4) nearest to x >= 0.

    >>> quarters(jnp.array([1.0, 2.0, 0.6])).tolist()
    [0, 4, -3]
    """
    return jnp.round(4 * jnp.log2(jnp.maximum(x, _TINY))).astype(jnp.int32)


def coarse_enough(
    steps: Int[Array, " k"], t: Float[Array, "k n"], base: Int[Array, ""]
) -> Int[Array, " k"]:
    """Return `steps` (quarter octaves above `base`), raised where the targets t need larger ones.

    The largest target may take up half of the range of values. The other half is left for error
    feedback, which moves targets.
    """
    least = 4 * (_least_steps(t) - base / entropy_stream.FINE)
    return jnp.maximum(steps, jnp.ceil(least).astype(jnp.int32))


def finest(w: Float[Array, "k n"]) -> Array:
    """Return log2 of the step unit below which no steps of w become finer, see `coarse_enough`."""
    least = _least_steps(w)
    return jnp.min(jnp.where(jnp.any(w != 0, axis=1), least, jnp.max(least)))


def _least_steps(t: Float[Array, "k n"]) -> Float[Array, " k"]:
    """Return log2 of the steps at which the largest target of a row is half the largest value."""
    peak = jnp.max(jnp.abs(t), axis=1)
    return jnp.log2(jnp.maximum(peak, _TINY) / student_t.LARGEST)


def levels(
    t: Float[Array, "k n"], columns: Int[Array, " n"], shape: Int[Array, ""]
) -> Int[Array, " k"]:
    """Return the source scales of rows of targets, in quarter octaves.

    The scales are large enough for all targets of a row to have codes.

    Args:
      t: targets, in steps.
      columns: scales of the columns, in quarter octaves; -`FAINT` for columns not worth coding.
      shape: shape of the source distribution, an index into `student_t.SHAPES`.
    """
    heard = columns > -FAINT
    size = jnp.where(heard, jnp.abs(t) / octaves(columns), 0.0)
    spread = jnp.mean(size, axis=1) / jnp.mean(heard) / jnp.asarray(student_t.MEANS)[shape]
    reach = jnp.ceil(4 * jnp.log2(jnp.maximum(jnp.max(size, axis=1) / student_t.REACH, _TINY)))
    level = jnp.maximum(quarters(spread), reach.astype(jnp.int32))
    return jnp.maximum(level, -2 * student_t.UNIT)  # a lower bound, for rows of zeros and the like


def profile(w: Float[Array, "k n"]) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Return the scales of the columns of w, in quarter octaves about 0, and the shape of the rest.

    The shape indexes `student_t.SHAPES`. Columns far below the largest, including zero columns, get
    the scale -`FAINT` and are otherwise ignored, as are rows of zeros.
    """
    size = jnp.maximum(jnp.abs(w), _TINY)
    column, heard = jnp.ones(w.shape[1]), jnp.ones(w.shape[1], bool)
    there = jnp.max(size, axis=1, keepdims=True) > _TINY
    there = there | ~jnp.any(there)
    for _ in range(3):
        row = _mean(size / column, heard, axis=1, keepdims=True)
        column = _mean(size / row, there, axis=0)
        columns = quarters(column)
        heard = columns > jnp.max(columns) - _AUDIBLE
    left = size / row / column
    peak = _mean(left, heard & there) / jnp.sqrt(_mean(left**2, heard & there))
    shape = jnp.argmin(jnp.abs(peak - jnp.asarray(student_t.PEAKS))).astype(jnp.int32)
    middle = jnp.round(_mean(columns, heard)).astype(jnp.int32)
    return jnp.where(heard, columns - middle, -FAINT), shape


def _mean(a: Array, some: Bool[Array, "..."], **axes: Any) -> Array:
    """Return the mean over the rows or columns selected by `some`."""
    return jnp.mean(jnp.where(some, a, 0), **axes) / jnp.mean(some)
