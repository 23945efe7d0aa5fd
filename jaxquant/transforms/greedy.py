"""DuQuant's transforms: greedily found block rotations that spread outliers, and the zigzag order.

A block rotation is a product of many rotations. Each takes the channel with the largest entry of
the block and spreads it over the block. After smoothing, rotating, dealing the channels out to
other blocks and rotating again, an outlier in one channel is spread over as many channels as the
square of the block size (Lin et al. 2024, arXiv:2406.01721).
"""

import dataclasses
from functools import lru_cache, partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.channels import Channels
from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import Transform

# Blocks are small, so full float32 precision is worth its time.
_dot = partial(jnp.einsum, precision="highest")


class Blocks(Transform):
    """Base of transforms that act on blocks of channels."""

    needs_channels: ClassVar[bool] = True
    needs_sample: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    block: int

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "block")

    def size(self, n: int) -> int:
        """Return n, the number of channels.

        Raises:
          ValueError: the block size does not divide n.
        """
        if n % self.block:
            near = [b for b in range(1, n + 1) if n % b == 0 and b <= self.block]
            raise ValueError(
                f"blocks of {self.block} do not divide {n} channels; blocks of {near[-1]} do"
            )
        return n

    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """Return x A^-T, which equals x A since A is orthonormal."""
        return self.apply(x, arrays)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Greedy(Blocks):
    """An orthonormal matrix for each block of channels that makes max |x| small.

    The array is "rotation", float32 [blocks, block, block], or [1, block, block] if shared.

    Attributes:
      block: number of channels in a block, which must divide the number of channels.
      steps: number of rotations tried; the product with the smallest maximum is kept, or the
        identity if none is smaller.
      shared: use one rotation for all blocks, as the released code does.
      flat: put the random rotation on the left of the spreading one, so that the first row of the
        product stays flat.
      by_row: select the channel as the row number of the largest entry modulo the block size, and
        judge by max - min, as the released code does.

    Source: Algorithm 1 of Lin et al. 2024, arXiv:2406.01721. This implementation differs
    from the paper: each step draws one random rotation for all blocks.
    """

    block: int = 128
    steps: int = 256
    shared: bool = False
    flat: bool = False
    by_row: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps")
        if self.block < 2:
            raise ValueError(f"block must be at least 2 channels, got {self.block}")

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the arrays that `fit` makes."""
        count = 1 if self.shared else self.size(n) // self.block
        shape = (count, self.block, self.block)
        return {"rotation": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the arrays fitted to the sample of the inputs."""
        rows = channels.rows
        self.size(rows.shape[1])
        blocks = rows.reshape(len(rows), -1, self.block)
        blocks = blocks.reshape(1, -1, self.block) if self.shared else blocks.swapaxes(0, 1)
        return {"rotation": self._search(blocks, key)}

    def _search(self, x: Float[Array, "b t s"], key: Array) -> Float[Array, "b s s"]:
        start, size = jnp.asarray(spreading(self.block), jnp.float32), self.block
        one = jnp.broadcast_to(jnp.eye(size), (len(x), size, size))

        def step(i: Array, state: tuple) -> tuple:
            x, product, best, least = state
            inner = jax.random.normal(jax.random.fold_in(key, i), (size - 1, size - 1))
            q = jnp.eye(size).at[1:, 1:].set(jnp.linalg.qr(inner)[0])
            spread = _dot("ij,jk->ik", q, start) if self.flat else _dot("ij,jk->ik", start, q)
            turn = jax.vmap(partial(_swapped, spread))(self._channel(x))
            x, product = (_dot("bti,bij->btj", a, turn) for a in (x, product))
            size_now = self._score(x)
            better = (size_now < least)[:, None, None]
            best = jnp.where(better, product, best)
            return x, product, best, jnp.minimum(size_now, least)

        best = jax.lax.fori_loop(0, self.steps, step, (x, one, one, self._score(x)))[2]
        # A product of hundreds is orthonormal to 1e-5; one Newton step squares that error.
        return 1.5 * best - 0.5 * _dot("bij,bkj,bkl->bil", best, best, best)

    def _channel(self, x: Float[Array, "b t s"]) -> Array:
        """Return the channel of the largest entry in each block."""
        if self.by_row:
            row, _ = jnp.divmod(jnp.argmax(jnp.abs(x).reshape(len(x), -1), axis=1), self.block)
            return row % self.block
        return jnp.argmax(jnp.max(jnp.abs(x), axis=1), axis=1)

    def _score(self, x: Float[Array, "b t s"]) -> Float[Array, " b"]:
        if self.by_row:
            return jnp.max(x, axis=(1, 2)) - jnp.min(x, axis=(1, 2))
        return jnp.max(jnp.abs(x), axis=(1, 2))

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """Return x A for row vectors x."""
        return self._times(x, arrays["rotation"])

    def transposed(
        self, y: Float[Array, "... n"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """Return y A^T for row vectors y."""
        return self._times(y, arrays["rotation"].swapaxes(1, 2))

    def _times(self, x: Float[Array, "... n"], r: Float[Array, "b s s"]) -> Float[Array, "... n"]:
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        if len(r) == 1:
            y = jnp.einsum("...bi,ij->...bj", blocks, r[0].astype(x.dtype))
        else:
            y = jnp.einsum("...bi,bij->...bj", blocks, r.astype(x.dtype))
        return y.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Zigzag(Blocks):
    """The permutation that deals channels to blocks back and forth, in order of decreasing max |x|.

    The array is "order", uint16 [n]: the channel that moves to each position.

    Attributes:
      block: number of channels in a block, which must divide the number of channels.

    >>> known = Channels.of(jnp.ones((1, 4)), jnp.array([[9.0, 1.0, 5.0, 3.0]]))
    >>> Zigzag(2).fit(known, jax.random.key(0))["order"].tolist()
    [0, 1, 2, 3]
    """

    block: int = 128
    needs_sample: ClassVar[bool] = False

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the arrays that `fit` makes."""
        return {"order": jax.ShapeDtypeStruct((self.size(n),), jnp.uint16)}

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the arrays fitted to the largest magnitudes of the channels."""
        del key
        n = self.size(len(channels.largest))
        count = n // self.block
        ranked = jnp.argsort(-channels.largest, stable=True).reshape(self.block, count)
        back = (jnp.arange(self.block) % 2 == 1)[:, None]
        dealt = jnp.where(back, ranked[:, ::-1], ranked)  # [round, block]
        return {"order": dealt.T.reshape(n).astype(jnp.uint16)}

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """Return x A for row vectors x."""
        return x[..., arrays["order"]]

    def transposed(
        self, y: Float[Array, "... n"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """Return y A^T for row vectors y."""
        return y[..., jnp.argsort(arrays["order"])]


@lru_cache
def spreading(size: int) -> np.ndarray:
    """Return an orthonormal matrix [size, size] whose first row is flat.

    It is a product of Givens rotations of neighboring rows, with the first and last rows and
    columns swapped.

    Args:
      size: number of rows and columns.

    >>> r = spreading(4)
    >>> r[0].round(6).tolist(), float(np.abs(r @ r.T - np.eye(4)).max()) < 1e-15
    ([0.5, 0.5, 0.5, 0.5], True)
    """
    r = np.eye(size)
    for i in range(size - 1):
        cos, sin = np.sqrt(1 / (i + 2)), np.sqrt((i + 1) / (i + 2))
        r[[i, i + 1]] = np.array([[cos, -sin], [sin, cos]]) @ r[[i, i + 1]]
    ends = np.arange(size)
    ends[[0, -1]] = ends[[-1, 0]]
    return r[ends][:, ends]


def _swapped(turn: Float[Array, "s s"], channel: Array) -> Float[Array, "s s"]:
    """Return the matrix with rows and columns 0 and `channel` swapped."""
    order = jnp.arange(len(turn)).at[0].set(channel).at[channel].set(0)
    return turn[order][:, order]
