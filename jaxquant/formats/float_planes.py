"""FloatPlanes: the bits of floats without loss, in planes of fixed length that a matmul decodes."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import Format, OpArguments
from jaxquant.formats.op_format import OpFormat
from pallas_kernels.codecs import float_planes

Dtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]


@dataclasses.dataclass(frozen=True)
class FloatPlanes(OpFormat):
    """Floats of any bits, stored without loss: a window of exponents, signs and mantissas as they are.

    The layout is that of `pallas_kernels.codecs.float_planes`. A bfloat16 weight takes about 11.3
    bits with a window of 7 exponents, and 12.02 with one of 15, for which there are TPU and GPU
    kernels.

    Attributes:
      dtype: dtype of the weights; others are cast to it, which loses nothing only if it holds them.
      bits: number of bits of an exponent in its window, 3 or 4.
      listed: number of weights whose exponents are listed apart. `jaxquant.lossless` sets it to the
        number that a weight needs; a matrix that needs more is refused, or decodes to NaN if it is
        traced.

    >>> f = FloatPlanes("bfloat16", listed=2)
    >>> data = f.encode(jnp.array([[1.5, 0.0], [jnp.inf, 0.25]]))
    >>> f.decode(data, 2).tolist()
    [[1.5, 0.0], [inf, 0.25]]
    """

    dtype: Dtype = "bfloat16"
    bits: Literal[3, 4] = 3
    listed: int = 1

    tile: ClassVar[tuple[int, int]] = (1, 1)
    storage: ClassVar[str] = "float_planes"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype not in float_planes.DTYPES:
            known = ", ".join(float_planes.DTYPES)
            raise ValueError(f"dtype must be one of {known}, got {self.dtype!r}")
        if self.bits not in float_planes.BITS:
            raise ValueError(f"bits must be one of {float_planes.BITS}, got {self.bits}")
        check_positive(self, "listed")

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Return the planes of a matrix, cast to `dtype`.

        Raises:
          ValueError: more weights are to be listed than the format allows.
        """
        same = w.astype(self.dtype)
        return self.encode_bits(
            jax.lax.bitcast_convert_type(same, float_planes.unsigned(self.dtype))
        )

    def encode_bits(self, u: UInt[Array, "k n"]) -> dict[str, Array]:
        """Return the planes of a matrix given by its bits.

        Args:
          u: the bits of the floats, of an unsigned integer dtype of their size.

        Raises:
          ValueError: more weights are to be listed than the format allows.
        """
        if not isinstance(u, jax.core.Tracer):
            needed = int(float_planes.missing(u, self.dtype, self.bits))
            if needed > self.listed:
                raise ValueError(
                    f"{needed} exponents are to be listed, but listed = {self.listed}; give the "
                    f"format listed={needed}, or use jaxquant.lossless.encode"
                )
        planes = float_planes.encode(u, self.dtype, self.bits, self.listed)
        return {name: a for name, a in planes._asdict().items() if a is not None}

    def decode_bits(self, data: dict[str, Array], k: int) -> UInt[Array, "k n"]:
        """Return the bits of the floats of one matrix.

        Args:
          data: the packed arrays.
          k: number of rows.
        """
        return float_planes.decode(_planes(data), dtype=self.dtype, bits=self.bits, k=k)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        u = float_planes.columns(_planes(data), ids, dtype=self.dtype, bits=self.bits, k=k)
        return float_planes.floats(u, self.dtype).astype(jnp.float32)

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        return Format.rows(self, data, ids, k)

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        return tuple(_planes(data)), {"dtype": self.dtype, "bits": self.bits}

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"float_planes_matmul, {self.bits}-bit exponents of {self.dtype}"


def _planes(data: dict[str, Array]) -> float_planes.Planes:
    return float_planes.Planes(*map(data.get, float_planes.Planes._fields))
