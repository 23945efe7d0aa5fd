"""Folding: channel factors of an input move into whatever produces it and cost nothing at run time.

A norm's gain can absorb a factor per channel exactly. So can the columns of a matrix, if only an
elementwise product lies between that matrix and the input.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxquant.calibration.statistics import Probe, Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import matches, path_leaves, replace_leaves
from jaxquant.core.random_keys import Draw
from jaxquant.core.sites import Site
from jaxquant.durable.states import Remembered
from jaxquant.durable.store import Finished
from jaxquant.methods.method import Method
from jaxquant.ptq.shared_transforms import Inputs, Inspection, passed
from jaxquant.recipes.recipe import Recipe, WeightEntry, resolve
from jaxquant.transforms import Chain
from jaxquant.transforms.scaling import Factors

# Glob of weights -> paths of the leaves whose last axis produces the channels of their input.
# Paths that are not in the tree (an absent bias) are ignored.
Folds = Mapping[str, Sequence[str]]


class Folded(NamedTuple):
    """The same function with its factors folded, and what is left to quantize.

    Attributes:
      params: the tree with factors folded in.
      recipe: the recipe without the folded transforms, one rule per leaf.
      stats: the statistics of the new tree.
    """

    params: PyTree
    recipe: Recipe
    stats: Stats


def fold(
    params: PyTree,
    recipe: Recipe | Method,
    stats: Stats,
    folds: Folds,
    *,
    key: Array | None = None,
    inspect: Inspection | None = None,
    finished: Finished | None = None,
    first: int = 0,
) -> Folded:
    """Fit the channel factors that begin a recipe's transforms, and fold those that can be folded.

    Before rounding, the function of the tree is unchanged. Factors that cannot be folded stay in
    the recipe: those of inputs that `folds` does not name, or that weights outside the named ones
    read as well.

    Args:
      params, recipe, stats, key, inspect, first: as in `quantize`, to which the result is to be
        passed.
      folds: {glob of weights: leaves that produce their input}; see `Folds`.
      finished: store of fitted factors. Factors of other parameters, statistics, methods or keys
        are fitted again; `inspect` is not looked at. It may be the store passed to `quantize`.
    Returns:
      The folded tree, with its recipe and statistics.
    Raises:
      ValueError: the last axis of a leaf does not have as many channels as the input, or the recipe
        does not resolve.

    >>> import jaxquant as jq
    >>> fn = lambda p, x: (x * p["gain"]) @ p["w"]
    >>> p = {"gain": jnp.ones(2), "w": jnp.array([[1.0], [4.0]])}
    >>> stats = jq.calibrate(fn, p, [jnp.array([[16.0, 1.0]])])
    >>> folded = fold(p, jq.smoothquant(), stats, {"w": ["gain"]})
    >>> folded.params["gain"].tolist(), folded.params["w"].ravel().tolist()
    ([0.5, 4.0], [2.0, 1.0])
    >>> dict(folded.recipe.rules)["w"].input is None
    True
    """
    check_arguments(fold, locals())
    plan = resolve(recipe, params, stats.sites)
    left: dict[str, Any] = {e.path: e.method for e in plan.entries}
    leaves = dict(path_leaves(params))
    inputs = Inputs.of(plan.weights, stats.sites, leaves, stats, inspect, first=first)
    settings = f"{[(e.path, str(e.method)) for e in plan.weights]} {Draw.of(key).name}"
    fitted = Remembered(finished, settings, (params, stats.sums))
    new: dict[str, Array] = {}
    sums = dict(stats.sums)
    for leader, members in inputs.members.items():
        targets = _targets(leader, members, stats.sites, folds, leaves)
        if not targets:
            continue
        factors = _factors(inputs, leader, key, fitted)
        for name in targets:
            new[name] = _scaled(new.get(name, leaves[name]), factors, name)
        for entry in members:
            path = entry.path
            new[path] = _unscaled(new.get(path, leaves[path]), factors, entry)
            left[path] = dataclasses.replace(left[path], input=_rest(left[path].input))
        for path in {stats.holder[m.path] for m in members}:
            sums[path] = _seen(sums[path], factors)
        for name in set(targets) & set(stats.holder):
            sums[stats.holder[name]] = _pushed(sums[stats.holder[name]], factors)
    return Folded(
        replace_leaves(params, new),
        Recipe(tuple(left.items())),
        dataclasses.replace(stats, sums=sums),
    )


def unfolded(
    params: PyTree, recipe: Recipe | Method, sites: Mapping[str, Site], folds: Folds
) -> Recipe:
    """Return the recipe that `fold` leaves, without fitting or folding anything.

    Args:
      params: tree of arrays or shapes.
      recipe, folds: as in `fold`.
      sites: how the function uses each weight.
    Raises:
      ValueError: the recipe does not resolve.
    """
    plan, leaves = resolve(recipe, params, sites), dict(path_leaves(params))
    left: dict[str, Any] = {e.path: e.method for e in plan.entries}
    for leader, members in Inputs.of(plan.weights, sites, leaves, None).members.items():
        if _targets(leader, members, sites, folds, leaves):
            for entry in members:
                rest = _rest(entry.method.input)
                left[entry.path] = dataclasses.replace(entry.method, input=rest)
    return Recipe(tuple(left.items()))


def _targets(
    leader: str,
    members: list[WeightEntry],
    sites: Mapping[str, Site],
    folds: Folds,
    leaves: Mapping[str, Array],
) -> list[str]:
    """Return the leaves that absorb these weights' input factors; none if that is impossible."""
    if not isinstance(_first(members[0].method.input), Factors):
        return []
    paths = {m.path for m in members}
    site = sites[leader]
    readers = {p for p, s in sites.items() if s.input and s.input == site.input}
    if readers - paths or site.gathered is not None or site.otherwise:
        return []
    for glob, targets in folds.items():
        if all(matches(path, glob) for path in paths):
            return [name for name in targets if name in leaves]
    return []


def _first(side: Any) -> PyTree:
    return side.parts[0] if isinstance(side, Chain) else side


def _rest(side: Any) -> PyTree:
    """Return a transform without its first part, or None if nothing is left."""
    if not isinstance(side, Chain):
        return None
    return side.parts[1] if len(side.parts) == 2 else Chain(side.parts[1:])


def _factors(inputs: Inputs, leader: str, key: Array | None, fitted: Remembered) -> Array:
    """Return the factors of every matrix of the stack, float32 [*batch, k]."""
    entry = inputs.members[leader][0]
    *batch, k, _ = entry.matrix
    draw, found, before = Draw.of(key), [], passed(entry, inputs.first)
    prefix = "input.0." if isinstance(entry.method.input, Chain) else "input."
    for i in range(math.prod(batch)):

        def fit(i: int = i) -> dict[str, Array]:
            arrays = inputs.arrays(leader, i, draw.of_input(leader, i + before)) or {}
            return {"factors": arrays[f"{prefix}factors"].astype(jnp.float32)}

        kept = fitted.get(f"factors of {leader}[{i + before}]", fit)
        found.append(jnp.asarray(kept["factors"]))
    return jnp.stack(found).reshape(*batch, k)


def _scaled(leaf: Array, factors: Array, name: str) -> Array:
    """Return a leaf that produces the input, with its channels multiplied by the factors."""
    batch, k = factors.shape[:-1], factors.shape[-1]
    if leaf.shape[-1] != k or leaf.shape[: len(batch)] != batch:
        raise ValueError(
            f"{name} has shape {list(leaf.shape)}; to have factors folded into it, it "
            f"must be [{', '.join(map(str, batch))}{', ' if batch else ''}..., {k}]"
        )
    inner = (1,) * (leaf.ndim - factors.ndim)
    return (leaf * factors.reshape(*batch, *inner, k)).astype(leaf.dtype)


def _unscaled(w: Array, factors: Array, entry: WeightEntry) -> Array:
    """Return a weight that reads the input, with its rows divided by the factors."""
    order = entry.order
    turned = jnp.transpose(w, order)
    rows = turned.reshape(*entry.matrix) / factors[..., None]
    back = [order.index(axis) for axis in range(len(order))]
    return jnp.transpose(rows.reshape(turned.shape), back).astype(w.dtype)


def _seen(probe: Probe, factors: Array) -> Probe:
    """Return the statistics of the input after the factors."""
    each = factors[..., None, :]
    scaled = lambda a, by: None if a is None else a * by
    return probe._replace(
        gram=scaled(probe.gram, factors[..., :, None] * each),
        magnitude=probe.magnitude * factors,
        low=probe.low * factors,
        high=probe.high * factors,
        extreme=scaled(probe.extreme, each),
        typical=scaled(probe.typical, each),
    )


def _pushed(probe: Probe, factors: Array) -> Probe:
    """Return the statistics with the output-gradient moment of a leaf that absorbed the factors."""
    if probe.output is None:
        return probe
    return probe._replace(output=probe.output / factors[..., :, None] / factors[..., None, :])
