"""Training of codes: gradients move latent weights, and the codes follow them.

Each weight has a latent float that starts at the value of its code. The loss and its gradient are
taken at the values of the codes (straight-through). The latent weights take Adam's step without
momentum, scaled to a length proportional to the matrix. The codes that lag farthest behind their
latent weights are then re-encoded, a small share at a time, so that the gradients still predict the
joint effect of the changes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.tensor import QTensor
from jaxquant.durable.store import Finished
from jaxquant.tuning.heal import distillation
from jaxquant.tuning.trainable import Opened, Values, as_dense
from jaxquant.tuning.trainer import Healing, Loss, Progress, Trainer

CODES = Healing(learning_rate=0.02)
DECAY = 0.95  # decay of the mean square of gradients
_TINY = 1e-12


class _Slots(NamedTuple):
    """State by path: latent weights and mean squared gradients; and the number of updates."""

    behind: dict[str, Array]
    square: dict[str, Array]
    steps: Array


@dataclasses.dataclass(frozen=True)
class Codes:
    """A training rule (`trainer.Rule`) that changes at most a `share` of each matrix's codes.

    Attributes:
      healing: number of steps and learning rate.
      share: largest share of the codes that an update changes; those that lag farthest behind.

    Source:
      The V-step of PV-tuning, Malinovskii et al. 2024, arXiv:2405.14852, with latent weights kept
      from step to step as in its code. This implementation differs from the paper: the codes that
      lag farthest behind are changed, not those that moved most.
    """

    healing: Healing
    share: float

    def init(self, opened: Opened) -> tuple[Values, PyTree]:
        """Return the codes of every weight whose format can re-encode, and the initial state.

        Args:
          opened: the opened tree.
        Returns:
          The codes, and the state with latent weights at the values of the codes.
        """
        found = {p: w for p, w in path_leaves(opened.params) if can_recode(w)}
        behind = {p: w.stored() for p, w in found.items()}
        slots = _Slots(behind, jax.tree.map(jnp.zeros_like, behind), jnp.int32(0))
        return {p: _codes(w) for p, w in found.items()}, slots

    def update(
        self, loss: Loss, change: Values, slots: _Slots, opened: Opened, *batch: PyTree
    ) -> tuple[Values, _Slots, dict[str, Array]]:
        weights = {p: w for p, w in path_leaves(with_codes(opened, change)) if p in change}

        def of(dense: dict[str, Array]) -> Array:
            new = {p: as_dense(weights[p], d) for p, d in dense.items()}
            return loss({}, Opened(replace_leaves(opened.params, new), {}), *batch)

        value, slope = jax.value_and_grad(of)({p: w.stored() for p, w in weights.items()})
        steps = slots.steps + 1
        square = jax.tree.map(lambda s, g: DECAY * s + (1 - DECAY) * g**2, slots.square, slope)
        rate = self.healing.schedule()(steps)

        def moved(behind: Array, s: Array, g: Array) -> Array:
            step = g / (jnp.sqrt(s / (1 - DECAY**steps)) + _TINY)
            size = lambda a: jnp.sqrt(jnp.mean(a**2, axis=(-2, -1), keepdims=True))
            return behind - rate * size(behind) / (size(step) + _TINY) * step

        behind = jax.tree.map(moved, slots.behind, square, slope)
        data = {p: self._recoded(w, behind[p]) for p, w in weights.items()}
        return data, _Slots(behind, square, steps), {"loss": value}

    def _recoded(self, w: QTensor, target: Array) -> dict[str, Array]:
        one = partial(w.format.recoded, share=self.share)
        for _ in range(w.leading()):
            one = jax.vmap(one)
        new = one(w.data, target)
        return {name: new[name] for name in _codes(w)}


def _codes(w: QTensor) -> dict[str, Array]:
    """Return the arrays that hold codes, which are those of the format that are not trained."""
    return {name: a for name, a in w.data.items() if name not in w.format.trained}


def can_recode(w: PyTree) -> bool:
    """Return whether a leaf is a weight whose format can re-encode.

    Args:
      w: leaf of a tree.
    Returns:
      True for such weights.
    """
    return isinstance(w, QTensor) and w.format.recodes


def with_codes(opened: Opened, change: Values) -> PyTree:
    """Return an opened tree with other codes.

    Args:
      opened: the opened tree.
      change: codes, by path and array name.
    Returns:
      The tree.
    """
    leaves = dict(path_leaves(opened.params))
    put = lambda w, codes: dataclasses.replace(w, data={**w.data, **codes})
    return replace_leaves(opened.params, {p: put(leaves[p], codes) for p, codes in change.items()})


def recode(
    fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    teacher: PyTree,
    sequences: np.ndarray,
    healing: Healing = CODES,
    *,
    share: float = 0.03,
    validation: np.ndarray | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> PyTree:
    """Train the codes of learned codebooks (`Additive`, `Vector`) against a teacher.

    It differs from `heal` in training the codes, and everything else stays fixed. Alternating the
    two gives PV-tuning. Memory is five float32 copies of these weights.

    Args:
      fn, params, teacher, sequences, validation, progress, finished: as in `heal`.
      healing: training settings; the learning rate is the length of a step relative to that of the
        matrix.
      share: largest share of the codes of a matrix that change in one update, in (0, 1]; one code
        may always change.
    Returns:
      The tree with trained codes.
    Raises:
      ValueError: as in `heal`; or no leaf has such codes, or `share` is not in (0, 1].
    Source:
      Malinovskii et al. 2024, arXiv:2405.14852; see `recoding` for where it differs.

    >>> import jaxquant as jq
    >>> from jaxquant.tuning.losses import divergence
    >>> w = jax.random.normal(jax.random.key(0), (32, 32))
    >>> x = np.random.default_rng(0).normal(size=(8, 4, 32)).astype(np.float32)
    >>> q = jq.quantize_array(w, jq.Method("vq", jq.rtn().rounder, jq.formats.Vector(2, 4, 0)))
    >>> better = recode(lambda p, x: x @ p["w"], {"w": q}, {"w": w}, x, Healing(20, 0.05))
    >>> far = lambda q: float(jnp.mean(divergence(x @ q.dequantize(), x @ w)))
    >>> far(better["w"]) < far(q)
    True
    """
    check_arguments(recode, locals())
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if not any(can_recode(w) for _, w in path_leaves(params)):
        raise ValueError("no codes to train: no leaf is packed in a learned codebook (aqlm, vptq)")
    opened = Opened(params, {})

    def loss(change: Values, opened: Opened, teacher: PyTree, x: Array) -> Array:
        return distillation(fn, {}, Opened(with_codes(opened, change), {}), teacher, x)

    trainer = Trainer(loss, healing, Codes(healing, share))
    change = trainer.fit_sequences(
        opened,
        sequences,
        validation,
        teacher,
        name="recoding",
        progress=progress,
        finished=finished,
    )
    return with_codes(opened, change)
