"""Integers with a scale per row and per column, into which entropy-coded weights are transcoded."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int16, PyTree

from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import OpArguments
from jaxquant.formats.op_format import OpFormat
from pallas_kernels import dual_scale
from pallas_kernels.codecs import layout

_packed = jax.jit(layout.pack, static_argnums=1)  # unjitted, it is slower than reading a stream


@dataclasses.dataclass(frozen=True)
class DualScale(OpFormat):
    """w = step_i scale_j v_ij, with integers v in 4- or 8-bit words and escapes for larger ones.

    `jaxquant.formats.transcoded` converts entropy-coded weights to this format without changing
    their values.

    Attributes:
      bits: number of bits per code, 4 or 8.

    >>> data = DualScale().encode(jnp.array([[7.0, 0.0], [-1.0, 14.0]]))
    >>> DualScale().dequantize(data, 2).tolist()
    [[7.0, 0.0], [-1.0, 14.0]]
    """

    bits: Literal[4, 8] = 4

    tile: ClassVar[tuple[int, int]] = (1, 1)
    storage: ClassVar[str] = "dual_scale"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        if k > dual_scale.MOST_ROWS:
            raise ValueError(f"a matrix must have at most {dual_scale.MOST_ROWS} rows, got {k}")

    def bytes_of(self, values: Int16[np.ndarray, "... k n"]) -> int:
        """Return the number of bytes for codes and escapes of these integers [..., k, n]."""
        *batch, k, n = values.shape
        most = 1 << (self.bits - 1)
        escapes = np.count_nonzero((values < -most) | (values >= most))
        return 4 * (int(np.prod(batch)) * layout.words(k, self.bits) * n + escapes)

    def pack(
        self,
        values: Int16[np.ndarray, "k n"],
        step: Float32[np.ndarray, " k"],
        scale: Float32[np.ndarray, " n"],
    ) -> dict[str, PyTree]:
        """Return the packed arrays of a matrix.

        This runs on the host, since the number of escapes depends on the values.

        Args:
          values: integers v [k, n].
          step: scales of the rows [k].
          scale: scales of the columns [n].
        """
        codes, ranges, escapes = dual_scale.split(values, self.bits)
        data = {"codes": _packed(codes, self.bits), "scale": scale[None], "step": step}
        # Checkpoints cannot hold empty arrays.
        return data | {"ranges": ranges, "escapes": np.resize(escapes, max(1, len(escapes)))}

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Round to nearest with one scale per column, without escapes.

        Raises:
          ValueError: the matrix has too many rows.
        """
        self.check_shape(*w.shape)
        top = (1 << self.bits - 1) - 1
        absmax = jnp.max(jnp.abs(w), axis=0)
        scale = jnp.where(absmax > 0, absmax / top, 1.0).astype(jnp.float32)
        codes = jnp.clip(jnp.round(w / scale), -top, top).astype(jnp.int32)
        return {
            "codes": layout.pack(codes, self.bits),
            "scale": scale[None],
            "step": jnp.ones(w.shape[0], jnp.float32),
            "ranges": jnp.zeros((2, w.shape[1]), jnp.int32),
            "escapes": jnp.zeros(1, jnp.int32),
        }

    def arguments(self, data: dict[str, Array], k: int) -> OpArguments:
        names = ("codes", "scale", "step", "ranges", "escapes")
        return tuple(data[name] for name in names), {"bits": self.bits}

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        return self.decode(data, k)[:, ids]

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        return self.decode(data, k)[ids]

    def kernel(self) -> str:
        """Return the name of the op that computes products."""
        return f"dual_scale_matmul, {self.bits}-bit words"
