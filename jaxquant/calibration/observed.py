"""`Observed`: a weight whose matmuls report a summary of their input as a cotangent.

In the backward rule of `dot(x, w, probe)`, the cotangent for the probe is a summary of x and of the
gradient at the output. One `jax.grad` therefore collects the summaries of all layers, including
those inside `lax.scan`; if a function multiplies by one weight several times, they add up.
`observe` is one such pass; calibration merges many.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jaxquant.core.contraction import Contraction
from jaxquant.core.explicit_axes import split_as
from jaxquant.core.standin import Pick, StandIn, is_standin


class Seen(NamedTuple):
    """What one matmul with one matrix observed.

    Where matrices are looked up, rows that went to other matrices are included as zeros. For a
    matmul with a part of the matrix, entries of `rows` and `output` outside of the part are zero.

    Attributes:
      rows: the input, [m, k].
      energy: |g|^2 for every row, where g is the gradient at the output.
      output: g, [m, n].
      weight: for every row: 1; 0 if it went to another matrix; below 1 if the matmul has only some
        of the outputs.
      counted: what the row adds to the number of rows: `weight` times the fraction of the inputs
        that the matmul has.
    """

    rows: Float[Array, "m k"]
    energy: Float[Array, " m"]
    output: Float[Array, "m n"]
    weight: Float[Array, " m"]
    counted: Float[Array, " m"]


class Summary(Protocol):
    """What to keep of the matmuls with a matrix [k, n]; must be hashable, because it is static."""

    def zeros(self, k: int, n: int) -> PyTree:
        """Return the empty summary, a pytree of float32 arrays.

        Args:
          k: number of inputs of the matrix.
          n: number of outputs of the matrix.
        """

    def of(self, seen: Seen) -> PyTree:
        """Return the summary of one matmul, with the same structure and shapes as `zeros`.

        Args:
          seen: what the matmul observed.
        """


class Observed(StandIn):
    """A dense weight with a probe that its matmuls fill, stored as [*batch, ...]."""

    array: Array
    probe: PyTree
    order: tuple[int, ...] = eqx.field(static=True)
    core: int = eqx.field(static=True)  # number of axes that are not batch axes
    # Contracted stored axes, counted from the end.
    contracted: tuple[int, ...] = eqx.field(static=True)
    summary: Summary = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)  # of the whole weight's core axes
    covered: float | None = eqx.field(static=True, default=None)  # as in `Site`
    # For looked-up matrices [*batch], the index of each in the probe; None: they are the probe's.
    which: Array | None = None
    # For each core axis, the positions [*batch, size] of a part in the whole; None: not a part.
    places: tuple[Array | None, ...] = ()

    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.view_shape(), self.array.dtype)

    def materialise(self) -> Array:
        return jnp.transpose(self.array, self.axes())

    def reordered(self, order: tuple[int, ...]) -> "Observed":
        return dataclasses.replace(self, order=order)

    def cast(self, dtype: DTypeLike) -> "Observed":
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def at_leading(self, fn: Callable[[Array], Array]) -> "Observed":
        array, places = jax.tree.map(fn, (self.array, self.places))
        if self.which is not None:
            return dataclasses.replace(self, array=array, places=places, which=fn(self.which))
        return dataclasses.replace(
            self, array=array, places=places, probe=jax.tree.map(fn, self.probe)
        )

    def picked(self, pick: Pick) -> "StandIn | None":
        if pick.indices is None or self.which is not None:
            return super().picked(pick)
        # The probe stays whole, so that all rows of a matrix are summed in one place.
        batch = self.stored_shape()[: self.leading()]
        which = jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(batch)
        probe = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(batch) :]), self.probe)
        return dataclasses.replace(self, which=which, probe=probe).picked(pick)

    def narrowed(self, cuts: Mapping[int, Any]) -> "Observed":
        leading, array, places = (
            self.leading(),
            self.array,
            list(self.places or (None,) * self.core),
        )
        for axis, cut in cuts.items():
            place, whole = places[axis - leading], array.shape
            if place is None:
                place = jnp.broadcast_to(jnp.arange(whole[axis]), (*whole[:leading], whole[axis]))
            places[axis - leading] = cut(place, leading)
            array = cut(array, axis)
        return dataclasses.replace(self, array=array, places=tuple(places))

    def separate(self) -> "Observed":
        if self.which is None:
            return self
        probe = jax.tree.map(lambda a: a[self.which], self.probe)
        return dataclasses.replace(self, probe=probe, which=None)

    def leading(self) -> int:
        return self.array.ndim - self.core


@quax.register(jax.lax.dot_general_p)
def _(x: Any, w: Observed, **params: PyTree) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=False)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: Observed, x: Any, **params: PyTree) -> Array:
    if isinstance(x, Observed) and w.which is not None and x.which is None:
        return _observe(w.materialise(), x, params, weight_left=False)  # as in `sites`
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=True)


def _observe(x: Array, w: Observed, params: dict[str, Any], *, weight_left: bool) -> Array:
    """Compute the plain product, with a backward rule that fills the probe."""
    axes, leading, shape = w.axes(), w.leading(), w.stored_shape()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=weight_left)
    inner = {a for a in c.contracted(axes) if a >= leading}

    def dot(x: Array, dense: Array) -> Array:
        operands = (dense, x) if weight_left else (x, dense)
        return jax.lax.dot_general_p.bind(*operands, **params)

    def summary(x: Array, g: Array, probe: PyTree, which: Array | None, places: Any) -> PyTree:
        missing = sorted(set(range(leading)) - c.contracted(axes) - c.batched(axes))
        rows = jnp.expand_dims(c.rows(x, axes, leading, inner), missing).astype(jnp.float32)
        output = c.output_rows(g, axes, leading)
        part = _Part.of(w, inner)
        seen = part.seen(rows, output, places)
        of: Callable[[Seen], Any] = w.summary.of
        if which is not None:
            found = _by_owner(of, seen, which, len(jax.tree.leaves(probe)[0]))
        else:
            for size in reversed(shape[:leading]):
                of = _mapped(of, size)
            found = of(seen)
        return jax.tree.map(lambda a, like: a.astype(like.dtype), found, probe)

    if {a - len(shape) for a in inner} != set(w.contracted):  # contracts other axes: not observed
        return dot(x, w.materialise())
    return _observed_dot(dot, summary, x, w.materialise(), w.probe, w.which, w.places)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Position of a matmul's part of a weight in the matrix [k, n].

    Attributes:
      axes: core axes that make up k, and those that make up n.
      sizes: sizes of the core axes of the part.
      whole: sizes of the core axes of the whole weight.
      covered: as in `Site`.
    """

    axes: tuple[tuple[int, ...], tuple[int, ...]]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]
    covered: float | None

    @staticmethod
    def of(w: Observed, contracted: set[int]) -> "_Part":
        leading = w.leading()
        k = tuple(sorted(a - leading for a in contracted))
        n = tuple(a for a in range(w.core) if a not in k)
        return _Part((k, n), w.stored_shape()[leading:], w.sizes, w.covered)

    def seen(self, rows: Array, output: Array, places: Sequence[Array | None]) -> Seen:
        """Return rows and outputs for the whole matrix, with zeros outside of the part."""
        energy = jnp.sum(jnp.square(output), axis=-1)
        inputs, outputs = (
            math.prod(self.sizes[a] / self.whole[a] for a in axes) for axes in self.axes
        )
        weight = outputs if self.covered is None else outputs / self.covered
        count = outputs * inputs if self.covered is None else weight
        rows, output = (
            self._spread(a, axes, places) for a, axes in zip((rows, output), self.axes, strict=True)
        )
        ones = jnp.ones(rows.shape[:-1])
        return Seen(rows, energy, output, weight * ones, count * ones)

    def _spread(
        self, a: Float[Array, "*lead m part"], axes: tuple[int, ...], places: Sequence[Array | None]
    ) -> Float[Array, "*lead m whole"]:
        if not any(places[axis] is not None for axis in axes if places):
            return a
        at = jnp.zeros((1,), jnp.int32)
        for axis in axes:
            place = places[axis]
            place = jnp.arange(self.sizes[axis]) if place is None else place
            at = at[..., :, None] * self.whole[axis] + place[..., None, :]
            at = at.reshape(*at.shape[:-2], -1)
        lead = jnp.broadcast_shapes(at.shape[:-1], a.shape[:-2])
        at = jnp.broadcast_to(at, (*lead, at.shape[-1]))
        a = jnp.broadcast_to(a, (*lead, *a.shape[-2:]))
        one = lambda a, at: jnp.zeros((len(a), self._size(axes))).at[:, at].add(a)
        for _ in lead:
            one = jax.vmap(one)
        return one(a, at)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.whole[axis] for axis in axes)


def _by_owner(of: Callable[[Seen], Any], seen: Seen, which: Array, count: int) -> PyTree:
    """Apply `of` for each of `count` matrices to the rows that looked it up."""
    m = seen.weight.shape[-1]
    full = lambda a: jnp.broadcast_to(a, (*which.shape, *a.shape[which.ndim :]))
    flat = Seen(*(full(a).reshape(-1, *a.shape[which.ndim + 1 :]) for a in seen))
    owner = jnp.repeat(which.reshape(-1), m)

    def one(i: Array) -> PyTree:
        mine = owner == i
        return of(Seen(*(jnp.where(mine[(...,) + (None,) * (a.ndim - 1)], a, 0) for a in flat)))

    return jax.lax.map(one, jnp.arange(count))


def _mapped(of: Callable[[Seen], Any], size: int) -> Callable[[Seen], Any]:
    """Map `of` along a leading axis; fields that are constant along it have size 1 there."""

    def mapped(seen: Seen) -> PyTree:
        axes: Any = Seen(*(0 if len(a) == size else None for a in seen))  # type: ignore[arg-type]
        one = Seen(*(a if axis == 0 else a[0] for a, axis in zip(seen, axes, strict=True)))
        return jax.vmap(of, in_axes=(axes,), axis_size=size)(one)

    return mapped


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed_dot(
    dot: Callable, summary: Callable, x: Array, w: Array, probe: PyTree, which: Any, places: Any
) -> Array:
    return dot(x, w)


def _forward(dot: Callable, summary: Callable, x: Array, w: Array, *other: PyTree) -> PyTree:
    return dot(x, w), (x, w, *other)


def _backward(dot: Callable, summary: Callable, residuals: PyTree, g: Array) -> PyTree:
    x, w, *other = residuals
    _, pull = jax.vjp(dot, x, w)
    return *pull(g), split_as(other[0], summary, x, g, *other), None, None


_observed_dot.defvjp(_forward, _backward)
