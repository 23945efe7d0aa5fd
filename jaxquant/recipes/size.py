"""`size`: the storage of a tree of weights, and which of them are in floating point."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from jaxquant.core.paths import path_leaves
from jaxquant.core.standin import is_array, is_standin
from jaxquant.core.tree import leaf_bytes
from jaxquant.recipes.recipe import named


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes and numbers of weights of a whole tree, both quantized and floating-point.

    Attributes:
      bytes: total size in bytes of all quantized and floating-point arrays.
      weights: total number of weights.
      quantized: number of weights that are quantized.
      floating: path and number of weights of each array that is not quantized, largest first.
    """

    bytes: int
    weights: int
    quantized: int
    floating: tuple[tuple[str, int], ...]

    @property
    def bits_per_weight(self) -> float:
        """The average number of bits per weight over all weights; 0 if there are none."""
        return 8 * self.bytes / max(1, self.weights)

    @property
    def share(self) -> float:
        """The fraction of weights that are quantized, from 0 to 1."""
        return self.quantized / max(1, self.weights)

    def __str__(self) -> str:
        text = (
            f"{self.bits_per_weight:.3f} bits per weight over all weights, "
            f"{self.share:.1%} of them quantized"
        )
        return f"{text}; floating: {named(self.floating, self.weights)}" if self.floating else text


def size(params: PyTree) -> Size:
    """Return the size of a whole tree; `bits_per_weight` covers its quantized leaves only.

    Args:
      params: tree of arrays and `QTensor` leaves, or the same tree with `jax.ShapeDtypeStruct`s in
        place of the arrays (`jax.eval_shape`). Leaves that are neither floating-point arrays nor
        quantized are ignored.
    Returns:
      A `Size`.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> tree = {"w": jnp.ones((64, 32)), "table": jnp.ones((10, 32))}
    >>> found = size(jq.quantize(tree, jq.Recipe([("w", jq.rtn(4)), ("*", jq.KEEP)])))
    >>> found.bytes, found.weights, round(found.share, 3), found.floating
    (2384, 2368, 0.865, (('table', 320),))
    >>> print(found)
    8.054 bits per weight over all weights, 86.5% of them quantized; floating: table (13.5%)
    """
    return size_of(weight_leaves(params))


def size_of(leaves: Sequence[tuple[str, Any]]) -> Size:
    """Return the size of the leaves that `weight_leaves` returned.

    Args:
      leaves: paths and weights.
    """
    floating = [(path, w.size) for path, w in leaves if not is_standin(w)]
    return Size(
        sum(leaf_bytes(w) for _, w in leaves),
        sum(w.size for _, w in leaves),
        sum(w.size for _, w in leaves if is_standin(w)),
        tuple(sorted(floating, key=lambda one: -one[1])),
    )


def weight_leaves(params: PyTree) -> list[tuple[str, Any]]:
    """List the leaves that hold weights, quantized or floating-point, with their paths.

    Args:
      params: tree of arrays and stand-ins, or the same tree with `jax.ShapeDtypeStruct`s in place
        of the arrays.

    >>> [path for path, _ in weight_leaves({"w": jnp.ones(2), "step": jnp.zeros((), int), "n": 3})]
    ['w']
    """
    floats = lambda a: is_array(a) and jnp.issubdtype(a.dtype, jnp.floating)
    return [(path, w) for path, w in path_leaves(params) if is_standin(w) or floats(w)]
