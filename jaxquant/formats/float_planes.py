"""FloatPlanes: the bits of floats without loss, in planes of fixed length that a matmul decodes."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import OpArguments
from jaxquant.formats.exact_format import Dtype, ExactFormat, check_dtype
from jaxquant.formats.op_format import OpFormat
from pallas_kernels import cpu, lowering
from pallas_kernels.codecs import float_fields, float_planes
from pallas_kernels.cpu import native

_GUESS = 2048  # weights for each one that is listed, where this has to be guessed


@dataclasses.dataclass(frozen=True)
class FloatPlanes(ExactFormat, OpFormat):
    """Floats stored without loss: exponents in a window, signs and mantissas as they are.

    The layout is that of `pallas_kernels.codecs.float_planes`. A bfloat16 weight takes about 11.3
    bits with a window of 7 exponents, and 12.02 with one of 15, for which there are TPU and GPU
    kernels.

    Attributes:
      dtype: dtype of the weights; None for their own, which `quantize` and `jaxquant.lossless` fill
        in. `encode` casts to it (to float32 if it is None).
      bits: number of bits of an exponent in its window, 3 or 4.
      listed: number of weights of a matrix whose exponents are listed apart. `quantize` and
        `jaxquant.lossless` set it to the number that is needed; `encode` refuses a matrix that
        needs more, which decodes to NaN if it is traced.

    >>> f = FloatPlanes("bfloat16", listed=2)
    >>> data = f.encode(jnp.array([[1.5, 0.0], [jnp.inf, 0.25]]))
    >>> f.decode(data, 2).tolist()
    [[1.5, 0.0], [inf, 0.25]]
    """

    dtype: Dtype | None = None
    bits: Literal[3, 4] = 3
    listed: int = 1

    tile: ClassVar[tuple[int, int]] = (1, 1)
    storage: ClassVar[str] = "float_planes"
    sized: ClassVar[str] = "listed"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype is not None:
            check_dtype(self.dtype)
        if self.bits not in float_planes.BITS:
            raise ValueError(f"bits must be one of {float_planes.BITS}, got {self.bits}")
        check_positive(self, "listed")

    def settled(self, dtype: Any, u: UInt[Array, "l k n"]) -> "FloatPlanes":
        """Return the format with the dtype of these matrices and as long a list as they need."""
        check_dtype(dtype, self.dtype)
        float_fields.check_size(*u.shape[1:])
        if isinstance(u, jax.core.Tracer | jax.ShapeDtypeStruct):
            listed = u.shape[1] * u.shape[2] // _GUESS
        else:
            listed = max((int(float_planes.missing(one, dtype, self.bits)) for one in u), default=1)
        return dataclasses.replace(self, dtype=dtype, listed=max(1, listed))

    def encode_bits(self, u: UInt[Array, "k n"]) -> dict[str, Array]:
        """Return the planes of a matrix given by its bits.

        Args:
          u: the bits of the floats, of an unsigned integer dtype of their size.

        Raises:
          ValueError: more weights are to be listed than the format allows.
        """
        float_fields.check_size(*u.shape)
        coded = float_planes.unlisted(u, self.own, self.bits)
        if not isinstance(u, jax.core.Tracer) and (needed := int(coded.needed)) > self.listed:
            raise ValueError(
                f"{needed} exponents are to be listed, but listed = {self.listed}; give the "
                f"format listed={needed}, or use jaxquant.lossless.encode"
            )
        planes = float_planes.with_list(coded, self.listed, self.own)
        return {name: a for name, a in planes._asdict().items() if a is not None}

    def decode_bits(self, data: dict[str, Array], k: int) -> UInt[Array, "k n"]:
        """Return the bits of the floats of one matrix; on a CPU, native code decodes them.

        Args:
          data: the packed arrays.
          k: number of rows.
        """
        static: dict[str, Any] = {"dtype": self.own, "bits": self.bits, "k": k}
        plain = partial(float_planes.decode, **static)
        if lowering.default_platform() != "cpu" or native.load():
            return plain(_planes(data))
        fast = partial(cpu.decode_float_planes, **static)
        return lowering.by_lowering({"cpu": fast}, plain, _planes(data))

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        u = float_planes.columns(_planes(data), ids, dtype=self.own, bits=self.bits, k=k)
        return float_fields.floats(u, self.own).astype(jnp.float32)

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        return tuple(_planes(data)), {"dtype": self.own, "bits": self.bits}

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"float_planes_matmul, {self.bits}-bit exponents of {self.own}"


def _planes(data: dict[str, Array]) -> float_planes.Planes:
    parts: dict[str, Any] = {"near": None, **data}
    return float_planes.Planes(**parts)
