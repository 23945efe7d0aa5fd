"""The methods that each weight can get, their sizes, and the choice among them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import PyTree

from jaxquant.core.greedy_allocation import cheapest
from jaxquant.core.paths import matches, path_leaves
from jaxquant.core.sites import Site, is_weight
from jaxquant.methods.method import KEEP, Method
from jaxquant.recipes.recipe import Recipe, WeightEntry, resolve

APART = 0.9  # methods of one name are measured at least so many bits apart
ROUNDING = 1e-15  # relative error, at most, of bytes that are computed from an average of bits


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

    def nearest(self, bits: float) -> list[WeightEntry]:
        """Return for each weight the entry with the average bits nearest to a number.

        Args:
          bits: average bits per weight.
        Returns:
          One entry per weight, in the order of `weights`.
        """
        far = lambda e: abs(8 * e.bytes / e.size - bits)
        return [min(entries, key=far) for entries in self.weights]

    def measured(self) -> list[WeightEntry]:
        """Return the entries whose loss has to be measured; the others are interpolated."""
        return [e for entries in self.weights for group in _anchors(entries) for e in group]

    def allocated(
        self,
        bits: float,
        loss: Callable[[WeightEntry], float],
        distance: Callable[[WeightEntry], float] | None = None,
        progress: Callable[[Option], None] | None = None,
    ) -> Allocation:
        """Choose the entries that minimize the expected loss, given what has been measured.

        Args:
          bits: largest average number of bits per weight.
          loss: returns the loss of an entry of `measured` or `nearest`, on its own matrices.
          distance: returns the distance of the model with one weight quantized by its entry of
            `nearest`, by which its losses are rescaled; None: no rescaling.
          progress: called with every `Option`.
        Returns:
          The `Allocation`: one option per weight, of `bits` on average at most. Its
            `bits_per_weight`, passed as `bits`, can be reached again.
        Raises:
          ValueError: `bits` is out of reach.
        """
        self.check(bits)
        groups = []
        for entries, nearest in zip(self.weights, self.nearest(bits), strict=True):
            unit = 1.0
            if distance is not None:  # which may be noise around 0
                unit = max(distance(nearest), 1e-6) / max(loss(nearest), 1e-30)
            group = [
                Option(e.path, e.method, e.bytes, e.size, unit * of_e)
                for e, of_e in zip(entries, _interpolated(entries, loss), strict=True)
            ]
            if progress is not None:
                for option in group:
                    progress(option)
            groups.append(group)
        of = lambda name: [[getattr(o, name) for o in group] for group in groups]
        # An average that comes from whole bytes gives them back in spite of rounding.
        budget = math.floor(bits * self.size / 8 * (1 + ROUNDING))
        found = cheapest(of("bytes"), of("loss"), budget)
        chosen = tuple(group[i] for group, i in zip(groups, found, strict=True))
        recipe = Recipe([*((o.path, o.method) for o in chosen), ("*", KEEP)])
        used = 8 * sum(o.bytes for o in chosen) / self.size
        return Allocation(recipe, chosen, used, self.lowest, self.highest)


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


def _anchors(entries: Sequence[WeightEntry]) -> list[list[WeightEntry]]:
    """Return the entries of one weight to measure, by the name of the method and in order."""
    found = []
    for name in {e.method.name: None for e in entries}:
        mine = sorted((e for e in entries if e.method.name == name), key=lambda e: e.bytes)
        anchors = mine[:1]
        for e in mine[1:]:
            if 8 * (e.bytes - anchors[-1].bytes) / e.size > APART or e is mine[-1]:
                anchors.append(e)
        found.append(anchors)
    return found


def _interpolated(
    entries: Sequence[WeightEntry], loss: Callable[[WeightEntry], float]
) -> list[float]:
    """Return the losses of one weight by these methods; log loss is interpolated over bytes."""
    known = {}
    for anchors in _anchors(entries):
        logs = [math.log(max(loss(e), 1e-30)) for e in anchors]
        known[anchors[0].method.name] = [e.bytes for e in anchors], logs
    return [math.exp(np.interp(e.bytes, *known[e.method.name])) for e in entries]
