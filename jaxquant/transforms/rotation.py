"""Random rotation of the channels on one side of a weight: incoherence processing.

For orthonormal A and B, x @ w = ((x A) @ (A^T w B^T)) B: rotating inputs and outputs changes the
stored matrix but not the function. Random signs followed by a Hadamard transform make the entries
of almost any matrix nearly Gaussian and remove outliers (Chee et al. 2023, arXiv:2307.13304; Tseng
et al. 2024, arXiv:2402.04396).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.channels import Channels
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Transform
from pallas_kernels import hadamard


@dataclasses.dataclass(frozen=True)
class Rotation(Transform):
    """The orthonormal map x -> (x * signs)[order] H of n channels.

    The arrays are "signs" if signed: n random bits packed in bytes or, once trained, n real
    factors; and "order", uint16 [n], if sorted.

    Attributes:
      block: block size of a block-diagonal Hadamard transform; None for one transform over all
        channels. Blocks can be sharded, and any multiple of the block is a valid width. Channels
        are padded with zeros to the next valid width.
      sort: sort channels by decreasing energy first (see `fit`), so that channels are alike within
        a block and differ between blocks, which can then be given different rates.
      signed: apply random signs before the Hadamard transform.
    """

    block: int | None = None
    sort: bool = False
    signed: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block is not None and not hadamard.exists(self.block):
            raise ValueError(
                f"no Hadamard matrix of order {self.block} can be made; the next is "
                f"{hadamard.padded(max(1, self.block))}"
            )

    def size(self, n: int) -> int:
        """Return the number of channels after the rotation: n, or more if padding is needed.

        >>> Rotation().size(576), Rotation(block=128).size(576)
        (576, 640)
        """
        return hadamard.padded(n) if self.block is None else -(-n // self.block) * self.block

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """Whether the arrays depend on the weight and thus cannot be shared."""
        return self.sort

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the arrays for these channels.

        The energy of a channel is the mean square of its weights times that of its vectors.
        """
        n, arrays = channels.weights.shape[1], {}
        if self.signed:
            arrays["signs"] = jnp.packbits(jax.random.bernoulli(key, 0.5, (n,)))
        if self.sort:
            order = jnp.argsort(-channels.energy * channels.moment, stable=True)
            arrays["order"] = order.astype(jnp.uint16)
        return arrays

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... s"]:
        """Return x A for row vectors x."""
        n = x.shape[-1]
        if self.signed:
            x = x * factors(arrays["signs"], n).astype(x.dtype)
        if self.sort:
            x = x[..., arrays["order"]]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.size(n) - n)])
        return hadamard.transform(x, self.block)

    def transposed(
        self, y: Float[Array, "... s"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """Return y A^T for row vectors y.

        This is the inverse of `apply`, unless the signs have been trained.
        """
        y = hadamard.transform_transposed(y, self.block)[..., :n]
        if self.sort:
            y = y[..., jnp.argsort(arrays["order"])]
        return y * factors(arrays["signs"], n).astype(y.dtype) if self.signed else y

    def healing_bytes(self, n: int) -> int:
        """Return the bytes that healing adds: signs of one bit each become float16."""
        return 2 * n - -(-n // 8)

    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... s"]:
        """Return x A^-T, which equals x A since A is orthonormal."""
        return self.apply(x, arrays)


def factors(signs: Array, n: int) -> Array:
    """Return +1 or -1 for each packed bit, [..., n]; trained factors are returned unchanged.

    Args:
      signs: uint8 array of packed bits, or trained factors of another dtype.
      n: number of channels.
    """
    if signs.dtype != np.uint8:
        return signs
    return 1 - 2 * jnp.unpackbits(signs, axis=-1, count=n).astype(jnp.int8)
