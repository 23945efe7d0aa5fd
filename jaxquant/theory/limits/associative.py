"""Random facts in the weights of a linear threshold, recalled after the weights are rounded.

A perceptron learns m random labels of patterns in {-1, 1}^N exactly, for m < 2 N. Rounded to b bits
a weight, with a float32 scale, at most C = N b + 32 bits are left of the facts. Therefore, whatever
the rounding:

    P(all m labels are recalled) <= 2^(C - m)      (there are 2^C states and 2^m labelings)
    mean share of wrong labels >= fact_error_floor(C, m)

How many errors a rounding makes above that floor depends on the margin that the learner left.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float
from scipy.stats import binom

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.fact_floor import fact_error_floor
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.limits.random_numbers import generator
from jaxquant.theory.number_checks import finite

SCALE_BITS = 32
EPOCHS = 2000
WIDTHS = (8, 6, 5, 4, 3, 2, 1)
LOSSLESS = 0.995  # share that 8 bits are expected to recall
IMPOSSIBLE = 1e-9  # probability below which an event is taken to refute a bound

Rounding = Callable[[Float[np.ndarray, "n"]], Float[Array | np.ndarray, "n"]]


@dataclasses.dataclass(frozen=True)
class Memory:
    """A perceptron that has learned its facts.

    Attributes:
      patterns: [facts, weights], each -1 or 1.
      labels: [facts], each -1 or 1.
      weights: [weights].
    """

    patterns: Float[np.ndarray, "k n"]
    labels: Float[np.ndarray, "k"]
    weights: Float[np.ndarray, "n"]

    def recall(self, weights: Float[Array | np.ndarray, "n"]) -> float:
        """Return the share of facts that weights recall; a sum of 0 recalls none.

        Args:
          weights: [weights], finite.
        Raises:
          ValueError: the shape is another, or a weight is not finite.
        """
        w = finite(weights, "rounded weights")
        if w.shape != self.weights.shape:
            raise ValueError(f"expected {self.weights.size} weights, got shape {list(w.shape)}")
        return float(np.mean(self.labels * (self.patterns @ w) > 0))


@dataclasses.dataclass(frozen=True)
class Recall:
    """What several memories recall after one rounding.

    Attributes:
      name: name of the rounding.
      bits: stated bits per weight.
      recalls: recalled share of each memory.
      floor: least mean share of errors at these bits.
      all_recalled: largest probability that all facts are recalled.
    """

    name: str
    bits: float
    recalls: tuple[float, ...]
    floor: float
    all_recalled: float

    @property
    def error(self) -> float:
        """Mean share of errors."""
        return 1 - sum(self.recalls) / len(self.recalls)

    @property
    def perfect(self) -> int:
        """Number of memories that recall every fact."""
        return sum(share == 1 for share in self.recalls)

    @property
    def possible(self) -> bool:
        """Whether as many memories as did may recall every fact at the stated bits."""
        return bool(binom.sf(self.perfect - 1, len(self.recalls), self.all_recalled) > IMPOSSIBLE)


@dataclasses.dataclass(frozen=True)
class Recalls:
    """What several memories recall after each of several roundings.

    Attributes:
      facts: number of facts of a memory.
      weights: number of weights of a memory.
      roundings: one entry for each rounding, in the order given.
    """

    facts: int
    weights: int
    roundings: tuple[Recall, ...]

    def limits(self) -> tuple[Limit, ...]:
        """Return the rows of a suite: both theorems, monotone recall, recall at 8 bits."""
        return (self._floor(), self._counting(), *self._monotone(), *self._eight())

    def _floor(self) -> Limit:
        tight = min(self.roundings, key=lambda one: (one.floor == 0, one.error - one.floor))
        holds = tight.error >= tight.floor if tight.floor > 0 else None
        statement = (
            f"A perceptron that has learned {self.facts} random facts gets at least this share of "
            f"them wrong when its {self.weights} weights are rounded ({tight.name}), whatever the "
            "rounding."
        )
        note = ", ".join(f"{r.name} {1 - r.error:.3f}" for r in self.roundings)
        return Limit(
            "memory: errors",
            statement,
            "theorem",
            tight.error,
            tight.floor,
            holds,
            note=f"Recall: {note}.",
        )

    def _counting(self) -> Limit:
        worst = min(self.roundings, key=lambda one: (one.possible, one.all_recalled))
        share = worst.perfect / len(worst.recalls)
        holds = worst.possible if worst.all_recalled < 1 else None
        statement = (
            f"Rounded weights ({worst.name}) have too few states to recall all of {self.facts} "
            "random facts with more than this probability."
        )
        name = "memory: all recalled"
        return Limit(name, statement, "theorem", share, worst.all_recalled, holds)

    def _monotone(self) -> tuple[Limit, ...]:
        """More bits recall no less, from 2 to 8, within 3 standard errors of paired differences."""
        some = sorted((one for one in self.roundings if 2 <= one.bits <= 8), key=lambda r: r.bits)
        gains = [np.subtract(b.recalls, a.recalls) for a, b in itertools.pairwise(some)]
        if not gains or gains[0].size < 2:
            return ()
        slack = [g.mean() + 3 * g.std(ddof=1) / math.sqrt(g.size) for g in gains]
        worst = int(np.argmin(slack))
        statement = (
            "Weights of more bits recall no smaller share of the facts; measured is the gain from "
            f"{some[worst].name} to {some[worst + 1].name}."
        )
        gain, holds = float(gains[worst].mean()), bool(min(slack) >= -1e-12)
        return (Limit("memory: monotone", statement, "expectation", gain, 0.0, holds),)

    def _eight(self) -> tuple[Limit, ...]:
        found = [one for one in self.roundings if one.bits == 8]
        statement = (
            "At 8 bits a weight a perceptron recalls at least this share of the facts that it has "
            "learned."
        )
        return tuple(
            Limit(
                f"memory: {one.name}",
                statement,
                "expectation",
                1 - one.error,
                LOSSLESS,
                1 - one.error >= LOSSLESS,
            )
            for one in found
        )


def learned(facts: int, weights: int, key: Array, epochs: int = EPOCHS) -> Memory:
    """Return a perceptron that recalls random labels of random patterns.

    Args:
      facts: number m of facts, 1 or more; below 2 `weights`, where labels are almost surely
        separable.
      weights: number N of weights, 1 or more.
      key: of patterns and labels.
      epochs: most passes over the facts.
    Returns:
      The memory, whose recall is 1.
    Raises:
      ValueError: a number is below 1, or the perceptron has not converged.
    Source:
      Rosenblatt 1958. Ridge regression does not recall all facts at this load.

    >>> import jax
    >>> memory = learned(30, 20, jax.random.key(0))
    >>> memory.recall(memory.weights)
    1.0
    """
    check_arguments(learned, locals())
    if min(facts, weights, epochs) < 1:
        raise ValueError(
            f"facts, weights and epochs must be 1 or more, got {facts}, {weights} and {epochs}"
        )
    random = generator(key)
    x = random.choice((-1.0, 1.0), (int(facts), int(weights)))
    y = random.choice((-1.0, 1.0), int(facts))
    w, signed = np.zeros(int(weights)), y[:, None] * x
    for _ in range(epochs):
        before = w.copy()
        for row in signed:
            if row @ w <= 0:
                w += row
        if (w == before).all() and (signed @ w > 0).all():
            return Memory(x, y, w)
    raise ValueError(
        f"the perceptron did not learn {facts} facts with {weights} weights in {epochs} epochs: "
        "ask for fewer facts (below 1.6 per weight), or another key"
    )


def rounded(weights: Float[Array | np.ndarray, "n"], bits: int) -> Float[np.ndarray, "n"]:
    """Round weights to the 2^bits levels (j + 1/2) step, at the step of least squared error.

    The levels are symmetric, so that one bit keeps the signs.

    Args:
      weights: [n], finite.
      bits: 1 to 16.
    Returns:
      The rounded weights [n].
    Raises:
      ValueError: the array is empty or not finite, or `bits` is out of range.

    >>> rounded(np.array([-3.0, -1.0, 1.0, 3.0]), 2).tolist()
    [-3.0, -1.0, 1.0, 3.0]
    """
    check_arguments(rounded, locals())
    w = finite(weights, "weights")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    half = 1 << (int(bits) - 1)
    largest = np.abs(w).max()
    if largest == 0:
        return w
    best, least = w, math.inf
    for step in largest / (half - 0.5) * np.linspace(1.0, 0.1, 91):
        found = (np.clip(np.floor(w / step), -half, half - 1) + 0.5) * step
        error = float(np.sum((found - w) ** 2))
        if error < least:
            best, least = found, error
    return best


def recalls(
    memories: Sequence[Memory], roundings: Mapping[str, tuple[float, Rounding]] | None = None
) -> Recalls:
    """Round the weights of memories in several ways, and measure what they still recall.

    Args:
      memories: one or more of one size, from different keys.
      roundings: by name, the stated bits per weight, all side information but one 32-bit scale
        included, and the function that rounds the weights [weights]. Default: `rounded` to 8, 6, 5,
        4, 3, 2 and 1 bits.
    Returns:
      The recalled shares beside the bounds at the stated bits.
    Raises:
      ValueError: there are no memories or no roundings, memories differ in size, bits are not
        positive, or rounded weights are not finite or of another shape.

    >>> import jax
    >>> memories = [learned(60, 40, jax.random.key(0))]
    >>> recalls(memories, {"float32": (32, lambda w: w)}).roundings[0].recalls
    (1.0,)
    """
    check_arguments(recalls, locals())
    shapes = sorted({one.patterns.shape for one in memories})
    if len(shapes) != 1:
        raise ValueError(f"expected one or more memories of one size, got sizes {shapes}")
    named = _default() if roundings is None else roundings
    if not named or not all(0 < bits < math.inf for bits, _ in named.values()):
        raise ValueError("expected one or more roundings, each of a positive number of bits")
    facts, weights = shapes[0]
    rows = []
    for name, (bits, apply) in named.items():
        total = weights * float(bits) + SCALE_BITS
        shares = tuple(one.recall(apply(one.weights)) for one in memories)
        floor = fact_error_floor(total, facts)
        rows.append(Recall(name, float(bits), shares, floor, 2.0 ** min(0.0, total - facts)))
    return Recalls(facts, weights, tuple(rows))


def _default() -> dict[str, tuple[float, Rounding]]:
    text = lambda b: f"{b} bit{'s' * (b > 1)}"
    return {text(b): (float(b), lambda w, b=b: rounded(w, b)) for b in WIDTHS}
