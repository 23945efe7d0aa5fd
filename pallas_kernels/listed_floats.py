"""Products with floats in planes, on top of kernels that read only codes, rests and bases.

The kernels take 4-bit codes as they are, without a test for escapes. An escape then has the
exponent base + 15, one more than the largest in its column's window, and XLA adds what it lacks
(see `codecs.float_planes`). Escapes are few, so that this costs little.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import activations as forms
from pallas_kernels.codecs import float_planes


def corrected(provisional: Callable[..., Array]) -> Callable[..., Array]:
    """Return the product with floats in planes, built on a product with their provisional weights.

    Args:
      provisional: function of x, codes, rest, base and activations, and of options.
    Returns:
      A function with the signature of `ops.float_planes_matmul`, and the same options.
    """

    def call(
        x: Float[Array, "m k"],
        codes: Int32[Array, "w n"],
        rest: Int32[Array, "r n"],
        base: UInt8[Array, "1 n"],
        near: None,
        where: Int32[Array, " e"],
        exponent: UInt8[Array, " e"],
        *,
        dtype: str,
        bits: int,
        activations: str = "float",
        **options,
    ) -> Float[Array, "m n"]:
        y = provisional(x, codes, rest, base, activations=activations, **options)
        planes = float_planes.Planes(codes, rest, base, near, where, exponent)
        row, column, more = float_planes.lacking(
            planes, dtype=dtype, bits=bits, k=x.shape[1], tested=False
        )
        terms = forms.rounded(x, activations).astype(jnp.float32).T[row] * more[:, None]
        count = codes.shape[1] + 1  # unused entries have a column of their own
        sums = jax.ops.segment_sum(terms, column, count, indices_are_sorted=True)
        return y + sums[:-1].T

    return call


def unfit(dtype: str, bits: int, platform: str) -> str:
    """Return why a platform has no kernel for planes of a form, or "" if it has one.

    Args:
      dtype: dtype of the floats.
      bits: width of a code.
      platform: name of the platform, "TPU" or "GPU".

    >>> unfit("bfloat16", 3, "TPU")
    'only 4-bit exponents have a TPU kernel, not 3-bit ones; use bits=4'
    """
    if dtype != "bfloat16":
        return f"only floats in planes of bfloat16 have a {platform} kernel, not those of {dtype}"
    if bits != 4:
        return f"only 4-bit exponents have a {platform} kernel, not {bits}-bit ones; use bits=4"
    return ""
