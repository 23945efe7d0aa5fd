"""Input transforms shared by several weights, fitted once to all weights that read an input.

A transform with candidates is searched for: each candidate is applied to all of these weights,
which are rounded to nearest, and the cheapest one is kept. The cost is the error of the weights'
products with a sample of inputs rounded as the method prescribes. If inputs stay in
floating point, the second moment replaces the sample; a user's own inspection function replaces
both.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.calibration.few_tokens import Pools
from jaxquant.calibration.statistics import Probe, Stats
from jaxquant.core.activations import Activations
from jaxquant.core.magnitude import exponent, ratios, shifted, unit
from jaxquant.core.protocols import Transform
from jaxquant.core.sites import Site
from jaxquant.methods.method import Method
from jaxquant.recipes.recipe import WeightEntry
from jaxquant.transforms import Channels

# Function (matrices [k, n] by path, index) -> loss if these matrices replace those at `index` in
# their leaves, or None to fall back on the default cost.
Inspection = Callable[[dict[str, Array], int], Array | float | None]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The weights that share an input and its transform, and the arrays of these transforms.

    Attributes:
      leader: for every path, the first path whose weight reads the same input through the same
        transform.
      members: for every leader, the entries of all weights that share its input.
      leaves: the weights, by path.
      stats: statistics of the inputs, or None.
      inspect: scoring function for searches, or None.
      found: arrays fitted so far, by leader and index in the stack.
      first: index of the leaves' first matrices along the leading axis of their stacks.
      pools: what completes the statistics of experts with few tokens, by path of their holder.
    """

    leader: dict[str, str]
    members: dict[str, list[WeightEntry]]
    leaves: Mapping[str, Array]
    stats: Stats | None
    inspect: Inspection | None
    found: dict[tuple[str, int], dict[str, Array]] = dataclasses.field(default_factory=dict)
    first: int = 0
    pools: dict[str, Pools | None] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(
        todo: list[WeightEntry],
        sites: Mapping[str, Site] | None,
        leaves: Mapping[str, Array],
        stats: Stats | None,
        inspect: Inspection | None = None,
        known: Mapping[tuple[str, int], dict[str, Array]] | None = None,
        first: int = 0,
    ) -> "Inputs":
        """Group the weights to quantize by the input that they read.

        Args:
          todo: entries of all weights to quantize.
          sites: how each weight is used, by path; with None no weights share an input.
          leaves, stats, inspect, first: see the class.
          known: arrays that are already fitted, the initial value of `found`.
        Returns:
          The groups.
        Raises:
          ValueError: `known` names a path that is not the leader of an input.
        """
        earliest: dict[Any, str] = {}
        leader: dict[str, str] = {}
        members: dict[str, list[WeightEntry]] = {}
        for entry in todo:
            path, method = entry.path, entry.method
            site = (sites or {}).get(path)
            key: Any = path
            if site is not None and site.input and not (method.input and method.input.fitted):
                form = method.activations if _static(method) else None
                key = (site.input, entry.matrix[:-1], method.input, form)
            leader[path] = earliest.setdefault(key, path)
            members.setdefault(leader[path], []).append(entry)
        if wrong := {path for path, _ in known or {}} - set(members):
            raise ValueError(
                f"the transforms of {', '.join(sorted(wrong))} belong to no input here: "
                "pass those learned for this tree and recipe"
            )
        return Inputs(leader, members, leaves, stats, inspect, dict(known or {}), first)

    def common(self, path: str) -> bool:
        """Return whether the weights that read an input share arrays made from its statistics."""
        first = self.members[self.leader[path]][0].method
        return (first.input is not None and first.input.joint) or _static(first)

    def arrays(self, path: str, i: int, key: Array) -> dict[str, Array] | None:
        """Return the shared arrays of matrix i of a weight, fitting them on the first call.

        Args:
          path: path of the weight.
          i: index of the matrix in its leaf.
          key: PRNG key of the transform.
        Returns:
          Arrays of the transform, named "input.*", and of activations, named "activations.*"; None
          if the weights share nothing.
        """
        if not self.common(path):
            return None
        leader = self.leader[path]
        place = (leader, i + passed(self.members[leader][0], self.first))
        if place not in self.found:
            self.found[place] = self._fitted(leader, i, key)
        return self.found[place]

    def _fitted(self, leader: str, i: int, key: Array) -> dict[str, Array]:
        members = self.members[leader]
        side, form = members[0].method.input, members[0].method.activations
        channels, of_weights, of_inputs = _unit(self._channels(members, i))
        arrays: dict[str, Array] = {}
        if side is not None and side.searched:
            arrays = self._searched(members, channels, of_weights, i, key)
        elif side is not None:
            arrays = _fit(side, channels, key)
        out = {f"input.{name}": a for name, a in arrays.items()}
        if form is not None and form.static:
            known = _static_scale(form, channels, side, arrays)
            known["scale"] = shifted(known["scale"], of_inputs)
            out |= {f"activations.{name}": a for name, a in known.items()}
        return out

    def _channels(self, members: list[WeightEntry], i: int) -> Channels:
        """Return the weights that read the input, concatenated, and the statistics of the input."""
        matrix = lambda m: m.matrices(self.leaves[m.path])[i].astype(jnp.float32)
        weights = jnp.concatenate([matrix(m).T for m in members])
        path = members[0].path
        if self.stats is None:
            return Channels(weights)
        probe = _of_matrix(self.stats.of(path), i)
        if (pools := self._pools(self.stats, path)) is not None:
            probe = pools.completed(probe, i)
        count = jnp.maximum(probe.rows, 1)
        sample = None
        if probe.extreme is not None and probe.typical is not None:
            sample = jnp.concatenate([probe.extreme, probe.typical])
        gram = None if probe.gram is None else probe.gram / count
        return Channels(weights, gram, probe.magnitude / count, probe.low, probe.high, sample)

    def _pools(self, stats: Stats, path: str) -> Pools | None:
        """Return what completes the statistics of a weight, made once; None without experts."""
        holder = stats.holder[path]
        if holder not in self.pools:
            self.pools[holder] = Pools.from_sums(stats.of(path), stats.sites[path])
        return self.pools[holder]

    def _searched(
        self, members: list[WeightEntry], channels: Channels, e: Array, i: int, key: Array
    ) -> dict[str, Array]:
        """Return the arrays of the cheapest candidate of the transform; the first one of equals.

        The weights are 2**e times those of `channels`.
        """
        method, side = members[0].method, _side(members[0].method)
        ends = np.cumsum([m.matrix[-1] for m in members])[:-1]
        best: dict[str, Array] = {}
        least: Any = None
        for arrays in side.candidates(channels, key):
            rounded = _tried(arrays, channels, method)
            cost = None
            if self.inspect is not None:
                parts = jnp.split(shifted(rounded, e), ends, axis=1)
                named = {m.path: w for m, w in zip(members, parts, strict=True)}
                cost = self.inspect(named, i + passed(members[0], self.first))
            if cost is None:
                cost = _cost(arrays, channels, rounded, method)
            if least is None:
                best, least = arrays, cost
                continue
            better = cost < least  # may be traced, hence jnp.where
            best = jax.tree.map(lambda a, b, better=better: jnp.where(better, a, b), arrays, best)
            least = jnp.where(better, cost, least)
        return best


def passed(entry: WeightEntry, first: int) -> int:
    """Return how many matrices of a weight's stack come before its leaf, which begins at `first`.

    Args:
      entry: the plan's entry for the leaf.
      first: index of the leaf's first matrix along the leading axis of the stack.
    """
    return first * math.prod(entry.matrix[1:-2]) if len(entry.matrix) > 2 else 0


@jax.jit
def _unit(channels: Channels) -> tuple[Channels, Array, Array]:
    """Return the channels scaled by powers of two; exponents of the weights and the vectors."""
    weights, of_weights = unit(channels.weights)
    known = (channels.low, channels.high, channels.sample)
    largest = [jnp.max(jnp.abs(a), initial=0) for a in known if a is not None]
    of_vectors = exponent(jnp.stack([jnp.float32(0), *largest]))
    low, high, sample = (None if a is None else shifted(a, -of_vectors) for a in known)
    gram, magnitude = ratios(channels.gram), ratios(channels.magnitude)
    return Channels(weights, gram, magnitude, low, high, sample), of_weights, of_vectors


def _side(method: Method) -> Transform:
    """Return the input transform of a method; ValueError if it has none."""
    if method.input is None:
        raise ValueError(
            f"method {method.name!r} has no input transform, so there is nothing to search for"
        )
    return method.input


def _static(method: Method) -> bool:
    return method.activations is not None and method.activations.static


def _static_scale(
    form: Activations, channels: Channels, side: Transform | None, arrays: dict[str, Array]
) -> dict[str, Array]:
    """Return the scale and zero point for the transformed inputs seen in calibration."""
    after = channels if side is None else channels.through(side, arrays)
    if after.low is None or after.high is None:
        raise ValueError(
            f"a static scale after {side} is computed from rows of the input: "
            "calibrate with sample=256"
        )
    ends = -jnp.max(after.low)[None], jnp.max(after.high)[None]
    if not form.mse:
        return dict(zip(("scale", "zero"), form.range(*ends), strict=True))
    x = channels.rows
    x = x[len(x) // 2 :]  # the rows kept at random
    return _least_error(form, x if side is None else side.apply(x, arrays), *ends)


@partial(jax.jit, static_argnums=0)
def _least_error(form: Activations, x: Array, low: Array, high: Array) -> dict[str, Array]:
    """Return scale and zero point of the clipped range with the least squared error."""

    def tried(part: Array) -> tuple[Array, dict[str, Array]]:
        known = dict(zip(("scale", "zero"), form.range(part * low, part * high), strict=True))
        return jnp.sum((form.rounded(x, known) - x) ** 2), known

    errors, every = jax.lax.map(tried, jnp.geomspace(1, 0.01, 60))
    return jax.tree.map(lambda a: a[jnp.argmin(errors)], every)


@partial(jax.jit, static_argnums=0)
def _fit(side: Transform, channels: Channels, key: Array) -> dict[str, Array]:
    return side.fit(channels, key)


def _of_matrix(probe: Probe, i: int) -> Probe:
    """Return the statistics of matrix i of a stack."""

    def one(name: str, a: Array | None) -> Array | None:
        rank = {"rows": 0, "magnitude": 1, "low": 1, "high": 1}.get(name, 2)
        return None if a is None else jnp.asarray(a).reshape(-1, *a.shape[a.ndim - rank :])[i]

    kept: Any = {name: one(name, a) for name, a in probe._asdict().items()}
    return Probe(**kept)


@partial(jax.jit, static_argnames="method")
def _tried(arrays: dict[str, Array], channels: Channels, method: Method) -> Float[Array, "k n"]:
    """Return the weights after rounding in the transformed basis and transforming back."""
    k, side = channels.weights.shape[1], _side(method)
    w = side.inverse(channels.weights, arrays).T
    rounded = method.format.dequantize(method.format.encode(w), w.shape[0])
    return side.transposed(rounded.T, arrays, k).T


@partial(jax.jit, static_argnames="method")
def _cost(
    arrays: dict[str, Array], channels: Channels, rounded: Float[Array, "k n"], method: Method
) -> Float[Array, ""]:
    """Return the squared error of the matmuls with these weights, with inputs rounded as well."""
    w, form = channels.weights.T, method.activations
    if form is None:
        error = rounded - w
        gram = jnp.eye(len(w)) if channels.gram is None else channels.gram
        return jnp.sum(error * (gram @ error))
    side, x = _side(method), channels.rows
    x = x[len(x) // 2 :]  # the rows kept at random
    k = x.shape[1]
    met = side.inverse(rounded.T, arrays).T
    known = _static_scale(form, channels, side, arrays) if form.static else {}
    return jnp.sum((form.rounded(side.apply(x, arrays), known) @ met - x[:, :k] @ w) ** 2)
