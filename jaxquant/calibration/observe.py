"""`Observed`: a weight whose product says, by way of a cotangent, what its input was like.

`dot(x, w, probe)` has a backward rule whose cotangent for the probe is a summary of x and of the
gradient at the output, whatever summary is asked for. So one `jax.grad` collects every layer, those
inside `lax.scan` included; where a function multiplies by one weight several times, they add up.
`observe` is one such pass; calibration merges many.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.core.contraction import Contraction
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.sites import Site, sites
from jaxquant.core.standin import Pick, StandIn, is_standin, run


class Seen(NamedTuple):
    """What one product with one matrix saw.

    Where matrices are looked up, a row of which other ones took is here too, as zeros. Of a product
    with a part of the matrix, what the part leaves out of rows and outputs is zero.

    Attributes:
      rows: its input.
      energy: |g|^2 of every row, g the gradient at the output.
      output: g.
      weight: of every row: 1; 0 where it is another matrix's; less than 1 where the product has
        some of the outputs only.
      counted: what the row adds to the number of rows: that, times the share of inputs it has.
    """

    rows: Float[Array, "m k"]
    energy: Float[Array, " m"]
    output: Float[Array, "m n"]
    weight: Float[Array, " m"]
    counted: Float[Array, " m"]


class Summary(Protocol):
    """What is kept of the products with a matrix [k, n]; hashable, for it is static."""

    def zeros(self, k: int, n: int) -> Any:
        """Nothing seen yet: a pytree of float32 arrays."""

    def of(self, seen: Seen) -> Any:
        """Of one product: a pytree like it."""


class Observed(StandIn):
    """A dense weight with a probe, stored [*batch, ...]; its matmul fills the probe."""

    array: Array
    probe: Any
    order: tuple[int, ...] = eqx.field(static=True)
    core: int = eqx.field(static=True)  # axes that are not batch axes
    # Stored axes, from the end, that are summed over.
    contracted: tuple[int, ...] = eqx.field(static=True)
    summary: Summary = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)  # of the core axes of the whole weight
    covered: float | None = eqx.field(static=True, default=None)  # as of its `Site`
    # Of looked-up matrices [*batch], which of the probe's each is; None: the probe's are these.
    which: Array | None = None
    # By core axis, where a part of the weight lies in the whole, [*batch, size]; None: it is whole.
    places: tuple[Array | None, ...] = ()

    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def aval(self) -> Any:
        return jax.core.ShapedArray(self.view_shape(), self.array.dtype)

    def materialise(self) -> Array:
        return jnp.transpose(self.array, self.axes())

    def reordered(self, order: tuple[int, ...]) -> "Observed":
        return dataclasses.replace(self, order=order)

    def cast(self, dtype: Any) -> "Observed":
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def at_leading(self, fn: Any) -> "Observed":
        array, places = jax.tree.map(fn, (self.array, self.places))
        if self.which is not None:
            return dataclasses.replace(self, array=array, places=places, which=fn(self.which))
        return dataclasses.replace(
            self, array=array, places=places, probe=jax.tree.map(fn, self.probe)
        )

    def picked(self, pick: Pick) -> "StandIn | None":
        if pick.indices is None or self.which is not None:
            return super().picked(pick)
        # The probe stays whole, so that what a matrix saw is summed up once.
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
def _(x: Any, w: Observed, **params: Any) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=False)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: Observed, x: Any, **params: Any) -> Array:
    if isinstance(x, Observed) and w.which is not None and x.which is None:
        return _observe(w.materialise(), x, params, weight_left=False)  # as in `sites`
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=True)


def _observe(x: Array, w: Observed, params: dict[str, Any], *, weight_left: bool) -> Array:
    """The plain dot, with the rule that fills the probe in the backward pass."""
    axes, leading, shape = w.axes(), w.leading(), w.stored_shape()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=weight_left)
    inner = {a for a in c.contracted(axes) if a >= leading}

    def dot(x: Array, dense: Array) -> Array:
        operands = (dense, x) if weight_left else (x, dense)
        return jax.lax.dot_general_p.bind(*operands, **params)

    def summary(x: Array, g: Array, probe: Any, which: Array | None, places: Any) -> Any:
        rows, paired = c.rows(x, axes, leading, inner)
        missing = [i for i, has in enumerate(paired) if not has]
        rows = jnp.expand_dims(rows, missing).astype(jnp.float32)
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

    if {a - len(shape) for a in inner} != set(w.contracted):  # the other way round: not this one's
        return dot(x, w.materialise())
    return _observed_dot(dot, summary, x, w.materialise(), w.probe, w.which, w.places)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where the part of a weight that a product has lies in its matrix [k, n].

    Attributes:
      axes: core axes that make up k and those that make up n.
      sizes: of all core axes of the part; whole: of the weight.
      covered: of its `Site`.
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
        """Rows and outputs of the whole matrix, with zeros where the part has none."""
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


def _by_owner(of: Callable[[Seen], Any], seen: Seen, which: Array, count: int) -> Any:
    """`of` for each of so many matrices, of the rows that looked it up."""
    m = seen.weight.shape[-1]
    full = lambda a: jnp.broadcast_to(a, (*which.shape, *a.shape[which.ndim :]))
    flat = Seen(*(full(a).reshape(-1, *a.shape[which.ndim + 1 :]) for a in seen))
    owner = jnp.repeat(which.reshape(-1), m)

    def one(i: Array) -> Any:
        mine = owner == i
        return of(Seen(*(jnp.where(mine[(...,) + (None,) * (a.ndim - 1)], a, 0) for a in flat)))

    return jax.lax.map(one, jnp.arange(count))


def _mapped(of: Callable[[Seen], Any], size: int) -> Callable[[Seen], Any]:
    """`of` along a leading axis, which is 1 for what is the same all along it."""

    def mapped(seen: Seen) -> Any:
        axes: Any = Seen(*(0 if len(a) == size else None for a in seen))  # type: ignore[arg-type]
        one = Seen(*(a if axis == 0 else a[0] for a, axis in zip(seen, axes, strict=True)))
        return jax.vmap(of, in_axes=(axes,), axis_size=size)(one)

    return mapped


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed_dot(
    dot: Callable, summary: Callable, x: Array, w: Array, probe: Any, which: Any, places: Any
) -> Array:
    return dot(x, w)


def _forward(dot: Callable, summary: Callable, x: Array, w: Array, *other: Any) -> Any:
    return dot(x, w), (x, w, *other)


def _backward(dot: Callable, summary: Callable, residuals: Any, g: Array) -> Any:
    x, w, *other = residuals
    _, pull = jax.vjp(dot, x, w)
    return *pull(g), summary(x, g, *other), None, None


_observed_dot.defvjp(_forward, _backward)


class Observation(NamedTuple):
    """What one pass saw of one input.

    Attributes:
      weights: paths of the weights that multiply this very input.
      products: how many products with a matrix the summary is the sum of: 1 as a rule, 0 where no
        gradient reached the output, more where a function multiplies by one weight several times.
      summary: what was asked for, with leading axes over the layers (and experts) of a stack.
    """

    weights: tuple[str, ...]
    products: Float[Array, "*batch"]
    summary: Any


def observe(
    fn: Callable[..., Any], params: Any, *args: Any, summary: Summary
) -> dict[str, Observation]:
    """A summary of every input that `fn(params, *args)` multiplies by weights, in one pass.

    Args:
      fn: Flax, Equinox, plain JAX. What no gradient of its outputs reaches is not seen.
      params: floating parameter tree; decode packed weights (`jaxquant.dequantize`).
      args: arrays, or trees of them.
      summary: frozen dataclass with `zeros(k, n)` and `of(seen)`, pytrees of float32 arrays alike:
        they travel as cotangents, so an index too is a float, exact to 2^24.
    Returns:
      `Observation` by path of a weight, in the order of use; of weights that share an input, by
      the first of the tree.
    Raises:
      ValueError: packed weights, or nothing that is contracted.
    Warns:
      naming the weights whose outputs no gradient reached.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Largest:
    ...     def zeros(self, k, n):
    ...         return jnp.zeros(())
    ...
    ...     def of(self, seen):
    ...         return jnp.max(jnp.abs(seen.rows))
    >>> x = jnp.array([[1.0, -3.0]])
    >>> found = observe(lambda p, x: (x @ p["q"], x @ p["k"]),
    ...                 {"q": jnp.ones((2, 5)), "k": jnp.ones((2, 4))}, x, summary=Largest())
    >>> [(path, seen.weights, float(seen.summary)) for path, seen in found.items()]
    [('k', ('k', 'q'), 3.0)]
    """
    check_arguments(observe, locals())
    packed = [path for path, leaf in path_leaves(params) if is_standin(leaf)]
    if packed:
        raise ValueError(
            f"the inputs of packed weights are not observed, and {', '.join(packed[:3])} "
            f"({len(packed)} in all) are packed: pass jaxquant.dequantize(params)"
        )
    params, fn = arrays_only(params, fn)
    found = sites(fn, params, *args)
    holder = holders(found)
    if not holder:
        raise ValueError("expected a function that multiplies by its params; none is contracted")
    order = sorted(dict.fromkeys(holder.values()), key=lambda path: found[path].turn)
    held = tuple((path, found[path]) for path in order)
    sums = _pass(params, args, fn, held, _Counted(summary))
    weights = {path: tuple(w for w, h in holder.items() if h == path) for path, _ in held}
    missed = [weights[path][0] for path, (count, _) in sums.items() if not bool(jnp.all(count))]
    if missed:
        warnings.warn(
            f"no gradient reached the output of {', '.join(missed)}: their input was not seen",
            stacklevel=2,
        )
    return {path: Observation(weights[path], *sums[path]) for path, _ in held}


@dataclasses.dataclass(frozen=True)
class _Counted:
    """A summary, and how many were added."""

    summary: Summary

    def zeros(self, k: int, n: int) -> Any:
        return jnp.zeros(()), self.summary.zeros(k, n)

    def of(self, seen: Seen) -> Any:
        return jnp.ones(()), self.summary.of(seen)


@partial(jax.jit, static_argnames=("fn", "held", "summary"))
def _pass(
    params: Any, args: Any, fn: Callable, held: tuple[tuple[str, Site], ...], summary: Summary
) -> dict[str, Any]:
    def scalar(probes: dict[str, Any]) -> Array:
        return total(run(fn, planted(params, held, probes, lambda _: summary), *args))

    return jax.grad(scalar)({path: zeros(site, summary) for path, site in held})


# --- planting, which calibration shares ------------------------------------------------------


def arrays_only(params: Any, fn: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """The arrays of a tree that holds other things too (an Equinox module), and fn of them."""
    arrays, rest = eqx.partition(params, lambda leaf: hasattr(leaf, "dtype"))
    if not jax.tree.leaves(rest):
        return params, fn  # the very function, so that a step compiled for it serves again
    return arrays, lambda p, *args: fn(eqx.combine(p, rest), *args)


def holders(found: dict[str, Site], shared: bool = True) -> dict[str, str]:
    """Path of a contracted weight -> path of the weight that observes its input for it.

    With `shared` that is the first that multiplies this very input, else itself.
    """
    holder: dict[str, str] = {}
    first: dict[Any, str] = {}
    for path, site in found.items():
        if site.contracted:
            key = (site.input, len(site.batch)) if shared else path
            holder[path] = first.setdefault(key, path)
    return holder


def zeros(site: Site, summary: Summary) -> Any:
    """The probe of a weight, with nothing in it."""
    size = lambda axes: math.prod(site.shape[a] for a in axes)
    batch = tuple(site.shape[a] for a in site.batch)
    one = summary.zeros(size(site.contracted), size(site.output))
    return jax.tree.map(lambda a: jnp.zeros((*batch, *a.shape)), one)


def planted(
    params: Any,
    held: Iterable[tuple[str, Site]],
    probes: Mapping[str, Any],
    summary: Callable[[str], Summary],
) -> Any:
    """params with `Observed` stand-ins, with these probes, at the paths of `held`."""
    leaves = dict(path_leaves(params))
    new = {}
    for path, site in held:
        keep = [a for a in range(len(site.shape)) if a not in site.batch]
        order = (*site.batch, *keep)
        inverse = tuple(order.index(a) - len(order) for a in range(len(order)))
        new[path] = Observed(
            array=jnp.transpose(leaves[path], order),
            probe=probes[path],
            order=inverse,
            core=len(keep),
            contracted=tuple(order.index(a) - len(order) for a in site.contracted),
            summary=summary(path),
            sizes=tuple(site.shape[a] for a in keep),
            covered=site.covered,
        )
    return replace_leaves(params, new)


def total(outputs: Any) -> Array:
    """A scalar whose gradient reaches all that the floating outputs depend on."""
    floating = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum((jnp.sum(y, dtype=jnp.float32) for y in floating), jnp.float32(0))
