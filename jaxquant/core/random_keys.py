"""Random numbers of quantization: the same key gives a matrix the same numbers in every run."""

import dataclasses
import zlib

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.core.arguments import described


@dataclasses.dataclass(frozen=True)
class Draw:
    """A random key, and a text that identifies it.

    Attributes:
      key: a `jax.random.key`.
      name: identifies the key, for comparison with earlier runs; "" if the key is traced.
    """

    key: Array
    name: str  # "" if the key is traced

    @staticmethod
    def of(key: Array | None) -> "Draw":
        if key is None:
            return Draw(jax.random.key(0), "default")
        data = _data(key)
        traced = isinstance(data, jax.core.Tracer)
        return Draw(key, "" if traced else np.asarray(data).tobytes().hex())

    def of_matrix(self, text: str, i: int) -> Array:
        whole = jax.random.fold_in(self.key, zlib.crc32(text.encode()) & 0x7FFFFFFF)
        return jax.random.fold_in(whole, i)

    def of_input(self, leader: str, i: int) -> Array:
        """Return the key for a transform that all weights of an input share.

        Args:
          leader: path of the weight that represents the input.
          i: index of the matrix.
        """
        return self.of_matrix(f"input of {leader}", i)


def _data(key: PyTree) -> Array:
    """Return the numbers in a key; raise ValueError if it is not a key."""
    try:
        return jax.random.key_data(key)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"expected a key, such as jax.random.key(0), got {described(key)}"
        ) from None
