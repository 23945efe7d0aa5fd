"""Base of formats that store the bits of weights as they are, in fewer bytes."""

import dataclasses
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxquant.core.protocols import Format
from pallas_kernels.codecs import float_fields

Dtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]


class ExactFormat(Format):
    """Base of a format that defines `settled`, `encode_bits` and `decode_bits`.

    Checkpoints hold the weights as plain floats, which `jaxquant.storage` codes in fewer bytes than
    any form that is decoded in memory.

    Attributes:
      dtype: dtype of the weights; None for their own, which `settled` fills in. `encode` casts to
        it (to float32 if it is None).
    """

    dtype: Dtype | None
    exact: ClassVar[bool] = True
    wide: ClassVar[bool] = False
    sized: ClassVar[str]  # name of the field that `settled` counts

    @property
    def own(self) -> str:  # type: ignore[override]
        """Dtype that is stored."""
        return self.dtype or "float32"

    @property
    def unsettled(self) -> "ExactFormat":
        """The format before `settled` has counted anything."""
        return dataclasses.replace(self, **{self.sized: 1})  # type: ignore[type-var]

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Return the packed arrays of a matrix, cast to `dtype`.

        Raises:
          ValueError: the matrix does not fit the sizes of the format; see `settled`.
        """
        return self.encode_bits(bits_of(w.astype(self.own)))

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        return float_fields.floats(self.decode_bits(data, k), self.own).astype(jnp.float32)

    def to_disk(self, data: dict[str, Array], k: int) -> dict[str, Array]:
        """Return the weights as floats."""
        return {"codes": _plain(self, data, k)}

    def from_disk(self, kept: dict[str, Array], k: int) -> dict[str, Array]:
        """Return the packed arrays of weights that are given as floats."""
        if len(kept) > 1:  # saved by several processes, as they were in memory
            return kept
        *batch, _, n = kept["codes"].shape
        each = [self.encode_bits(u) for u in bits_of(kept["codes"]).reshape(-1, k, n)]
        return jax.tree.map(lambda *a: jnp.stack(a).reshape(*batch, *a[0].shape), *each)


@partial(jax.jit, static_argnums=(0, 2))
def _plain(format: ExactFormat, data: dict[str, Array], k: int) -> Float[Array, "*batch k n"]:
    decode = lambda d: format.decode_bits(d, k)
    for _ in data["codes"].shape[: -format.codes_ndim]:
        decode = jax.vmap(decode)
    return float_fields.floats(decode(data), format.own)


def bits_of(w: Float[Array, "*s"]) -> UInt[Array, "*s"]:
    """Return the bits of floats.

    Args:
      w: the floats, of one of the dtypes `Dtype`.

    >>> bits_of(jnp.array([1.0], jnp.bfloat16)).tolist()
    [16256]
    """
    return jax.lax.bitcast_convert_type(w, float_fields.unsigned(w.dtype.name))


def check_dtype(dtype: str, stored: str | None = None) -> None:
    """Raise ValueError unless weights of a dtype can be stored without loss.

    Args:
      dtype: name of the dtype.
      stored: the only dtype that a format stores; None (the default) if it takes any of these.
    """
    if dtype not in float_fields.DTYPES:
        known = ", ".join(float_fields.DTYPES)
        raise ValueError(f"dtype must be one of {known}, got {dtype!r}")
    if stored not in (None, dtype):
        raise ValueError(
            f"the format stores {stored} weights, got {dtype}; cast the weights, or leave out the "
            "dtype of the format"
        )
