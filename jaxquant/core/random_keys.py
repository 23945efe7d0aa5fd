"""Randomness of a quantization: under one key the same is drawn for the same matrix."""

import dataclasses
import zlib

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.core.arguments import described


@dataclasses.dataclass(frozen=True)
class Draw:
    """Randomness, and a name for it: under one name the same is drawn for the same thing."""

    key: Array
    name: str  # "" if the key is being traced

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
        """For the transform that weights share with the leader of their input."""
        return self.of_matrix(f"input of {leader}", i)


def _data(key: PyTree) -> Array:
    """The numbers of a key; ValueError if it is none."""
    try:
        return jax.random.key_data(key)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"expected a key, such as jax.random.key(0), got {described(key)}"
        ) from None
