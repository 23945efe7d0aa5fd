"""The statistics of experts: the rule for `Observed` in `jax.lax.ragged_dot`.

Each matrix multiplies a group of consecutive rows. A window cuts the group out of all rows. Windows
have one of a few sizes, at most twice the size of the group beyond the smallest, so the summaries
of all experts together take about as long as one summary of all rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import quax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant.calibration.observed import Observed, Seen
from jaxquant.core.contraction import group_axis
from jaxquant.core.explicit_axes import over_auto_axes
from jaxquant.core.jax_private import ragged_dot_general_p
from jaxquant.core.standin import is_standin
from pallas_kernels.partition import explicit_mesh

SMALLEST = 64  # rows of the smallest window


@quax.register(ragged_dot_general_p)
def _observe(x: Any, w: Observed, sizes: Any, **params: PyTree) -> Array:
    """Compute the plain product, with a backward rule that fills the probe."""
    x = x.materialise() if is_standin(x) else x
    if (mesh := explicit_mesh(x, w.array, sizes)) is not None:
        out = params["out_sharding"] or NamedSharding(mesh, P())
        again = partial(_observe, **{**params, "out_sharding": None})
        return over_auto_axes(again, mesh, out, x, w, sizes)
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

    plain = (axis, over) == (0, 1)
    form = _Form(dot, summary, k, params["preferred_element_type"] if plain else None, plain)
    return _observed_dot(form, x, w.materialise(), w.probe, sizes)


def by_group(
    of: Callable[[Seen], Any],
    x: Float[Array, "m k"],
    g: Float[Array, "m n"],
    sizes: Int[Array, " E"],
) -> PyTree:
    """Return the summaries of groups of rows, stacked along a leading axis.

    Args:
      of: function that summarizes what it sees of a matmul.
      x: the rows, sorted by group [m, k], float32.
      g: the gradients at the outputs [m, n], float32.
      sizes: number of rows of every group [E].
    Returns:
      The tree that `of` returns, with a leading axis of E groups.
    """

    def of_group(window: _Window) -> PyTree:
        rows, out = (window.cut(a) for a in (x, g))
        mine = window.mine.astype(jnp.float32)
        return of(Seen(rows, jnp.sum(jnp.square(out), axis=-1), out, mine, mine))

    ends = jnp.cumsum(sizes)
    one = lambda group: _windowed(len(x), group[0], group[1], of_group)
    return jax.lax.map(one, (ends - sizes, ends))


def product(
    x: Float[Array, "m k"], w: Float[Array, "E a b"], sizes: Int[Array, " E"], k: int, dtype: Any
) -> Float[Array, "m n"]:
    """Return the `ragged_dot` of rows and a stack, computed group by group.

    On a CPU, XLA would multiply all rows by the matrices of all groups, after it has replaced the
    rows of other groups by zeros: E times the work, and E times the memory of the rows.

    Args:
      x: the rows, sorted by group [m, k].
      w: the stack [E, k, n], or [E, n, k].
      sizes: number of rows of every group [E].
      k: the axis of the stack that is summed over, 1 or 2.
      dtype: dtype of the sums and of the result; None for that of the operands.
    Returns:
      The products [m, n]; rows past the last group are zero.

    >>> x, w = jnp.ones((3, 2)), jnp.array([[[1.0], [1.0]], [[2.0], [2.0]]])
    >>> product(x, w, jnp.array([2, 1]), 1, None).ravel().tolist()
    [2.0, 2.0, 4.0]
    """
    over = (((1,), (k - 1,)), ((), ()))
    dot = lambda a, b: jax.lax.dot_general(a, b, over, preferred_element_type=dtype)
    out = jax.eval_shape(dot, x, w[0])

    def add(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, first, end = group

        def of_group(window: _Window) -> Array:
            part = jax.lax.dynamic_slice_in_dim(y, window.start, len(window.mine))
            part = jnp.where(window.mine[:, None], dot(window.cut(x), matrix), part)
            return jax.lax.dynamic_update_slice_in_dim(y, part, window.start, axis=0)

        return _windowed(len(x), first, end, of_group), None

    ends = jnp.cumsum(sizes)
    return jax.lax.scan(add, jnp.zeros(out.shape, out.dtype), (w, ends - sizes, ends))[0]


class _Window(NamedTuple):
    """Consecutive rows that include all rows of a group.

    Attributes:
      start: index of the first row of the window.
      mine: for each row of the window, whether it belongs to the group.
    """

    start: Int[Array, ""]
    mine: Bool[Array, " size"]

    def cut(self, a: Float[Array, "m k"]) -> Float[Array, "size k"]:
        """Return the rows of the window, with zeros in place of rows of other groups."""
        rows = jax.lax.dynamic_slice_in_dim(a, self.start, len(self.mine))
        return jnp.where(self.mine[:, None], rows, 0)


def _windowed(m: int, first: Array, end: Array, of: Callable[[_Window], PyTree]) -> PyTree:
    """Return `of` the smallest window that holds the rows `first`, ..., `end` - 1, of m rows."""
    sizes = [min(SMALLEST, m)]
    while sizes[-1] < m:
        sizes.append(min(2 * sizes[-1], m))

    def of_size(size: int) -> PyTree:
        start = jnp.clip(first, 0, m - size)
        place = start + jnp.arange(size)
        return of(_Window(start, (place >= first) & (place < end)))

    kind = jnp.sum(jnp.array(sizes) < end - first)
    return jax.lax.switch(kind, [partial(of_size, size) for size in sizes])


class _Form(NamedTuple):
    """The static properties of an observed product.

    Attributes:
      dot: function that computes the product.
      summary: function that computes the statistics for the probe.
      k: the axis of the stack that is summed over.
      dtype: dtype of the sums, or None for that of the operands.
      plain: whether the product is that of rows [m, k] and a stack whose first axis is the groups.
    """

    dot: Callable[..., Array]
    summary: Callable[..., PyTree]
    k: int
    dtype: Any
    plain: bool

    def forward(self, x: Array, w: Array, sizes: Array) -> Array:
        """Return the product."""
        if not self.plain:
            return self.dot(x, w, sizes)
        by_hand = lambda x, w, sizes: product(x, w, sizes, self.k, self.dtype)
        return jax.lax.platform_dependent(x, w, sizes, cpu=by_hand, default=self.dot)

    def backward(self, x: Array, w: Array, sizes: Array, g: Array) -> Array:
        """Return the gradient at x, given the gradient g at the product."""

        def default(x: Array, w: Array, sizes: Array, g: Array) -> Array:
            return jax.vjp(lambda x: self.dot(x, w, sizes), x)[1](g)[0]

        def by_hand(x: Array, w: Array, sizes: Array, g: Array) -> Array:
            return product(g, w, sizes, 3 - self.k, None).astype(x.dtype)

        if not self.plain:
            return default(x, w, sizes, g)
        return jax.lax.platform_dependent(x, w, sizes, g, cpu=by_hand, default=default)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observed_dot(form: _Form, x: Array, w: Array, probe: PyTree, sizes: Array) -> Array:
    return form.forward(x, w, sizes)


def _forward(form: _Form, x: Array, w: Array, probe: PyTree, sizes: Array) -> PyTree:
    return form.forward(x, w, sizes), (x, w, probe, sizes)


def _backward(form: _Form, residuals: PyTree, g: Array) -> PyTree:
    x, w, probe, sizes = residuals
    _, pull = jax.vjp(lambda w: form.dot(x, w, sizes), w)  # never computed where it is not used
    return form.backward(x, w, sizes, g), *pull(g), form.summary(x, g, probe, sizes), None


_observed_dot.defvjp(_forward, _backward)
