"""Observation of matmul inputs: one backward pass collects a summary for every weight."""

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

from jaxquant.calibration import routed  # noqa: F401  its rule is registered by the import
from jaxquant.calibration.observed import Observed, Seen, Summary
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.sites import Site, sites
from jaxquant.core.standin import is_array, is_standin, run


class Observation(NamedTuple):
    """What one pass observed of one input.

    Attributes:
      weights: paths of the weights that are multiplied with this very input.
      products: number of matmuls with a matrix that the summary is the sum of: usually 1; 0 if no
        gradient reached the output; more if a function multiplies by one weight several times.
      summary: the summary asked for, with leading axes over the layers (and experts) of a stack.
    """

    weights: tuple[str, ...]
    products: Float[Array, "*batch"]
    summary: Any


def observe(
    fn: Callable[..., PyTree], params: PyTree, *args: Any, summary: Summary
) -> dict[str, Observation]:
    """Summarize every input that `fn(params, *args)` multiplies by weights, in one backward pass.

    Args:
      fn: a function from Flax, Equinox or plain JAX. Products that no gradient of its outputs
        reaches are not observed.
      params: parameter tree of floating-point arrays; decode packed weights with
        `jaxquant.dequantize`.
      args: other arguments of fn: arrays, or trees of them.
      summary: frozen dataclass with methods `zeros(k, n)` and `of(seen)`, which return pytrees of
        float32 arrays with the same structure and shapes. Summaries travel as cotangents, so an
        index must be a float too (exact up to 2^24).

    Returns:
      An `Observation` by path, in the order of use. Weights that share an input have one entry,
      under the path of the one that comes first in the tree.

    Raises:
      ValueError: weights are packed, or nothing is contracted.

    Warns:
      UserWarning: names weights whose outputs no gradient reached.

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
            f"observe needs floating weights, but {', '.join(packed[:3])} "
            f"({len(packed)} in all) are packed: pass jaxquant.dequantize(params)"
        )
    params, fn = arrays_only(params, fn)
    found = sites(fn, params, *args)
    holder = holders(found)
    if not holder:
        raise ValueError(
            "expected a function that multiplies by arrays of params, but it multiplies by none"
        )
    order = sorted(dict.fromkeys(holder.values()), key=lambda path: found[path].turn)
    held = tuple((path, found[path]) for path in order)
    sums = _pass(params, args, fn, held, _Counted(summary))
    weights = {path: tuple(w for w, h in holder.items() if h == path) for path, _ in held}
    missed = [weights[path][0] for path, (count, _) in sums.items() if not bool(jnp.all(count))]
    if missed:
        warnings.warn(
            f"no gradient reached the output of {', '.join(missed)}, so the inputs of "
            "these weights were not observed",
            stacklevel=2,
        )
    return {path: Observation(weights[path], *sums[path]) for path, _ in held}


@dataclasses.dataclass(frozen=True)
class _Counted:
    """A summary together with the number of matmuls it is the sum of."""

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


# --- placing probes; also used by `calibrate` ------------------------------------------------


def arrays_only(params: PyTree, fn: Callable[..., PyTree]) -> tuple[PyTree, Callable[..., PyTree]]:
    """Separate arrays from the other leaves of a tree, such as an Equinox module.

    Args:
      params: parameter tree.
      fn: a function of it.

    Returns:
      The tree of arrays, and the function of that tree.
    """
    arrays, rest = eqx.partition(params, lambda leaf: is_array(leaf))
    if not jax.tree.leaves(rest):
        return params, fn  # the same object, so that its compiled step is reused
    return arrays, lambda p, *args: fn(eqx.combine(p, rest), *args)


def holders(found: dict[str, Site], shared: bool = True) -> dict[str, str]:
    """Choose which weight observes the input of each contracted weight.

    Args:
      found: the sites by path.
      shared: if True, the first weight with the same input observes it; if False, every weight
        observes its own.

    Returns:
      Path of a weight -> path of the weight that observes its input.
    """
    holder: dict[str, str] = {}
    first: dict[Any, str] = {}
    for path, site in found.items():
        if site.contracted:
            key = (site.input, len(site.batch)) if shared else path
            holder[path] = first.setdefault(key, path)
    return holder


def zeros(site: Site, summary: Summary) -> PyTree:
    """Return an empty probe for a weight.

    Args:
      site: how the weight is used.
      summary: the summary that the probe holds.
    """
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
    """Replace weights by `Observed` stand-ins.

    Args:
      params: parameter tree.
      held: paths and sites of the weights to replace.
      probes: their probes, by path.
      summary: returns the summary for a path.
    """
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
    """Return a scalar whose gradient reaches everything the floating-point outputs depend on."""
    floating = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum((jnp.sum(y, dtype=jnp.float32) for y in floating), jnp.float32(0))
