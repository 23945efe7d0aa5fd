"""LoTA: a ternary low-rank change of the codes; `signed_steps` holds its optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.adapters.adapted import LORA_A as A
from jaxquant.adapters.adapted import LORA_B as B
from jaxquant.adapters.adapted import TERNARY
from jaxquant.adapters.lora import base_of, check_fits, check_rank
from jaxquant.adapters.pooled import offset_format, with_offsets
from jaxquant.adapters.requantized import Requantized, check_integer, summed
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Data, Format, Known
from jaxquant.formats.integer import Integer, spread
from pallas_kernels.codecs import layout


@dataclasses.dataclass(frozen=True)
class LoTA(Requantized):
    """y = x (scale * (codes + M) + offset'), with a ternary M that is given by A and B.

    A [k, rank] and B [rank, n] hold -1, 0 and 1, so D = A B holds integers from -rank to rank. With
    w = threshold * rank, M = sign(D) where |D| > w, unless the code would leave its range;
    elsewhere M = 0. What is left, D - w M, is averaged over each group of rows and enters the
    offset: offset' = offset + scale * mean(D - w M) / d, where d is w, or 1 if `divided` is False.
    Everything stays inside the grid, so a merge adds M to the codes and stores offset': it computes
    what was trained, bit for bit, and takes no more bytes than the format did. Gradients pass
    straight through M.

    A and B are trained by signed steps, `jaxquant.adapters.sign_descent`. A weight whose format is
    not an `Offset` is put into one first, as for `QALoRA`, which can add bytes.

    Attributes:
      rank: number of columns of A, at least 1 and at most min(k, n).
      threshold: w as a fraction of the rank, in (0, 1). Default: 0.75.
      divided: whether the mean is divided by w, as in the released code; the text of the paper does
        not divide it. Default: True.
    Raises:
      ValueError: a field is out of its range; or, at `jaxquant.adapt`, the rank exceeds what a
        matrix allows, or its format does not hold integers.

    Source: Chen et al. 2025, arXiv:2505.18724, and its released code.

    >>> LoTA(rank=16).level
    12.0
    """

    rank: int
    threshold: float = 0.75
    divided: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_rank(self.rank, None)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")

    @property
    def level(self) -> float:
        """What |D| must exceed to change a code."""
        return self.threshold * self.rank

    def labels(self, format: Any) -> Mapping[str, str]:
        return {A: TERNARY, B: TERNARY}

    def home(self, format: Any) -> Format:
        """Return the format with offsets in which the adapted matrix is stored."""
        return offset_format(format)

    def check(self, format: Format, k: int, n: int) -> None:
        """Raise ValueError unless matrices [k, n] in this format can be adapted this way."""
        check_integer("LoTA changes the codes of integers", self.home(format), format)
        format.check_shape(k, n)
        check_fits(self.rank, k, n)

    def start(self, format: Any, data: Data, known: Known) -> Data:
        """Return the arrays at the start, float32.

        A holds the signs of normal numbers, and 0 where a magnitude is at most 0.75 times their
        mean; B is zero.
        """
        home: Any = self.home(format)
        data = data if home == format else with_offsets(format, home, data)
        a = jax.random.normal(known.key, (known.k, self.rank))
        a = jnp.where(jnp.abs(a) > 0.75 * jnp.mean(jnp.abs(a)), jnp.sign(a), 0.0)
        return {**data, A: a, B: jnp.zeros((self.rank, known.n))}

    def merged(self, format: Any, data: Data, k: int) -> Data:
        inner: Integer = format.format
        codes = layout.unpack(data["codes"], inner.bits, k)
        change = self._change(data)
        moves = self._moves(inner, codes, change)
        part = summed(format.rows_per_group(k), change - self.level * moves)
        part = part / _rows(format.rows_per_group(k), k)
        scale = data["scale"].astype(jnp.float32)
        offset = data["offset"].astype(jnp.float32) + scale * part / self._divisor
        # The barrier keeps XLA from fusing the sum with other code, which could change it.
        offset = jax.lax.optimization_barrier(offset)
        packed = layout.pack((codes + moves.astype(jnp.int32)).astype(jnp.int32), inner.bits)
        return {**base_of(data), "codes": packed, "offset": offset.astype(format.dtype)}

    @property
    def _divisor(self) -> float:
        return self.level if self.divided else 1.0

    def _change(self, data: Data) -> Float[Array, "k n"]:
        return data[A].astype(jnp.float32) @ data[B].astype(jnp.float32)

    def cotangents(self, format: Any, data: Data, g: Float[Array, "k n"]) -> Data:
        """Return the cotangents of A and B.

        With G the cotangent of the matrix, mean(G) its mean over each group of rows, s the scale
        and d as above, dD = s (G + mean(G) / d), dA = dD B^T and dB = A^T dD.
        """
        k, rows = len(g), format.rows_per_group(len(g))
        mean = summed(rows, g) / _rows(rows, k) / self._divisor
        scale = data["scale"].astype(jnp.float32)
        change = spread(scale, rows, k) * (g + spread(mean, rows, k))
        a, b = (data[name].astype(jnp.float32) for name in (A, B))
        return {A: change @ b.T, B: a.T @ change}

    def _moves(
        self, format: Integer, codes: Int[Array, "k n"], change: Float[Array, "k n"]
    ) -> Float[Array, "k n"]:
        """Return M: the steps that codes take, none out of their range."""
        low, high = format.limits
        up = (change > self.level) & (codes < high)
        down = (change < -self.level) & (codes > low)
        return up.astype(jnp.float32) - down.astype(jnp.float32)


def _rows(rows: int, k: int) -> Float[Array, "g 1"]:
    """Return the number of rows of every group; the last may be short."""
    return jnp.minimum(rows, k - rows * jnp.arange(-(-k // rows)))[:, None].astype(jnp.float32)
