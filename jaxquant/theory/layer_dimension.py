"""Intrinsic dimension of hidden states, by layer of a model and in the course of training."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.core.arguments import check_arguments
from jaxquant.core.text_table import aligned
from jaxquant.theory.dimension import Dimension, levina_bickel, local_two_nn, two_nn
from jaxquant.theory.neighbors import Neighbors, distinct, neighbor_distances

Estimator = Callable[[Neighbors], Dimension]
ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {"TwoNN": two_nn, "MLE": partial(levina_bickel, k=64)}
)


@dataclasses.dataclass(frozen=True, eq=False)
class DimensionProfile:
    """Dimensions by layer; `str` gives a table.

    Attributes:
      estimators: names of the estimators.
      layers: for each layer the dimension by each estimator.
    """

    estimators: tuple[str, ...]
    layers: tuple[tuple[Dimension, ...], ...]

    def values(self, estimator: str) -> Float[np.ndarray, " L"]:
        """Return the dimension of every layer by one estimator.

        Args:
          estimator: its name.
        Returns:
          The dimensions, float64 [L].
        Raises:
          ValueError: no estimator has this name.
        """
        if estimator not in self.estimators:
            raise ValueError(
                f"estimator must be one of {', '.join(self.estimators)}, got {estimator!r}"
            )
        at = self.estimators.index(estimator)
        return np.array([layer[at].value for layer in self.layers])

    def __str__(self) -> str:
        rows = [("layer", *self.estimators, "points", "duplicates")]
        for i, layer in enumerate(self.layers):
            numbers = (f"{found.value:.2f}" for found in layer)
            rows.append((str(i), *numbers, str(layer[0].points), str(layer[0].duplicates)))
        return "\n".join(line.rstrip() for line in aligned(rows, left=(False,) * len(rows[0])))


def dimension_by_layer(
    hidden: Float[Array, "L ... d"] | Float[np.ndarray, "L ... d"],
    key: Array,
    *,
    estimators: Mapping[str, Estimator] = ESTIMATORS,
    k: int = 64,
    points: int = 3000,
    progress: Callable[[int], None] | None = None,
) -> DimensionProfile:
    """Estimate the intrinsic dimension of the hidden states after every layer.

    The vectors of all tokens are pooled, those that equal an earlier one are dropped, and some of
    the others are drawn at random: the same tokens in all layers whose tokens are all distinct.

    Args:
      hidden: hidden states after each layer [L, ..., d], finite: [L, t, d] for one text. Those of a
        Llama come from `jaxquant_models.architectures.hidden_states`.
      key: PRNG key of the random draw.
      estimators: functions of the `Neighbors` of the points, by name. Default: `two_nn`, named
        "TwoNN", and `levina_bickel` with k = 64, named "MLE".
      k: number of neighbors of each point that the estimators need. Default: 64.
      points: number of vectors to draw in each layer, more than k; fewer are taken if there are
        fewer. Default: 3000.
      progress: called with the number of layers that are done, after each layer. Default: not
        called.
    Returns:
      The dimensions by layer and estimator.
    Raises:
      ValueError: `hidden` has fewer than three axes, no estimator is given, or there are k
        distinct vectors or fewer in a layer, or some that are not finite.
    Source:
      Pooling, duplicates and sampling: Ruppik et al. 2025, arXiv:2506.01034.

    >>> h = jax.random.normal(jax.random.key(0), (2, 300, 2))
    >>> h = h @ jax.random.normal(jax.random.key(1), (2, 8))
    >>> found = dimension_by_layer(h, jax.random.key(2), k=20, estimators={"TwoNN": two_nn})
    >>> found.values("TwoNN").round().tolist()
    [2.0, 2.0]
    """
    check_arguments(dimension_by_layer, locals())
    if np.ndim(hidden) < 3 or not len(hidden):
        raise ValueError(f"expected hidden [L, ..., d], got shape {list(np.shape(hidden))}")
    if not estimators:
        raise ValueError("expected at least one estimator, got none")
    layers = []
    for number, layer in enumerate(hidden):
        try:
            drawn, duplicates = drawn_points(layer, points, key)
            found = dataclasses.replace(neighbor_distances(drawn, k), duplicates=duplicates)
        except ValueError as error:
            raise ValueError(f"layer {number} of {len(hidden)}: {error}") from None
        layers.append(tuple(estimate(found) for estimate in estimators.values()))
        if progress is not None:
            progress(len(layers))
    return DimensionProfile(tuple(estimators), tuple(layers))


def drawn_points(
    x: Float[Array, "... d"] | Float[np.ndarray, "... d"], count: int, key: Array
) -> tuple[Float[np.ndarray, "m d"], int]:
    """Return a random sample of the distinct vectors, and the number of vectors that repeat others.

    Args:
      x: vectors [..., d], finite.
      count: number of vectors to draw, 1 or more.
      key: PRNG key of the draw.
    Returns:
      At most `count` distinct vectors, float64, in their order in x, and the number of duplicates.
    Raises:
      ValueError: `count` is below 1, or the vectors are not finite.

    >>> sample, duplicates = drawn_points(np.ones((2, 3, 4)), 100, jax.random.key(0))
    >>> sample.shape, duplicates
    ((1, 4), 5)
    """
    check_arguments(drawn_points, locals())
    if count < 1:
        raise ValueError(f"the number of points to draw must be at least 1, got {count}")
    pooled = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    kept = distinct(pooled)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    if len(kept) > count:
        rows = np.sort(random.choice(len(kept), count, replace=False))
        return kept[rows], len(pooled) - len(kept)
    return kept, len(pooled) - len(kept)


class Update(Protocol):
    """What the training loops report after an update (`jaxquant.tuning.trainer.Progress`).

    Attributes:
      step: number of updates done.
      params: function that returns the tree after the update.
    """

    step: int
    params: Callable[[], PyTree] | None


@dataclasses.dataclass(eq=False)
class DimensionHistory:
    """The intrinsic dimension in the course of training: a callback of the training loops.

    Pass it as `progress` to `jaxquant.qat`, `jaxquant.training.finetune` or `jaxquant.heal`. Every
    `every` updates it draws hidden states of a fixed text under the current parameters, the same
    tokens each time, and keeps their dimension. A loop of one's own calls `measure`.

    A history is not stored with the training state: a run that resumes continues with an empty one.

    Attributes:
      states: function from a tree to hidden states [..., d] of a fixed text, held out or not; for
        a tree with packed or latent weights, apply `jaxquant.quantized`. Jit it.
      key: PRNG key of the draw.
      every: number of updates between two measurements, 1 or more. Default: 50.
      points: number of distinct vectors to draw. Default: 3000.
      neighborhood: number of neighbors of each point in which local TwoNN is computed. Default: 64.
      history: the measurements so far, (step, dimension); the value of a dimension is the mean over
        the tokens, `pointwise` their distribution.
    Raises:
      ValueError: `every` is below 1.
    Source:
      Ruppik et al. 2025, arXiv:2506.01034: states of the last layer, 3,000 points, 64 neighbors,
      for the runs in which training and generalization are compared. They report that the mean
      falls during useful training, and that a rise after this fall signals overfitting. Whether
      that holds depends on the setting: `tests/benchmarks/intrinsic_dimension.py`.

    >>> states = lambda params: params["scale"] * np.random.default_rng(0).uniform(size=(200, 2))
    >>> seen = DimensionHistory(states, jax.random.key(0), every=10)
    >>> round(seen.measure(0, {"scale": np.ones(2)}).value), seen.steps
    (2, [0])
    """

    states: Callable[[PyTree], Float[Array, "... d"]]
    key: Array
    every: int = 50
    points: int = 3000
    neighborhood: int = 64
    history: list[tuple[int, Dimension]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 4 <= self.neighborhood < self.points:
            raise ValueError(
                "neighborhood must be at least 4 and less than points, got "
                f"{self.neighborhood} and {self.points}"
            )

    def __call__(self, update: Update) -> None:
        """Measure the dimension if the number of updates is a multiple of `every`.

        Args:
          update: the report of a training loop.
        Raises:
          ValueError: the report holds no parameters.
        """
        if update.step % self.every:
            return
        if update.params is None:
            raise ValueError(
                "this training loop reports no parameters; qat, finetune and heal do, those that "
                "train block by block, codes or transforms do not: call `measure` after them"
            )
        self.measure(update.step, update.params())

    def measure(self, step: int, params: PyTree) -> Dimension:
        """Measure the dimension and append it to the history.

        Args:
          step: number of updates done.
          params: the tree, as `states` takes it.
        Returns:
          The dimension.
        """
        drawn, duplicates = drawn_points(self.states(params), self.points, self.key)
        found = local_two_nn(drawn, self.neighborhood)
        found = dataclasses.replace(found, duplicates=duplicates)
        self.history.append((step, found))
        return found

    @property
    def steps(self) -> list[int]:
        """The numbers of updates at which the dimension was measured."""
        return [step for step, _ in self.history]

    @property
    def values(self) -> list[float]:
        """The mean local dimension at each of these."""
        return [found.value for _, found in self.history]
