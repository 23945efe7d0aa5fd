"""What every part must offer: formats, transforms, rounders, estimators, learned ranges.

A part is a frozen dataclass that derives from the class here that names its kind. Abstract members
must be defined; the others have defaults, and the capabilities among them, plain class attributes,
say what more a part can do. Nothing else is asked of it, and nothing is probed for.

To add a part of your own, outside of this package too:

  1. Derive from `Format` (or from `GridFormat`, if codes are chosen row by row, so that every
     rounder takes it), `Transform`, `Rounder`, `Estimator` or `RangeEstimator`, and define what is
     abstract.
  2. Put it in a `Method`, which `quantize` and recipes take like any other.
  3. Call `jaxquant.register(YourClass)` once, so that checkpoints and recipes can name it.

`tests/test_foreign.py` does that with one of each kind; the contract suites take a new part by one
line in their tables.

Notation: a weight is a matrix [k, n] with y = x @ w. Arrays are float32 where not stated otherwise.
"""

import abc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.channels import Channels
from jaxquant.core.straight_through import through
from pallas_kernels import activations as forms

Data = dict[str, Array]  # named arrays of one matrix
Codes = Int[Array, "..."]
Grid = Any  # scales, tables, zero points: a pytree of the format's own


class Moments(NamedTuple):
    """Second moments that a rounder may use; None where they were not measured.

    The loss is tr(H_in E H_out E^T) for an error E [k, n], H_out = I if unknown.
    """

    input: Float[Array, "k k"] | None = None
    output: Float[Array, "n n"] | None = None


# --- formats -------------------------------------------------------------------------------------


class Format(abc.ABC):
    """A codebook and its storage: how a matrix becomes packed arrays, and what these mean.

    Packed arrays are named; one is named "codes", and the last axis of it runs along the columns of
    the matrix. A name holds no "." and is none of `report.*`.

    Capabilities:
      tile: rows and columns of the matrix that one code covers.
      codes_ndim: axes of "codes" for one matrix; more in front are batch axes.
      storage: op of `pallas_kernels` that multiplies by the packed arrays, "packed" for
        `packed_matmul`; "" if products are made here. With it comes `arguments`.
      wide: whether `scaled` holds a matrix of any magnitude. Weights then enter `encode` and
        rounders over a power of two, and `scaled` gives it back.
      trained: names of float arrays that healing may train.
      recodes: whether `recoded` chooses codes anew, for training them.
      plans: whether `planned` turns it into another format, by how much blocks of rows matter.
      block: rows of such a block.
      latent: whether it is a weight that trains: `product` rounds inputs too, and `encode` is not
        defined.
    """

    tile: tuple[int, int] = (1, 1)
    codes_ndim: ClassVar[int] = 2
    storage: ClassVar[str] = ""
    wide: bool = False
    trained: tuple[str, ...] = ()
    recodes: ClassVar[bool] = False
    plans: ClassVar[bool] = False
    block: int = 0
    latent: ClassVar[bool] = False

    @abc.abstractmethod
    def encode(self, w: Float[Array, "k n"]) -> Data:
        """Packed arrays of the matrix, rounded to nearest; traceable.

        Raises:
          ValueError: the shape or the values cannot be stored.
        """

    @abc.abstractmethod
    def decode(self, data: Data, k: int) -> Float[Array, "k n"]:
        """The matrix of k rows that packed arrays stand for; traceable."""

    def check_shape(self, k: int, n: int) -> None:  # noqa: B027  any shape will do
        """Raise ValueError if a matrix [k, n] cannot be stored; by default any can."""

    def check(self, w: Float[Array, "k n"]) -> str:
        """What these weights (concrete values) lose to the range of scales, in words; "": nothing.

        Raises:
          ValueError: the weights are outside of the range.
        """
        return ""

    def scaled(self, data: Data, e: Int[Array, ""]) -> Data:
        """Packed arrays of a matrix 2**e times as large; only of formats that are `wide`."""
        raise NotImplementedError

    def dequantize(self, data: Data, k: int) -> Float[Array, "*batch k n"]:
        """The matrices; batch axes in front are allowed."""
        decode = self.decode
        for _ in data["codes"].shape[: -self.codes_ndim]:
            decode = jax.vmap(decode, (0, None))
        return decode(data, k)

    def outputs(self, data: Data) -> int:
        """n, of the packed arrays at hand: inside `shard_map` those of one device."""
        return data["codes"].shape[-1] * self.tile[1]

    def nearest(self, w: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """The matrix rounded to nearest, with the derivative of w: straight through."""
        return through(w, self.dequantize(self.encode(w), w.shape[0]))

    # --- products ---------------------------------------------------------------------------------

    def matmul(
        self, x: Float[Array, "m k"], data: Data, activations: str = "float"
    ) -> Float[Array, "m n"]:
        """x @ w. `activations`: a form of `pallas_kernels.activations` that x is rounded to."""
        x = forms.rounded(x, activations)
        w = self.dequantize(data, x.shape[-1]).astype(x.dtype)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    def matmuls(
        self, x: Float[Array, "m k"], several: Sequence[Data], activations: str
    ) -> tuple[Float[Array, "m n"], ...]:
        """x @ w of several matrices that share x; in one call where the platform has one."""
        return tuple(self.matmul(x, data, activations) for data in several)

    def matmul_transposed(self, g: Float[Array, "m n"], data: Data, k: int) -> Float[Array, "m k"]:
        """g @ w.T."""
        g = forms.rounded(g, "float")
        w = self.dequantize(data, k).astype(g.dtype)
        return jnp.dot(g, w.T, preferred_element_type=jnp.float32)

    def product(
        self, form: Any, x: Float[Array, "m k"], data: Data, of_inputs: Data
    ) -> Float[Array, "m n"]:
        """x @ w, x rounded to a form of activations that has these arrays; of `latent` formats."""
        raise NotImplementedError

    def columns(self, data: Data, ids: Int[Array, " i"], k: int) -> Float[Array, "k i"]:
        """Columns `ids` of w."""
        return self.dequantize(data, k)[:, ids]

    def rows(self, data: Data, ids: Int[Array, " i"], k: int) -> Float[Array, "i n"]:
        """Rows `ids` of w."""
        return self.dequantize(data, k)[ids]

    def arguments(self, data: Data, k: int) -> tuple[tuple, dict[str, Any]]:
        """Arrays and static values that the op named by `storage` takes after x."""
        raise NotImplementedError

    def kernel(self) -> str:
        """What serves a product, in words, for `explain`."""
        return "decoded (XLA), no kernel of its own"

    # --- what some can do -------------------------------------------------------------------------

    def to_disk(self, data: Data, k: int) -> Data:
        """Packed arrays as a checkpoint keeps them; by default as they are."""
        return data

    def from_disk(self, kept: Data, k: int) -> Data:
        """Inverse of `to_disk`."""
        return kept

    def recoded(self, data: Data, target: Float[Array, "k n"], share: float) -> Data:
        """Packed arrays with a share of the codes chosen anew, nearer to the target."""
        raise NotImplementedError

    def planned(self, importance: Float[Any, " blocks"]) -> "Format":
        """The format to store, given the loss per unit of relative distortion in each block."""
        raise NotImplementedError


class GridFormat(Format):
    """A format that chooses codes row by row (or tile by tile), given a grid.

    A grid is a pytree; each of its arrays has a leading axis over the groups of rows that share an
    entry. With this every rounder takes the format: nearest, error feedback, two-sided feedback.

    Capabilities:
      fits: whether `fit` makes the grid of one group from its rows as error feedback has moved
        them; else grids are fixed beforehand.
    """

    fits: ClassVar[bool] = False

    @abc.abstractmethod
    def rows_per_group(self, k: int) -> int:
        """Rows that share an entry of the grid in a matrix of k rows."""

    @abc.abstractmethod
    def grids(self, w: Float[Array, "k n"]) -> Grid:
        """The grid for these weights, as storage will give it back."""

    @abc.abstractmethod
    def round(self, target: Float[Array, "d n"], row: Grid) -> tuple[Codes, Float[Array, "d n"]]:
        """Codes of the d rows of a tile nearest to the target, and what they mean.

        Args:
          row: one entry of the grid, or one that broadcasts against the target.
        """

    @abc.abstractmethod
    def pack(self, codes: Codes, grid: Grid) -> Data:
        """Packed arrays of codes [k / d, ...], as `round` gives them, and a grid."""

    def rescaled(self, grid: Grid, factor: Float[Array, ""]) -> Grid:
        """The grid with its scale times a factor, as storage will give it back."""
        raise NotImplementedError

    def fit(self, w: Float[Array, "g n"]) -> Grid:
        """The entry of the grid for one group of rows; of formats that can `fits`."""
        raise NotImplementedError

    def round_where(
        self, target: Float[Array, "d n"], row: Grid, valid: Bool[Array, " t"] | None
    ) -> tuple[Codes, Float[Array, "d n"]]:
        """As `round`, where only valid tiles count; the others may come out as anything."""
        return self.round(target, row)


class LevelFormat(GridFormat):
    """A format whose codes are levels of one weight each: w = scale * level.

    So its scales, and where it has them its zero points, can be learned. A grid has a field
    `scale`, and a field `zero` if there are zero points. Levels are measured in steps, w / scale.

    Capabilities:
      group_size, scale_dtype: as in `formats.Integer`.
      symmetric: there are no zero points.
      learnable: scales are numbers that training may move, and not codes themselves.
      integral: levels are whole numbers, so that rounding can be stochastic and clipped.
      countable: levels have places on a line, which `place` and `value_at` tell.
      stretch: in steps, where the range of the stretched elastic estimator ends; 0: it takes none.
    """

    group_size: int | str
    scale_dtype: str
    symmetric: bool = True
    learnable: bool = True
    integral: ClassVar[bool] = False
    countable: bool = True
    stretch: ClassVar[float] = 0.0

    @property
    @abc.abstractmethod
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest level; with zero points the first and the last code."""

    @property
    def reach(self) -> float:
        """The largest level, in steps; of codes with a zero point their number less one."""
        return max(map(abs, self.ends))

    @abc.abstractmethod
    def stored_grid(self, data: Data) -> Grid:
        """The grid of packed arrays."""

    @abc.abstractmethod
    def make_grid(self, scale: Array, zero: Array | None = None) -> Grid:
        """A grid of these scales and zero points (None: there are none), whatever their shape."""

    @abc.abstractmethod
    def stored(self, scale: Float[Array, "g n"]) -> Grid:
        """The grid of these scales, as storage will give it back."""

    def zero_of(self, grid: Grid) -> Float[Array, "..."]:
        """The zero points of a grid, as floats; a scalar 0 if it has none."""
        return jnp.zeros(())

    @abc.abstractmethod
    def level(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Float[Array, "..."]:
        """The nearest levels to v, in steps, less the zero point."""

    def inside(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Bool[Array, "..."]:
        """Whether v, in steps, is within the range of the levels, ends included."""
        low, high = self.ends
        return (v >= low) & (v <= high)

    @abc.abstractmethod
    def place(self, codes: Codes) -> Int[Array, "..."]:
        """Where codes lie on the line, counted in levels."""

    @abc.abstractmethod
    def value_at(self, place: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
        """What the codes at these places mean."""


# --- transforms ----------------------------------------------------------------------------------


class Transform(abc.ABC):
    """A change of variables A of the channels on one side of a weight: x @ w = (x A) @ (A^-1 w).

    Its arrays are named and belong to one matrix, or to all that read one input (`joint`).

    Capabilities, all of which say what `fit` reads or who shares its arrays:
      needs_gram, needs_channels, needs_sample: second moments, sizes of channels, rows of inputs.
      fitted: the arrays depend on the weight, so that weights of one input cannot share them.
      joint: the arrays are fitted to all weights that read an input together.
      searched: `candidates` offers several, of which the best is kept.
      learns: `learned` makes the arrays of parameters that start at `latent`, for training.
    """

    needs_gram: bool = False
    needs_channels: bool = False
    needs_sample: bool = False
    fitted: bool = False
    joint: bool = False
    searched: bool = False
    learns: ClassVar[bool] = False

    @abc.abstractmethod
    def fit(self, channels: Channels, key: Array) -> Data:
        """Its arrays, for these channels."""

    @abc.abstractmethod
    def apply(self, x: Float[Array, "... n"], arrays: Data) -> Float[Array, "... s"]:
        """x A, for row vectors x."""

    @abc.abstractmethod
    def transposed(self, y: Float[Array, "... s"], arrays: Data, n: int) -> Float[Array, "... n"]:
        """y A^T."""

    @abc.abstractmethod
    def inverse(self, x: Float[Array, "... n"], arrays: Data) -> Float[Array, "... s"]:
        """x A^-T: what weights become where the vectors they meet become x A."""

    def size(self, n: int) -> int:
        """Channels stored for n channels; by default as many."""
        return n

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that `fit` makes."""
        weights = jax.ShapeDtypeStruct((1, n), jnp.float32)
        fit = lambda weights, key: self.fit(Channels(weights), key)
        return jax.eval_shape(fit, weights, jax.eval_shape(jax.random.key, 0))

    def candidates(self, channels: Channels, key: Array) -> Iterator[Data]:
        """Arrays of which a search keeps the best; of transforms that are `searched`."""
        raise NotImplementedError

    def latent(self, arrays: Data) -> Data:
        """Parameters that training begins at; of transforms that `learns`."""
        raise NotImplementedError

    def learned(self, arrays: Data, change: Data) -> Data:
        """The arrays after a change of these parameters, differentiable in it."""
        raise NotImplementedError

    def healing_bytes(self, n: int) -> int:
        """Bytes that healing adds to its arrays, for n channels."""
        return 0


# --- rounders ------------------------------------------------------------------------------------


class Rounder(abc.ABC):
    """How codes are chosen for a given format.

    Capabilities:
      needs_gram, needs_output: the second moments of inputs, of loss gradients at outputs.
      damping: fraction of the mean diagonal that is added to second moments, before any raise.
      takes_ranges: `within` fits grids to another matrix than the one that is rounded.
    """

    needs_gram: bool = False
    needs_output: bool = False
    damping: float = 0.0
    takes_ranges: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[Data, Data]:
        """Packed arrays of w, and a report: "damping" used, "dead" channels (both scalars).

        Raises:
          ValueError: it cannot round to this format, or a moment is missing.
        """

    def within(
        self,
        ranges: Float[Array, "k n"],
        w: Float[Array, "k n"],
        format: Format,
        moments: Moments,
        key: Array | None = None,
    ) -> tuple[Data, Data]:
        """As a call, with grids fitted to `ranges` in place of w; of those that `takes_ranges`."""
        raise NotImplementedError


# --- training ------------------------------------------------------------------------------------


class Estimator(abc.ABC):
    """What a weight that trains is after rounding, and what derivatives go through that."""

    @abc.abstractmethod
    def check(self, format: Format) -> None:
        """Raise ValueError unless weights in this format can train so."""

    @abc.abstractmethod
    def start(self, w: Float[Array, "k n"], format: Any, data: Data) -> Data:
        """Learned arrays to begin with, of a weight and of what storage holds of it."""

    @abc.abstractmethod
    def packed(self, w: Float[Array, "k n"], learned: Data, format: Any) -> Data:
        """Storage of the rounded matrix, decoding to `value` bit for bit."""

    @abc.abstractmethod
    def value(
        self, w: Float[Array, "k n"], learned: Data, format: Any, packed: Data | None = None
    ) -> Float[Array, "k n"]:
        """The rounded matrix, differentiable in both; `packed`, if it is at hand."""


class ActivationForm(Protocol):
    """How inputs are rounded before they meet the codes; `core.activations.Activations` is one."""

    @property
    def static(self) -> bool:
        """Whether the scale is known beforehand, and held with the weight."""

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""

    @property
    def kernel(self) -> str | None:
        """The form under which kernels round themselves; None if codes are made before them."""

    @property
    def limits(self) -> tuple[int, int]:
        """The first and the last code."""

    def describe(self) -> str:
        """The arithmetic of a product, for `explain`."""

    def rounded(self, x: Float[Array, "m k"], data: Data) -> Float[Array, "m k"]:
        """What x is after rounding."""

    def straight(self, x: Float[Array, "m k"], data: Data) -> Float[Array, "m k"]:
        """`rounded`, with the derivatives of a product."""

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays that a weight holds for it."""


class RangeEstimator(abc.ABC):
    """A learned range of inputs: one for all tokens, trained with the weights."""

    @abc.abstractmethod
    def check(self, form: Any) -> None:
        """Raise ValueError unless inputs in this form can train so."""

    @abc.abstractmethod
    def start(self, known: Data, form: Any) -> Data:
        """Learned arrays to begin with, from the calibrated scale and zero point."""

    @abc.abstractmethod
    def served(self, learned: Data, form: Any) -> Data:
        """Scale and zero point that a frozen weight holds."""

    @abc.abstractmethod
    def value(self, x: Float[Array, "m k"], learned: Data, form: Any) -> Float[Array, "m k"]:
        """Rounded rows, differentiable in both."""


def lacking(kind: type, value: Any) -> str:
    """What an object would need to be of a kind of part, in words; "" if it is one.

    >>> lacking(Rounder, 3)
    'an int is no Rounder: derive it from Rounder and define __call__'
    """
    if isinstance(value, kind):
        return ""
    of = type(value).__name__
    needed = sorted(getattr(kind, "__abstractmethods__", ()))
    missing = [name for name in needed if not callable(getattr(type(value), name, None))]
    article = "an" if of[:1].lower() in "aeiou" else "a"
    rest = f" and define {', '.join(missing)}" if missing else ""
    return f"{article} {of} is no {kind.__name__}: derive it from {kind.__name__}{rest}"
