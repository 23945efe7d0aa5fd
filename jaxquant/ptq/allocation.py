"""Bit allocation: choosing a method for each weight under an average number of bits."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import matches, path_leaves
from jaxquant.core.random_keys import Draw
from jaxquant.core.sites import Site, is_weight
from jaxquant.durable.states import Remembered
from jaxquant.durable.store import Finished
from jaxquant.methods.method import KEEP, Method
from jaxquant.ptq.quantize import quantize, quantize_array
from jaxquant.recipes.recipe import Recipe, WeightEntry, resolve

APART = 0.9  # methods of one name are measured at least so many bits apart


@dataclasses.dataclass(frozen=True)
class Option:
    """One weight quantized by one method.

    Attributes:
      path: path of the weight.
      method: the method.
      bytes, size: bytes of the result, and number of weights.
      loss: expected increase in loss, comparable between weights.
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
    """The chosen options; printing it lists them.

    Attributes:
      recipe: the recipe to pass to `quantize`.
      chosen: one option per weight.
      bits_per_weight: average over these weights.
      lowest, highest: smallest and largest average that the methods can reach.
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
    """Choose a method for every weight that minimizes the expected loss within a bit budget.

    The loss of a weight under a method is measured on its own matrices as tr(E^T H E) / n. If H is
    weighted by loss gradients, this estimates the increase of the model's loss. The quadratic model
    behind it is poor at few bits, so with `measure` the losses of each weight are rescaled by the
    model itself: the weight alone is quantized, by the method nearest to `bits`, and `measure` is
    applied to the resulting tree.

    A stack of layers counts as one weight: its matrices share a method. Among methods of one name
    whose rates lie less than a bit apart, some are measured and the others interpolated.

    Args:
      params: tree of floating-point arrays.
      methods: the methods to choose from; a weight considers those that fit its shape.
      bits: largest average number of bits per weight, over all weights that `paths` selects. All
        arrays count: codes, scales, transforms.
      stats: result of `calibrate` for this tree, with second moments.
      paths: globs of the weights to quantize; all other leaves are kept. The default ("*",) selects
        every weight that the function contracts.
      measure: function of a tree that returns its distance from `params`, for example the KL
        divergence on held-out text. Default: no rescaling.
      samples: number of matrices of each stack to measure on, 1 or more.
      healed: whether the result will be passed to `heal`; if so, the bytes that healing adds are
        counted.
      key: PRNG key, as in `quantize`.
      progress: called with every `Option`.
      finished: store of measured losses. What was measured with other parameters, statistics,
        samples or another key is measured again; `measure` is not looked at.
    Returns:
      The `Allocation`.
    Raises:
      ValueError: `bits` is out of reach, a glob matches nothing, no method fits a weight, or
        `quantize` raises.

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
    settings = f"{samples} samples, {Draw.of(key).name}"
    table = _Table(
        params, stats, key, samples, Remembered(finished, settings, (params, stats.sums))
    )
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
    """Sizes of every weight under every method that fits it, known from shapes alone.

    Attributes:
      weights: for each weight, one entry per method that fits it.
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
        """Build the choices for a tree of arrays (or shapes) and its sites.

        Args:
          params, methods, paths, healed: as in `allocate`.
          found: how each weight is used, as `sites` returns it.
        Returns:
          The choices.
        Raises:
          ValueError: a glob matches nothing, nothing is left to quantize, or no method fits a
            weight.
        """
        leaves = path_leaves(params)
        for glob in paths:
            if not any(matches(path, glob) for path, _ in leaves):
                raise ValueError(f"{glob!r} matches no leaf")
        if tuple(paths) == ("*",):
            named = [p for p, w in leaves if is_weight(w) and found[p].contracted]
        else:
            named = [p for p, _ in leaves if any(matches(p, glob) for glob in paths)]
        if not named or not methods:
            raise ValueError("nothing to allocate: expected at least one weight and one method")
        fitting = lambda path: _fitting(path, methods, params, found, healed)
        return Choices(tuple(fitting(path) for path in named))

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(entries[0].size for entries in self.weights)

    @property
    def lowest(self) -> float:
        """The average bits per weight if every weight takes its smallest method."""
        return 8 * sum(min(e.bytes for e in entries) for entries in self.weights) / self.size

    @property
    def highest(self) -> float:
        """The average bits per weight if every weight takes its largest method."""
        return 8 * sum(max(e.bytes for e in entries) for entries in self.weights) / self.size

    def check(self, bits: float) -> None:
        """Check that an average number of bits is within reach.

        Args:
          bits: average bits per weight.
        Raises:
          ValueError: it is not.
        """
        if not self.lowest <= bits <= self.highest:
            raise ValueError(
                f"{bits:g} bits per weight cannot be reached: these methods allow "
                f"{self.lowest:.3f} to {self.highest:.3f}"
            )


def _fitting(
    path: str, methods: Sequence[Method], params: PyTree, found: Mapping[str, Site], healed: bool
) -> tuple[WeightEntry, ...]:
    """Return the entries of a weight for the methods that fit it; ValueError if none does."""
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
    """Return the entry with the bytes that healing adds."""
    added = entry.count * entry.method.healing_bytes(*entry.matrix[-2:])
    return dataclasses.replace(entry, bytes=entry.bytes + added)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Losses, each measured once and kept across runs."""

    params: PyTree
    stats: Stats
    key: Array | None
    samples: int
    measured: Remembered

    def losses(self, entries: Sequence[WeightEntry]) -> list[float]:
        """Return the losses of one weight by these methods; log loss is interpolated over bytes."""
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
        """Return the mean loss over the sampled matrices, times the number of matrices."""
        name = f"allocation: {entry.path} by {entry.method}"
        found = self.measured.get(name, lambda: {"loss": np.float64(self._loss(entry))})
        return float(found["loss"])

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
        """Return the factor by which to multiply the weight's losses."""
        if measure is None:
            return 1.0
        name = f"allocation: {entry.path} measured by {entry.method}"

        def found() -> dict[str, np.float64]:
            recipe = Recipe([(entry.path, entry.method), ("*", KEEP)])
            tree = quantize(self.params, recipe, self.stats, key=self.key)
            return {"loss": np.float64(measure(tree))}

        # The measured difference may be noise around 0.
        loss = float(self.measured.get(name, found)["loss"])
        return max(loss, 1e-6) / max(self.loss(entry), 1e-30)


def _cheapest(groups: Sequence[Sequence[Option]], budget: float) -> Iterable[Option]:
    """Return one option per group with least loss within the budget in bytes, greedily by return.

    Only options on the lower convex hull of loss over bytes are considered, each group's in order.
    Until a step first does not fit, the choice is optimal for the bytes spent; smaller steps then
    fill what is left.
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
    """Return the options on the lower convex hull by increasing bytes and decreasing loss."""
    hull: list[Option] = []
    for o in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if hull and o.loss >= hull[-1].loss:
            continue
        slope = lambda a, b: (a.loss - b.loss) / (b.bytes - a.bytes)
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], o):
            hull.pop()
        hull.append(o)
    return hull
