"""Observing: one backward pass over a function whose weights say what their inputs were like."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.observed import Observed, Seen, Summary
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.sites import Site, sites
from jaxquant.core.standin import is_array, is_standin, run


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
    fn: Callable[..., PyTree], params: PyTree, *args: Any, summary: Summary
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

    def zeros(self, k: int, n: int) -> PyTree:
        return jnp.zeros(()), self.summary.zeros(k, n)

    def of(self, seen: Seen) -> PyTree:
        return jnp.ones(()), self.summary.of(seen)


@partial(jax.jit, static_argnames=("fn", "held", "summary"))
def _pass(
    params: PyTree, args: Any, fn: Callable, held: tuple[tuple[str, Site], ...], summary: Summary
) -> dict[str, Any]:
    def scalar(probes: dict[str, Any]) -> Array:
        return total(run(fn, planted(params, held, probes, lambda _: summary), *args))

    return jax.grad(scalar)({path: zeros(site, summary) for path, site in held})


# --- planting, which calibration shares ------------------------------------------------------


def arrays_only(params: PyTree, fn: Callable[..., PyTree]) -> tuple[PyTree, Callable[..., PyTree]]:
    """The arrays of a tree that holds other things too (an Equinox module), and fn of them."""
    arrays, rest = eqx.partition(params, lambda leaf: is_array(leaf))
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


def zeros(site: Site, summary: Summary) -> PyTree:
    """The probe of a weight, with nothing in it."""
    size = lambda axes: math.prod(site.shape[a] for a in axes)
    batch = tuple(site.shape[a] for a in site.batch)
    one = summary.zeros(size(site.contracted), size(site.output))
    return jax.tree.map(lambda a: jnp.zeros((*batch, *a.shape)), one)


def planted(
    params: PyTree,
    held: Iterable[tuple[str, Site]],
    probes: Mapping[str, Any],
    summary: Callable[[str], Summary],
) -> PyTree:
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
