"""`Observed`: a weight whose product says, by way of a cotangent, what its input was like.

`dot(x, w, probe)` has a backward rule whose cotangent for the probe is a summary of x and of the
gradient at the output, whatever summary is asked for. So one `jax.grad` collects every layer, those
inside `lax.scan` included; where a function multiplies by one weight several times, they add up.
`observe` is one such pass; calibration merges many.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float

from jaxquant.contraction import Contraction
from jaxquant.paths import path_leaves, replace_leaves
from jaxquant.sites import Site, sites
from jaxquant.standin import StandIn, is_standin, run


class Seen(NamedTuple):
    """What one product with one matrix saw.

    Attributes:
      rows: its input.
      energy: |g|^2 of every row, g the gradient at the output.
      output: g.
    """

    rows: Float[Array, "m k"]
    energy: Float[Array, " m"]
    output: Float[Array, "m n"]


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
        array, probe = jax.tree.map(fn, (self.array, self.probe))
        return dataclasses.replace(self, array=array, probe=probe)

    def leading(self) -> int:
        return self.array.ndim - self.core


@quax.register(jax.lax.dot_general_p)
def _(x: Any, w: Observed, **params: Any) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=False)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: Observed, x: Any, **params: Any) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=True)


def _observe(x: Array, w: Observed, params: dict[str, Any], *, weight_left: bool) -> Array:
    """The plain dot, with the rule that fills the probe in the backward pass."""
    axes, leading = w.axes(), w.leading()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=weight_left)
    inner = {a for a in c.contracted(axes) if a >= leading}

    def dot(x: Array, dense: Array) -> Array:
        operands = (dense, x) if weight_left else (x, dense)
        return jax.lax.dot_general_p.bind(*operands, **params)

    def summary(x: Array, g: Array) -> Any:
        rows, paired = c.rows(x, axes, leading, inner)
        missing = [i for i, has in enumerate(paired) if not has]
        rows = jnp.expand_dims(rows, missing).astype(jnp.float32)
        of: Callable[[Seen], Any] = w.summary.of
        sizes = w.stored_shape()[:leading]
        seen = Seen(rows, c.energy(g, axes, leading), c.output_rows(g, axes, leading))
        for size in reversed(sizes):
            of = _mapped(of, size)
        found = of(seen)
        return jax.tree.map(lambda a, like: a.astype(like.dtype), found, w.probe)

    ndim = len(w.stored_shape())
    if {a - ndim for a in inner} != set(w.contracted):  # the other way round: not this one's
        return dot(x, w.materialise())
    return _observed_dot(dot, summary, x, w.materialise(), w.probe)


def _mapped(of: Callable[[Seen], Any], size: int) -> Callable[[Seen], Any]:
    """`of` along a leading axis, which is 1 for what is the same all along it."""

    def mapped(seen: Seen) -> Any:
        axes: Any = Seen(*(0 if len(a) == size else None for a in seen))  # type: ignore[arg-type]
        one = Seen(*(a if axis == 0 else a[0] for a, axis in zip(seen, axes, strict=True)))
        return jax.vmap(of, in_axes=(axes,), axis_size=size)(one)

    return mapped


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed_dot(dot: Callable, summary: Callable, x: Array, w: Array, probe: Any) -> Array:
    return dot(x, w)


def _forward(dot: Callable, summary: Callable, x: Array, w: Array, probe: Any) -> Any:
    return dot(x, w), (x, w)


def _backward(dot: Callable, summary: Callable, residuals: Any, g: Array) -> Any:
    x, w = residuals
    _, pull = jax.vjp(dot, x, w)
    return *pull(g), summary(x, g)


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
        )
    return replace_leaves(params, new)


def total(outputs: Any) -> Array:
    """A scalar whose gradient reaches all that the floating outputs depend on."""
    floating = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum((jnp.sum(y, dtype=jnp.float32) for y in floating), jnp.float32(0))
