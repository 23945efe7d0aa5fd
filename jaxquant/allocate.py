"""Allocation: which method for which weight, so that an average number of bits tells most."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant.calibrate import Stats
from jaxquant.methods import KEEP, Method
from jaxquant.opened import added_bytes
from jaxquant.paths import matches, path_leaves
from jaxquant.quantize import quantize, quantize_array
from jaxquant.recipe import Entry, Recipe, resolve


@dataclasses.dataclass(frozen=True)
class Option:
    """One weight by one method.

    Attributes:
      bytes, size: of the result, and its number of weights.
      loss: what it is expected to add; comparable between weights.
    """

    path: str
    method: Method
    bytes: int
    size: int
    loss: float

    def __str__(self) -> str:
        bits = 8 * self.bytes / self.size
        return f"{self.path:32} {self.method.name:14} {bits:6.3f} bits  loss {self.loss:.6f}"


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The options chosen. Printing it shows them.

    Attributes:
      recipe: what to give to `quantize`.
      chosen: an option for every weight.
      bits_per_weight: over these weights. lowest, highest: what the methods can reach.
    """

    recipe: Recipe
    chosen: tuple[Option, ...]
    bits_per_weight: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        span = f"{self.lowest:.3f} to {self.highest:.3f}"
        total = f"{self.bits_per_weight:.3f} bits per weight (within reach: {span})"
        return "\n".join([*map(str, self.chosen), total])


def allocate(
    params: Any,
    methods: Sequence[Method],
    bits: float,
    stats: Stats,
    *,
    paths: Sequence[str] = ("*",),
    measure: Callable[[Any], float] | None = None,
    samples: int = 1,
    healed: bool = False,
    key: Array | None = None,
    progress: Callable[[Option], None] | None = None,
    finished: MutableMapping[str, Mapping[str, Any]] | None = None,
) -> Allocation:
    """A method for every weight, the expected loss least among those of at most `bits` on average.

    A weight's loss by a method is measured on matrices of its own: tr(E^T H E) / n, which says how
    much the model's loss rises where H is weighted by loss gradients. A quadratic model misjudges
    what few bits do, so with `measure` a weight's losses are put to scale by the model itself: all
    of it is quantized, and nothing else, by the method nearest to `bits`, and measured.

    A stack of layers is one weight here, its matrices share a method.

    Args:
      methods: to choose from.
      bits: per weight, everything counted, of all the weights that `paths` name together.
      paths: globs; what they do not match is kept. A bare "*" means every weight contracted.
      measure: of a tree, how far it is from `params`: KL on some held-out text, say.
      samples: matrices of a stack to measure on.
      healed: the result is going to `heal`; count the bytes that this adds.
      key: as in `quantize`.
      progress: called with every option measured.
      finished: losses by name; as in `quantize`.
    Raises:
      ValueError: `bits` is out of reach; methods that do not fit a weight; what `quantize` raises.

    >>> import jax
    >>> from jaxquant import calibrate, rtn
    >>> w = jax.random.normal(jax.random.key(0), (2, 64, 64))
    >>> params = {"loud": w[0] * 9, "soft": w[1]}
    >>> fn = lambda p, x: x @ p["loud"] @ p["soft"]
    >>> stats = calibrate(fn, params, [jnp.eye(64)], loss=lambda y, x: jnp.sum(y**2))
    >>> best = allocate(params, [rtn(bits=b, group_size=64) for b in (2, 3, 4)], 3.3, stats)
    >>> sorted(o.method.format.bits for o in best.chosen), round(best.highest, 3)
    ([3, 3], 4.312)
    """
    table = _Table(params, methods, stats, key, samples, finished if finished is not None else {})
    plans = [resolve(_only(m, params, paths, stats), params, stats.sites).entries for m in methods]
    if healed:
        plans = [[_with_added(e) for e in entries] for entries in plans]
    weights = [per for per in zip(*plans, strict=True) if isinstance(per[0].method, Method)]
    size = sum(per[0].size for per in weights)
    budget = bits * size / 8
    ends = [8 * sum(end(e.bytes for e in per) for per in weights) / size for end in (min, max)]
    if not ends[0] <= bits <= ends[1]:
        raise ValueError(
            f"{bits:g} bits per weight cannot be reached: with these methods it is "
            f"{ends[0]:.3f} to {ends[1]:.3f}"
        )
    groups = []
    for per in weights:
        nearest = min(per, key=lambda e: abs(8 * e.bytes / e.size - bits))
        unit = table.unit(nearest, measure)
        group = [Option(e.path, _method(e), e.bytes, e.size, unit * table.loss(e)) for e in per]
        for option in group if progress is not None else ():
            progress(option)
        groups.append(group)
    chosen = tuple(_cheapest(groups, budget))
    recipe = Recipe([*((o.path, o.method) for o in chosen), ("*", KEEP)])
    used = 8 * sum(o.bytes for o in chosen) / size
    return Allocation(recipe, chosen, used, *ends)


def _only(method: Method, params: Any, paths: Sequence[str], stats: Stats) -> Recipe | Method:
    """The method for these paths, the others kept."""
    if tuple(paths) == ("*",):
        return method
    found = {p for p, _ in path_leaves(params)}
    for glob in paths:
        if not any(matches(p, glob) for p in found):
            raise ValueError(f"{glob!r} matches no leaf")
    return Recipe([*((glob, method) for glob in paths), ("*", KEEP)])


def _with_added(entry: Entry) -> Entry:
    """The entry with the bytes of a healed weight."""
    if not isinstance(entry.method, Method):
        return entry
    *batch, k, n = entry.matrix
    added = math.prod(batch) * added_bytes(entry.method, k, n)
    return dataclasses.replace(entry, bytes=entry.bytes + added)


def _method(entry: Entry) -> Method:
    assert isinstance(entry.method, Method)
    return entry.method


@dataclasses.dataclass(frozen=True)
class _Table:
    """Losses, each measured once; in `finished` across runs."""

    params: Any
    methods: Sequence[Method]
    stats: Stats
    key: Array | None
    samples: int
    finished: MutableMapping[str, Mapping[str, Any]]

    def loss(self, entry: Entry) -> float:
        """Mean over the sampled matrices, times the number of matrices."""
        name = f"allocation: {entry.path} by {entry.method}"
        if name not in self.finished:
            self.finished[name] = {"loss": np.float64(self._loss(entry, _method(entry)))}
        return float(self.finished[name]["loss"])

    def _loss(self, entry: Entry, method: Method) -> float:
        matrices = entry.matrices(dict(path_leaves(self.params))[entry.path])
        count, k, n = matrices.shape
        gram = self.stats.gram(entry.path).reshape(count, k, k)
        output = self.stats.output_gram(entry.path) if method.needs_output else None
        losses = []
        for i in np.unique(np.linspace(0, count - 1, self.samples + 2).round().astype(int)[1:-1]):
            other = None if output is None else output.reshape(count, n, n)[i]
            w = matrices[i]
            q = quantize_array(w, method, gram[i], output_gram=other, key=self.key)
            error = w - q.dequantize()
            losses.append(float(jnp.sum(error * (gram[i] @ error))) / n)
        return float(np.mean(losses)) * count

    def unit(self, entry: Entry, measure: Callable[[Any], float] | None) -> float:
        """What the weight's losses are to be multiplied by."""
        if measure is None:
            return 1.0
        name = f"allocation: {entry.path} measured by {entry.method}"
        if name not in self.finished:
            recipe = Recipe([(entry.path, _method(entry)), ("*", KEEP)])
            tree = quantize(self.params, recipe, self.stats, key=self.key)
            self.finished[name] = {"loss": np.float64(measure(tree))}
        return float(self.finished[name]["loss"]) / max(self.loss(entry), 1e-30)


def _cheapest(groups: Sequence[Sequence[Option]], budget: float) -> Iterable[Option]:
    """An option of every group, of least loss within the budget: the best return first.

    Only options on the lower convex hull of loss over bytes are taken, each group's in order, so
    that the result is the best there is for the bytes it takes.
    """
    hulls = [_hull(group) for group in groups]
    place = [0] * len(hulls)
    left = budget - sum(hull[0].bytes for hull in hulls)
    steps = [
        ((hull[j].loss - hull[j + 1].loss) / (hull[j + 1].bytes - hull[j].bytes), -i, -j)
        for i, hull in enumerate(hulls)
        for j in range(len(hull) - 1)
    ]
    for _, i, j in sorted(steps, reverse=True):
        i, j = -i, -j
        cost = hulls[i][j + 1].bytes - hulls[i][j].bytes
        if place[i] == j and cost <= left:
            place[i], left = j + 1, left - cost
    return [hull[j] for hull, j in zip(hulls, place, strict=True)]


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, from fewest bytes on; loss falls along it."""
    hull: list[Option] = []
    for o in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if hull and o.loss >= hull[-1].loss:
            continue
        slope = lambda a, b: (a.loss - b.loss) / (b.bytes - a.bytes)
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], o):
            hull.pop()
        hull.append(o)
    return hull
