"""Allocation: which method for which weight, so that an average number of bits tells most."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import matches, path_leaves
from jaxquant.core.sites import Site, is_weight
from jaxquant.durable.store import Finished
from jaxquant.methods.method import KEEP, Method
from jaxquant.ptq.quantize import quantize, quantize_array
from jaxquant.recipes.recipe import Recipe, WeightEntry, resolve

APART = 0.9  # bits between two methods of one name that are measured


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
    params: PyTree,
    methods: Sequence[Method],
    bits: float,
    stats: Stats,
    *,
    paths: Sequence[str] = ("*",),
    measure: Callable[[PyTree], float] | None = None,
    samples: int = 1,
    healed: bool = False,
    key: Array | None = None,
    progress: Callable[[Option], None] | None = None,
    finished: Finished | None = None,
) -> Allocation:
    """A method for every weight, the expected loss least among those of at most `bits` on average.

    A weight's loss by a method is measured on matrices of its own: tr(E^T H E) / n, which says how
    much the model's loss rises where H is weighted by loss gradients. A quadratic model misjudges
    what few bits do, so with `measure` a weight's losses are put to scale by the model itself: all
    of it is quantized, and nothing else, by the method nearest to `bits`, and measured.

    A stack of layers is one weight here, its matrices share a method. Of methods of one name whose
    rates lie less than a bit apart, some are measured, and the others interpolated.

    Args:
      methods: to choose from; of each weight, those that fit it.
      bits: per weight, everything counted, of all the weights that `paths` name together.
      paths: globs; what they do not match is kept. A bare "*" means every weight contracted.
      measure: of a tree, how far it is from `params`: KL on some held-out text, say.
      samples: matrices of a stack to measure on.
      healed: the result is going to `heal`; count the bytes that this adds.
      key: as in `quantize`.
      progress: called with every option measured.
      finished: losses by name; as in `quantize`.
    Raises:
      ValueError: `bits` is out of reach; no method fits a weight; what `quantize` raises.

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
    check_arguments(allocate, locals())
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    choices = Choices.of(params, methods, stats.sites, paths=paths, healed=healed)
    choices.check(bits)
    table = _Table(params, stats, key, samples, finished if finished is not None else {})
    groups = []
    for entries in choices.weights:
        nearest = min(entries, key=lambda e: abs(8 * e.bytes / e.size - bits))
        unit, losses = table.unit(nearest, measure), table.losses(entries)
        group = [
            Option(e.path, e.method, e.bytes, e.size, unit * loss)
            for e, loss in zip(entries, losses, strict=True)
        ]
        if progress is not None:
            for option in group:
                progress(option)
        groups.append(group)
    chosen = tuple(_cheapest(groups, bits * choices.size / 8))
    recipe = Recipe([*((o.path, o.method) for o in chosen), ("*", KEEP)])
    used = 8 * sum(o.bytes for o in chosen) / choices.size
    return Allocation(recipe, chosen, used, choices.lowest, choices.highest)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What methods come to for every weight, known from shapes alone.

    Attributes:
      weights: of each, an entry for every method that fits it.
    """

    weights: tuple[tuple[WeightEntry, ...], ...]

    @staticmethod
    def of(
        params: PyTree,
        methods: Sequence[Method],
        found: Mapping[str, Site],
        *,
        paths: Sequence[str] = ("*",),
        healed: bool = False,
    ) -> "Choices":
        """For a tree of arrays (or shapes) and its sites; arguments as those of `allocate`."""
        leaves = path_leaves(params)
        for glob in paths:
            if not any(matches(path, glob) for path, _ in leaves):
                raise ValueError(f"{glob!r} matches no leaf")
        if tuple(paths) == ("*",):
            named = [p for p, w in leaves if is_weight(w) and found[p].contracted]
        else:
            named = [p for p, _ in leaves if any(matches(p, glob) for glob in paths)]
        if not named or not methods:
            raise ValueError("nothing to share out: expected a weight and a method, or more")
        fitting = lambda path: _fitting(path, methods, params, found, healed)
        return Choices(tuple(fitting(path) for path in named))

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(entries[0].size for entries in self.weights)

    @property
    def lowest(self) -> float:
        """Bits per weight by the smallest methods."""
        return 8 * sum(min(e.bytes for e in entries) for entries in self.weights) / self.size

    @property
    def highest(self) -> float:
        """Bits per weight by the largest."""
        return 8 * sum(max(e.bytes for e in entries) for entries in self.weights) / self.size

    def check(self, bits: float) -> None:
        """Raise ValueError if an average is out of reach."""
        if not self.lowest <= bits <= self.highest:
            raise ValueError(
                f"{bits:g} bits per weight cannot be reached: with these methods it is "
                f"{self.lowest:.3f} to {self.highest:.3f}"
            )


def _fitting(
    path: str, methods: Sequence[Method], params: PyTree, found: Mapping[str, Site], healed: bool
) -> tuple[WeightEntry, ...]:
    """Entries of a weight by the methods that fit it; ValueError if none does."""
    entries, problem = [], ValueError("")
    for method in methods:
        try:
            plan = resolve(Recipe([(path, method), ("*", KEEP)]), params, found)
        except ValueError as error:
            problem = error
            continue
        entry = next(e for e in plan.weights if e.path == path)
        entries.append(_with_added(entry) if healed else entry)
    if not entries:
        raise problem
    return tuple(entries)


def _with_added(entry: WeightEntry) -> WeightEntry:
    """The entry with the bytes of a healed weight."""
    added = entry.count * entry.method.healing_bytes(*entry.matrix[-2:])
    return dataclasses.replace(entry, bytes=entry.bytes + added)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Losses, each measured once; in `finished` across runs."""

    params: PyTree
    stats: Stats
    key: Array | None
    samples: int
    finished: Finished

    def losses(self, entries: Sequence[WeightEntry]) -> list[float]:
        """Of a weight by these methods; log losses between two measured ones lie on a line."""
        out: dict[int, float] = {}
        for name in {e.method.name for e in entries}:
            mine = sorted((e for e in entries if e.method.name == name), key=lambda e: e.bytes)
            anchors = mine[:1]
            for e in mine[1:]:
                if 8 * (e.bytes - anchors[-1].bytes) / e.size > APART or e is mine[-1]:
                    anchors.append(e)
            at = [e.bytes for e in anchors]
            logs = [math.log(max(self.loss(e), 1e-30)) for e in anchors]
            out |= {id(e): math.exp(np.interp(e.bytes, at, logs)) for e in mine}
        return [out[id(e)] for e in entries]

    def loss(self, entry: WeightEntry) -> float:
        """Mean over the sampled matrices, times the number of matrices."""
        name = f"allocation: {entry.path} by {entry.method}"
        if name not in self.finished:
            self.finished[name] = {"loss": np.float64(self._loss(entry))}
        return float(self.finished[name]["loss"])

    def _loss(self, entry: WeightEntry) -> float:
        method = entry.method
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

    def unit(self, entry: WeightEntry, measure: Callable[[PyTree], float] | None) -> float:
        """What the weight's losses are to be multiplied by."""
        if measure is None:
            return 1.0
        name = f"allocation: {entry.path} measured by {entry.method}"
        if name not in self.finished:
            recipe = Recipe([(entry.path, entry.method), ("*", KEEP)])
            tree = quantize(self.params, recipe, self.stats, key=self.key)
            self.finished[name] = {"loss": np.float64(measure(tree))}
        # What is measured is a difference, and may be noise about 0.
        return max(float(self.finished[name]["loss"]), 1e-6) / max(self.loss(entry), 1e-30)


def _cheapest(groups: Sequence[Sequence[Option]], budget: float) -> Iterable[Option]:
    """An option of every group, of least loss within the budget: the best return first.

    Only options on the lower convex hull of loss over bytes are taken, each group's in order: until
    one does not fit, the best there is for the bytes taken. Smaller ones then fill what is left.
    """
    hulls = [_hull(group) for group in groups]
    place = [0] * len(hulls)
    left = budget - sum(hull[0].bytes for hull in hulls)
    steps = [
        ((hull[j].loss - hull[j + 1].loss) / (hull[j + 1].bytes - hull[j].bytes), i, j)
        for i, hull in enumerate(hulls)
        for j in range(len(hull) - 1)
    ]
    for _, i, j in sorted(steps, key=lambda step: -step[0]):
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
