"""Interfaces of formats: a codebook and its storage."""

import abc
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxquant.core.straight_through import through
from pallas_kernels import activations as forms
from pallas_kernels.context import compiled

Data = dict[str, Array]  # arrays of one matrix, by name
Codes = Int[Array, "..."]
OpArguments = tuple[tuple, dict[str, Any]]  # positional arrays and keyword values of an op, after x


class Format(abc.ABC):
    """A codebook and its storage: how a matrix becomes packed arrays, and how these decode.

    Packed arrays have names. One of them is "codes", whose last axis runs along the columns of the
    matrix. Names contain no ".", and names that begin with "report." are reserved.

    Capabilities:
      tile: number of rows and of columns of the matrix that one code covers.
      codes_ndim: number of axes of "codes" for one matrix; further axes in front are batch axes.
      storage: name of the op of `pallas_kernels` that multiplies by the packed arrays ("packed" for
        `packed_matmul`), in which case `arguments` must be defined; "" if there is no such op and
        the format computes products.
      wide: whether `scaled` is defined, so that matrices of any magnitude can be stored. Weights
        are then divided by a power of two before `encode` or a rounder sees them, and `scaled`
        multiplies it back.
      trained: names of the float arrays that healing may train.
      recodes: whether `recoded` is defined, so that codes can be chosen anew during training.
      plans: whether `planned` is defined, which chooses the format to store by the importance of
        blocks of rows.
      block: number of rows of such a block.
      exact: whether the bits of the weights are stored as they are. `settled`, `encode_bits` and
        `decode_bits` must then be defined, `to_disk` returns plain weights as "codes", and
        transforms cannot be combined with the format.
      own: name of the dtype whose bits an `exact` format stores.
      latent: whether this is the format of a weight in training: `product` also rounds the inputs,
        and `encode` is not defined.
    """

    tile: tuple[int, int] = (1, 1)
    codes_ndim: ClassVar[int] = 2
    storage: ClassVar[str] = ""
    wide: bool = False
    trained: tuple[str, ...] = ()
    recodes: ClassVar[bool] = False
    plans: ClassVar[bool] = False
    block: int = 0
    exact: ClassVar[bool] = False
    own: str = ""
    latent: ClassVar[bool] = False

    @abc.abstractmethod
    def encode(self, w: Float[Array, "k n"]) -> Data:
        """Round a matrix to nearest and pack it; traceable.

        Args:
          w: the matrix, [k, n].

        Returns:
          The packed arrays by name.

        Raises:
          ValueError: the shape or the values cannot be stored.
        """

    def shapes(self, k: int, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the arrays that `encode` makes of a matrix [k, n]."""
        return _shapes(self, k, n)

    def code_rows(self, k: int, n: int) -> int:
        """Return the length of the first axis of "codes" for a matrix [k, n]."""
        return self.shapes(k, n)["codes"].shape[0]

    @abc.abstractmethod
    def decode(self, data: Data, k: int) -> Float[Array, "k n"]:
        """Decode the packed arrays of one matrix; traceable.

        Args:
          data: the packed arrays.
          k: number of rows of the matrix.

        Returns:
          The matrix, [k, n], float32.
        """

    def check_shape(self, k: int, n: int) -> None:  # noqa: B027  any shape will do
        """Raise ValueError if a matrix [k, n] cannot be stored; the default accepts all."""

    def check(self, w: Float[Array, "k n"]) -> str:
        """Describe what these weights lose to the limited range of the scales.

        Args:
          w: the matrix, [k, n]; concrete values, not traced.

        Returns:
          A description, or "" if nothing is lost.

        Raises:
          ValueError: the weights are outside the range of the format.
        """
        return ""

    def scaled(self, data: Data, e: Int[Array, ""]) -> Data:
        """Multiply the encoded matrix by 2**e; only for formats that are `wide`.

        Args:
          data: the packed arrays.
          e: the exponent, an int32 scalar.

        Returns:
          The packed arrays of the product.
        """
        raise NotImplementedError

    @functools.partial(compiled, static_argnums=(0, 2))
    def dequantize(self, data: Data, k: int) -> Float[Array, "*batch k n"]:
        """Decode one matrix or a stack of matrices.

        Args:
          data: the packed arrays, with any number of batch axes in front.
          k: number of rows of each matrix.

        Returns:
          The matrices, [*batch, k, n], float32.
        """
        decode = self.decode
        for _ in data["codes"].shape[: -self.codes_ndim]:
            decode = jax.vmap(decode, (0, None))
        return decode(data, k)

    def outputs(self, data: Data) -> int:
        """Return n for these packed arrays; inside `shard_map`, the n of one device."""
        return data["codes"].shape[-1] * self.tile[1]

    def nearest(self, w: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """Round a matrix to nearest, with the straight-through gradient.

        Args:
          w: the matrix, [k, n].

        Returns:
          The decoded matrix, [k, n].
        """
        return through(w, self.dequantize(self.encode(w), w.shape[0]))

    # --- products ---------------------------------------------------------------------------------

    def matmul(
        self, x: Float[Array, "m k"], data: Data, activations: str = "float"
    ) -> Float[Array, "m n"]:
        """Return x @ w for one matrix.

        Args:
          x: the rows, [m, k].
          data: the packed arrays of w.
          activations: the form of `pallas_kernels.activations` to round x to; "float": unrounded.

        Returns:
          The product, [m, n].
        """
        x = forms.rounded(x, activations)
        w = self.dequantize(data, x.shape[-1]).astype(x.dtype)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    def matmuls(
        self, x: Float[Array, "m k"], several: Sequence[Data], activations: str
    ) -> tuple[Float[Array, "m n"], ...]:
        """Return x @ w for several matrices w, in a single call on platforms that have one.

        Args:
          x: the rows, [m, k].
          several: the packed arrays of each matrix.
          activations: the form of `pallas_kernels.activations` to round x to; "float": unrounded.

        Returns:
          One product [m, n] per matrix.
        """
        return tuple(self.matmul(x, data, activations) for data in several)

    def matmul_transposed(self, g: Float[Array, "m n"], data: Data, k: int) -> Float[Array, "m k"]:
        """Return g @ w.T for one matrix.

        Args:
          g: the rows, [m, n].
          data: the packed arrays of w.
          k: number of rows of w.

        Returns:
          The product, [m, k].
        """
        g = forms.rounded(g, "float")
        w = self.dequantize(data, k).astype(g.dtype)
        return jnp.dot(g, w.T, preferred_element_type=jnp.float32)

    def product(
        self, form: Any, x: Float[Array, "m k"], data: Data, of_inputs: Data
    ) -> Float[Array, "m n"]:
        """Return x @ w with the inputs rounded too; only for formats that are `latent`.

        Args:
          form: the activation format, or None.
          x: the rows, [m, k].
          data: the arrays of w.
          of_inputs: the arrays of the activation format.

        Returns:
          The product, [m, n].
        """
        raise NotImplementedError

    def columns(self, data: Data, ids: Int[Array, " i"], k: int) -> Float[Array, "k i"]:
        """Return some columns of w.

        Args:
          data: the packed arrays of w.
          ids: which columns, [i].
          k: number of rows of w.

        Returns:
          The columns, [k, i].
        """
        return self.dequantize(data, k)[:, ids]

    def rows(self, data: Data, ids: Int[Array, " i"], k: int) -> Float[Array, "i n"]:
        """Return some rows of w.

        Args:
          data: the packed arrays of w.
          ids: which rows, [i].
          k: number of rows of w.

        Returns:
          The rows, [i, n].
        """
        return self.dequantize(data, k)[ids]

    def arguments(self, data: Data, k: int) -> OpArguments:
        """Return what the op named by `storage` takes after x.

        Args:
          data: the packed arrays of one matrix.
          k: number of rows of the matrix.

        Returns:
          (arrays, static values by name).
        """
        raise NotImplementedError

    def kernel(self) -> str:
        """Describe what runs a matmul, for `explain`."""
        return "no kernel of its own: XLA decodes the weight"

    # --- optional abilities -----------------------------------------------------------------------

    def to_disk(self, data: Data, k: int) -> Data:
        """Convert packed arrays to those that a checkpoint stores; by default the same.

        Args:
          data: the packed arrays.
          k: number of rows of the matrix.
        """
        return data

    def from_disk(self, kept: Data, k: int) -> Data:
        """Convert the arrays in a checkpoint back; the inverse of `to_disk`.

        Args:
          kept: the stored arrays.
          k: number of rows of the matrix.
        """
        return kept

    def recoded(self, data: Data, target: Float[Array, "k n"], share: float) -> Data:
        """Choose some codes anew, closer to a target; only for formats that have `recodes`.

        Args:
          data: the packed arrays.
          target: the matrix to approach, [k, n].
          share: fraction of the codes that may change, in [0, 1].

        Returns:
          The packed arrays with the new codes.
        """
        raise NotImplementedError

    def settled(self, dtype: str, u: UInt[Array, "l k n"]) -> "Format":
        """Return the format to store, whose sizes depend on the weights; only if it is `exact`.

        Args:
          dtype: name of the dtype of the weights.
          u: the bits of the matrices that are stored together. If they are traced, or a
            `jax.ShapeDtypeStruct`, sizes are guesses.

        Raises:
          ValueError: the format cannot hold weights of this dtype.
        """
        raise NotImplementedError

    def encode_bits(self, u: UInt[Array, "k n"]) -> Data:
        """Pack a matrix that is given by its bits; only for formats that are `exact`.

        Args:
          u: the bits of the weights, of the unsigned integer dtype of their size.

        Returns:
          The packed arrays by name.
        """
        raise NotImplementedError

    def decode_bits(self, data: Data, k: int) -> UInt[Array, "k n"]:
        """Return the bits of a packed matrix; traceable; only for formats that are `exact`.

        Args:
          data: the packed arrays of one matrix.
          k: number of rows of the matrix.
        """
        raise NotImplementedError

    def planned(self, importance: Float[Any, " blocks"]) -> "Format":
        """Return the format to store; only for formats that have `plans`.

        Args:
          importance: for each block of rows, the loss per unit of relative distortion.
        """
        raise NotImplementedError


@functools.lru_cache(maxsize=4096)  # a format that searches takes a second to trace
def _shapes(format: Format, k: int, n: int) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(format.encode, jax.ShapeDtypeStruct((k, n), jnp.float32))
