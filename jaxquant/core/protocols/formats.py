"""What a format must offer: a codebook and its storage."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.straight_through import through
from pallas_kernels import activations as forms

Data = dict[str, Array]  # named arrays of one matrix
Codes = Int[Array, "..."]
OpArguments = tuple[tuple, dict[str, Any]]  # arrays and static values of an op, after x
Grid = Any  # scales, tables, zero points: a pytree of the format's own


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

    def arguments(self, data: Data, k: int) -> OpArguments:
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
