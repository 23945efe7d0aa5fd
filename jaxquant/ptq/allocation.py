"""Bit allocation: choosing a method for each weight under an average number of bits."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves
from jaxquant.core.random_keys import Draw
from jaxquant.durable.states import Remembered
from jaxquant.durable.store import Finished
from jaxquant.methods.method import KEEP, Method
from jaxquant.ptq.choices import Allocation, Choices, Option
from jaxquant.ptq.quantize import quantize, quantize_array
from jaxquant.ptq.round_stacked import Sums
from jaxquant.recipes.recipe import Recipe, WeightEntry
from jaxquant.rounding.moments import measured


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
    choices.check(bits)  # before anything is computed
    settings = f"{samples} samples, {Draw.of(key).name}"
    table = _Table(
        params, stats, key, samples, Remembered(finished, settings, (params, stats.sums))
    )
    distance = None if measure is None else partial(table.distance, measure)
    return choices.allocated(bits, table.loss, distance, progress)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Losses, each measured once and kept across runs."""

    params: PyTree
    stats: Stats
    key: Array | None
    samples: int
    measured: Remembered

    def loss(self, entry: WeightEntry) -> float:
        """Return the mean loss over the sampled matrices, times the number of matrices."""
        name = f"allocation: {entry.path} by {entry.method}"
        found = self.measured.get(name, lambda: {"loss": np.float64(self._loss(entry))})
        return float(found["loss"])

    def _loss(self, entry: WeightEntry) -> float:
        method = entry.method
        matrices = entry.matrices(dict(path_leaves(self.params))[entry.path])
        count, _, n = matrices.shape
        sums = Sums.measured(entry.path, self.stats, output=method.needs_output).matrices(entry)
        losses = []
        for i in sampled(count, self.samples):
            moments = sums.moments(i)
            gram = measured(moments.input)
            w = matrices[i]
            q = quantize_array(w, method, gram, output_gram=moments.output, key=self.key)
            error = w - q.dequantize()
            losses.append(float(jnp.sum(error * (gram @ error))) / n)
        return float(np.mean(losses)) * count

    def distance(self, measure: Callable[[PyTree], float], entry: WeightEntry) -> float:
        """Return the distance of the tree in which this weight alone is quantized."""
        name = f"allocation: {entry.path} measured by {entry.method}"

        def found() -> dict[str, np.float64]:
            recipe = Recipe([(entry.path, entry.method), ("*", KEEP)])
            tree = quantize(self.params, recipe, self.stats, key=self.key)
            return {"loss": np.float64(measure(tree))}

        return float(self.measured.get(name, found)["loss"])


def sampled(count: int, samples: int = 1) -> list[int]:
    """Return the indices of the matrices of a stack on which losses are measured.

    Args:
      count: number of matrices of the stack.
      samples: how many are wanted.

    >>> sampled(30), sampled(30, 3)
    ([14], [7, 14, 22])
    """
    between = np.linspace(0, count - 1, samples + 2).round().astype(int)[1:-1]
    return [int(i) for i in np.unique(between)]
