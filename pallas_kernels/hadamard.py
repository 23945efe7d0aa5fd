"""Orthonormal Hadamard transforms of any width for which a Hadamard matrix can be constructed.

A width is split into factors, n = f_1 f_2 ..., each with a Hadamard matrix of its own, and
H = H_{f_1} (x) H_{f_2} (x) ... is applied one factor at a time. This takes n (f_1 + f_2 + ...)
operations instead of n^2, in products with small matrices, which XLA runs well on every platform.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.hadamard_orders import construct, constructible

LARGEST = 1024  # largest factor; its matrix is a constant of the program
# Cost of one more pass over the data, in units of a factor's order. Measured with XLA:CPU and 512
# rows, 4096 = 16 * 16 * 16 is faster than 64 * 64 and 8 * 8 * 8 * 8. This constant and the
# constructible orders determine the factors of a width and hence its matrix, on which models
# stored in rotated form depend.
PASS = 32


@functools.cache
def _factors(n: int) -> tuple[int, tuple[int, ...]] | None:
    """Return the cost and the factors of the cheapest split of n, or None if there is none."""
    if n == 1:
        return 0, ()
    splits = []
    for f in range(2, min(n, LARGEST) + 1):
        if n % f == 0 and constructible(f) and (rest := _factors(n // f)):
            splits.append((f + PASS + rest[0], tuple(sorted((f, *rest[1]), reverse=True))))
    return min(splits, default=None)


def exists(n: int) -> bool:
    """Return whether a width has a transform: n is a product of orders that `construct` supports.

    Args:
      n: the width.

    >>> exists(576), exists(6), exists(356)
    (True, False, False)
    """
    return n > 0 and _factors(n) is not None


def padded(n: int) -> int:
    """Return the smallest width that is at least n and has a transform.

    Args:
      n: the width.

    >>> padded(576), padded(577), padded(356)
    (576, 580, 360)
    """
    while not exists(n):
        n += 1
    return n


def plan(n: int) -> tuple[int, ...]:
    """Return the orders of the Kronecker factors of a width, largest first.

    Args:
      n: the width.
    Raises:
      ValueError: n is not positive, or no Hadamard matrix of order n can be constructed.

    >>> plan(576), plan(1536), plan(18944)
    ((24, 24), (16, 12, 8), (148, 16, 8))
    """
    if n < 1:
        raise ValueError(f"a width must be positive, got {n}")
    split = _factors(n)
    if split is None:
        below = next(m for m in range(n, 0, -1) if exists(m))
        raise ValueError(
            f"no Hadamard matrix of order {n} can be made; the nearest are {below} and "
            f"{padded(n)}: pad, or transform in blocks of an order that divides {n}"
        )
    return split[1]


def matrix(n: int) -> Int8[np.ndarray, "n n"]:
    """Return the int8 Hadamard matrix H [n, n] of `transform`, with H H^T = n I.

    It is the Kronecker product of the matrices of `plan(n)`.

    Args:
      n: the order.
    Raises:
      ValueError: n is not positive, or no Hadamard matrix of order n can be constructed.

    >>> h = matrix(12).astype(int)
    >>> bool((h @ h.T == 12 * np.eye(12)).all())
    True
    """
    return functools.reduce(np.kron, map(construct, plan(n)), np.ones((1, 1), np.int8))


def transform(
    x: Float[Array, "..."], block: int | None = None, axis: int = -1
) -> Float[Array, "..."]:
    """Return x H / sqrt(n) along an axis: every vector times the orthonormal Hadamard matrix.

    Args:
      x: array of any floating-point dtype. Intermediate results between factors have this dtype;
        sums are in float32 or wider.
      block: if given, each run of this many entries is transformed by itself, H = I (x) H_block.
      axis: the axis to transform, of n entries.
    Returns:
      An array of the shape and dtype of x.
    Raises:
      ValueError: x is not floating-point, block does not divide n, or no such Hadamard matrix
        exists.
    Source: Tseng et al. 2024 (QuIP#), arXiv:2402.04396, which uses tables of a dozen orders and one
      factor of 2^p. For a weight [k, n] and y = x @ w, transforming x along its last axis and w
      along axis 0 leaves y unchanged.

    >>> transform(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    return _apply(x, block, axis, 0)


def transform_transposed(
    x: Float[Array, "..."], block: int | None = None, axis: int = -1
) -> Float[Array, "..."]:
    """Return x H^T / sqrt(n) along an axis, the inverse of `transform`.

    Args:
      x, block, axis: as in `transform`.

    >>> transform_transposed(transform(jnp.arange(12.0))).round(4).tolist()[:4]
    [0.0, 1.0, 2.0, 3.0]
    """
    return _apply(x, block, axis, 1)


@functools.partial(jax.jit, static_argnames=("block", "axis", "side"))
def _apply(x: Array, block: int | None, axis: int, side: int) -> Array:
    """Contract axis `side` of every factor's matrix with the matching part of the axis of x."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected a floating array, got {x.dtype}; cast it first")
    axis = np.lib.array_utils.normalize_axis_index(axis, x.ndim)
    n = x.shape[axis]
    block = n if block is None else block
    if block < 1 or n % block:
        raise ValueError(f"block {block} does not divide n = {n}; use one that does")
    factors = plan(block)
    sums = jnp.promote_types(x.dtype, jnp.float32)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    y = x.reshape(*before, n // block, *factors, *after)
    for f in factors:
        # The contracted axis moves to the end, so after the last factor the order is restored.
        y = lax.dot_general(
            y,
            jnp.asarray(construct(f)).astype(x.dtype),  # a small int8 constant in the program
            (((axis + 1,), (side,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=sums,
        )
        y = (y * f**-0.5).astype(x.dtype)
    runs = jnp.moveaxis(y.reshape(*before, n // block, *after, block), axis, -2)
    return jnp.moveaxis(runs.reshape(*before, *after, n), -1, axis)
