"""The statistics of experts: `Observed` in `jax.lax.ragged_dot`.

Each matrix multiplies a group of the rows, which lie together. They are cut out of all rows with a
window of one of a few sizes, twice the group at most, so that the summaries of all experts take
about as long as one of all rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.calibration.observed import Observed, Seen
from jaxquant.core.contraction import group_axis
from jaxquant.core.jax_private import ragged_dot_general_p
from jaxquant.core.standin import is_standin

SMALLEST = 64  # rows of the smallest window


@quax.register(ragged_dot_general_p)
def _(x: Any, w: Observed, sizes: Any, **params: PyTree) -> Array:
    """Compute the plain product, with a backward rule that fills the probe."""
    x = x.materialise() if is_standin(x) else x
    numbers, axes = params["ragged_dot_dimension_numbers"], w.axes()
    axis = group_axis(numbers, x.ndim, w.ndim)

    def dot(x: Array, dense: Array, sizes: Array) -> Array:
        return ragged_dot_general_p.bind(x, dense, sizes, **params)

    if axis is None:
        return dot(x, w.materialise(), sizes)
    (over,), (k,) = numbers.dot_dimension_numbers[0]
    observed = w.which is None and not w.places and (w.leading(), axes[axis]) == (1, 0)
    if not observed or w.contracted != (axes[k] - w.ndim,):
        return dot(x, w.materialise(), sizes)

    def summary(x: Array, g: Array, probe: PyTree, sizes: Array) -> PyTree:
        rows = (x if over == 1 else x.T).astype(jnp.float32)
        found = by_group(w.summary.of, rows, g.astype(jnp.float32), sizes)
        return jax.tree.map(lambda a, like: a.astype(like.dtype), found, probe)

    return _observed_dot(dot, summary, x, w.materialise(), w.probe, sizes)


def by_group(
    of: Callable[[Seen], Any],
    x: Float[Array, "m k"],
    g: Float[Array, "m n"],
    sizes: Int[Array, " E"],
) -> PyTree:
    """Return the summaries of groups of rows, stacked.

    Args:
      of: the summary of a matmul.
      x: the rows, sorted by group.
      g: the gradients at the outputs.
      sizes: number of rows of every group.
    """
    windows = _windows(len(x))
    ends = jnp.cumsum(sizes)

    def cut(size: int, first: Array, end: Array) -> PyTree:
        start = jnp.clip(first, 0, len(x) - size)
        place = start + jnp.arange(size)
        mine = ((place >= first) & (place < end)).astype(jnp.float32)
        rows, out = (jax.lax.dynamic_slice_in_dim(a, start, size) * mine[:, None] for a in (x, g))
        return of(Seen(rows, jnp.sum(jnp.square(out), axis=-1), out, mine, mine))

    def one(ends: tuple[Array, Array]) -> PyTree:
        first, end = ends
        kind = jnp.sum(jnp.array(windows) < end - first)
        return jax.lax.switch(kind, [partial(cut, size) for size in windows], first, end)

    return jax.lax.map(one, (ends - sizes, ends))


def _windows(m: int) -> list[int]:
    """Return the sizes of windows, ascending; the last one takes all m rows."""
    sizes = []
    size = min(SMALLEST, m)
    while size < m:
        sizes.append(size)
        size *= 2
    return [*sizes, m]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed_dot(
    dot: Callable, summary: Callable, x: Array, w: Array, probe: PyTree, sizes: Array
) -> Array:
    return dot(x, w, sizes)


def _forward(dot: Callable, summary: Callable, x: Array, w: Array, *other: PyTree) -> PyTree:
    return dot(x, w, other[-1]), (x, w, *other)


def _backward(dot: Callable, summary: Callable, residuals: PyTree, g: Array) -> PyTree:
    x, w, probe, sizes = residuals
    _, pull = jax.vjp(lambda x, w: dot(x, w, sizes), x, w)
    return *pull(g), summary(x, g, probe, sizes), None


_observed_dot.defvjp(_forward, _backward)
