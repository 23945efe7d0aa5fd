"""FlatQuant's transform: channel scaling and a Kronecker product of two small learned matrices."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.channels import Channels
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Transform
from jaxquant.transforms.scaling import Smooth
from pallas_kernels import hadamard

# The matrices are small and multiply all weights and inputs, so they are inverted precisely.
_solve = jax.default_matmul_precision("highest")


@dataclasses.dataclass(frozen=True)
class Kronecker(Transform):
    """The invertible map x -> L^T X R of n = n1 n2 channels, where X is x * factors as [n1, n2].

    The arrays are "left", float32 [n1, n1], "right", float32 [n2, n2], and "factors", float16 [n].
    The initial matrices are Hadamard matrices, or random rotations where no Hadamard matrix exists;
    the initial factors are SmoothQuant's. All are then learned against the model
    (`jaxquant.tuning.learn_blocks`, `jaxquant.tuning.learn`).

    Attributes:
      alpha: smoothing strength of the initial factors, 0 to 1, see `Smooth`.
      orthogonal: restrict L and R to rotations, by Cayley's map; otherwise they are any invertible
        matrices.

    Source: Sun et al. 2024, arXiv:2410.09426. This implementation differs from the paper: the
    matrices are learned directly and inverted, not through their singular value decompositions, and
    are initialized as above, not at random.

    >>> Kronecker().shapes(576)["left"].shape, Kronecker().shapes(1536)["right"].shape
    ((24, 24), (48, 48))
    """

    alpha: float = 0.5
    orthogonal: bool = False

    learns: ClassVar[bool] = True
    needs_channels: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        Smooth(self.alpha)

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the arrays that `fit` makes."""
        first, second = nearly_square(n)
        of = jax.ShapeDtypeStruct
        return {
            "left": of((first, first), jnp.float32),
            "right": of((second, second), jnp.float32),
            "factors": of((n,), jnp.float16),
        }

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the initial arrays, before learning."""
        sizes = nearly_square(channels.weights.shape[1])
        left, right = (_rotation(n, jax.random.fold_in(key, n)) for n in sizes)
        return {"left": left, "right": right, **Smooth(self.alpha).fit(channels, key)}

    def latent(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Return the initial values of the learned parameters, which are zeros."""
        return {name: jnp.zeros(a.shape, jnp.float32) for name, a in arrays.items()}

    def learned(self, arrays: dict[str, Array], change: dict[str, Array]) -> dict[str, Array]:
        """Return the arrays for these learned parameters, differentiable in them."""
        turn = _cayley if self.orthogonal else lambda d: jnp.eye(len(d)) + d
        factors = arrays["factors"].astype(jnp.float32) * jnp.exp(change["factors"])
        return {
            "left": arrays["left"] @ turn(change["left"]),
            "right": arrays["right"] @ turn(change["right"]),
            "factors": factors.astype(jnp.float16),
        }

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """Return x A for row vectors x."""
        x = x * arrays["factors"].astype(x.dtype)
        return _both(x, arrays["left"], arrays["right"])

    def transposed(
        self, y: Float[Array, "... n"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """Return y A^T for row vectors y."""
        return _both(y, arrays["left"].T, arrays["right"].T) * arrays["factors"].astype(y.dtype)

    @_solve
    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """Return x A^-T: what weights become if the vectors they multiply become x A."""
        left, right = (jnp.linalg.inv(arrays[name]).T for name in ("left", "right"))
        return _both(x / arrays["factors"].astype(x.dtype), left, right)


def nearly_square(n: int) -> tuple[int, int]:
    """Return the two factors of n that are nearest to one another, the smaller first.

    Args:
      n: a positive integer.

    >>> nearly_square(576), nearly_square(1536), nearly_square(7)
    ((24, 24), (32, 48), (1, 7))
    """
    first = next(f for f in range(math.isqrt(n), 0, -1) if n % f == 0)
    return first, n // first


def _both(x: Float[Array, "... n"], left: Array, right: Array) -> Float[Array, "... n"]:
    """Return L^T X R."""
    matrix = x.reshape(*x.shape[:-1], len(left), len(right))
    half = jnp.einsum("ai,...ab->...ib", left.astype(x.dtype), matrix)
    return jnp.einsum("...ib,bj->...ij", half, right.astype(x.dtype)).reshape(x.shape)


def _rotation(n: int, key: Array) -> Float[Array, "n n"]:
    if hadamard.exists(n):
        return hadamard.transform(jnp.eye(n))
    return jax.random.orthogonal(key, n)


def _cayley(free: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return the rotation (I + S)^-1 (I - S), with S the skew-symmetric part of the parameter."""
    skew, one = (free - free.T) / 2, jnp.eye(len(free))
    solved: Any = jnp.linalg.solve(one + skew, one - skew)
    return solved
