"""Starts of a low-rank adapter that make up for the error of quantization, or learn faster."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols import Data, Format

Floats = Float[Array, "k n"]
Gram = Float[Array, "k k"] | None
Start = tuple[Data, Float[Array, "k r"], Float[Array, "r n"]]
ROUNDS = 5  # of LoftQ
DAMPING = 1e-2  # of CLoQ's second moment, as a fraction of its mean diagonal


def pissa(format: Format, data: Data, w: Floats, gram: Gram, rank: int) -> Start:
    """Move the principal part of the floats into A B and quantize the rest.

    Args:
      format: format of the matrix.
      data: its packed arrays; not used.
      w: its floats.
      gram: not used.
      rank: rank of A B.
    Returns:
      The packed arrays of the rest, A and B.
    Source: Meng et al. 2024, arXiv:2404.02948.
    """
    a, b = best_product(w, rank)
    return format.encode(w - a @ b), a, b


def loftq(format: Format, data: Data, w: Floats, gram: Gram, rank: int) -> Start:
    """Alternate between Q = quantized(W - A B) and the best A B for W - Q; keep the best pair.

    Args:
      format: format of the matrix.
      data: its packed arrays, which are the first Q.
      w: its floats W.
      gram: not used.
      rank: rank of A B.
    Returns:
      The packed arrays of Q, A and B.
    Source: Li et al. 2023, arXiv:2310.08659. There the last pair is used; the error may rise again
      after the first rounds, so here the best is. The first Q may come from any rounder.
    """
    k = len(w)

    def with_product(data: Data) -> tuple[Start, Array]:
        rest = w - format.decode(data, k)
        a, b = best_product(rest, rank)
        return (data, a, b), jnp.sum((rest - a @ b) ** 2)

    def turn(_: int, state: tuple) -> tuple:
        best, least, (_, a, b) = state
        new, error = with_product(format.encode(w - a @ b))
        better = error < least
        return (
            jax.tree.map(lambda x, y: jnp.where(better, x, y), new, best),
            jnp.minimum(error, least),
            new,
        )

    first, error = with_product(data)
    return jax.lax.fori_loop(1, ROUNDS, turn, (first, error, first))[0]


def cloq(format: Format, data: Data, w: Floats, gram: Gram, rank: int) -> Start:
    """Return the A B that brings the outputs of the quantized matrix closest to the original.

    With E = W - Q and the second moment H = R^T R of the inputs, the product that minimizes
    |R (E - A B)| is A B = R^-1 [R E]_r, where [.]_r is the best approximation of rank r. Q stays as
    the rounder chose it. Before that, 0.01 times the mean of the diagonal of H is added to the
    diagonal. The factors are balanced: A and B have equal norms, whatever the scale of H.

    Args:
      format: format of the matrix.
      data: its packed arrays.
      w: its floats.
      gram: the second moment H of its inputs, float32 [k, k].
      rank: rank of A B.
    Returns:
      The packed arrays, A and B.
    Raises:
      ValueError: the second moment is unknown.
    Source: Deng et al. 2025, arXiv:2501.18475.
    """
    if gram is None:
        raise ValueError('init="cloq" needs statistics of the inputs: pass stats=calibrate(...)')
    gram = gram + DAMPING * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(w))
    values, vectors = jnp.linalg.eigh(gram)
    root = jnp.sqrt(values)
    through = root[:, None] * (vectors.T @ (w - format.decode(data, len(w))))
    a, b = best_product(through, rank)
    return data, *balanced(vectors @ (a / root[:, None]), b)


def best_product(w: Float[Array, "k n"], rank: int) -> tuple[Array, Array]:
    """Return (A, B) with A B the best approximation of w of some rank; both have equal norms.

    Args:
      w: the matrix.
      rank: rank of the product.

    >>> a, b = best_product(jnp.diag(jnp.array([4.0, 1.0])), 1)
    >>> (a @ b).round(3).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def balanced(a: Float[Array, "k r"], b: Float[Array, "r n"]) -> tuple[Array, Array]:
    """Return factors of the product A B of equal norms, so that one learning rate suits both.

    Args:
      a, b: the factors.

    >>> a, b = balanced(jnp.array([[100.0], [0.0]]), jnp.array([[0.01, 0.0]]))
    >>> abs(a).ravel().round(3).tolist(), abs(b).ravel().round(3).tolist()
    ([1.0, 0.0], [1.0, 0.0])
    """
    q, rest = jnp.linalg.qr(a)
    inner, outer = best_product(rest @ b, len(b))
    return q @ inner, outer


STARTS: dict[str, Callable[[Format, Data, Floats, Gram, int], Start]] = {
    "pissa": pissa, "loftq": loftq, "cloq": cloq
}  # fmt: skip
