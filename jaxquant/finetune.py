"""Healing: after rounding, train what stayed continuous, against the model as it was."""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxquant.dispatch import quantized
from jaxquant.fields import check_fields, check_positive
from jaxquant.opened import Values, at_start, close_tree, open_tree, trained

NAME = "healing"  # of its state, among what is finished


@dataclasses.dataclass(frozen=True)
class Healing:
    """How to train: Adam with a warm-up of a tenth of the steps, then a cosine to zero.

    Attributes:
      steps: updates.
      learning_rate: at its highest; of relative changes.
      batch_size: sequences of one update.
      validate_every: updates between two looks at the held-out loss; the best state is kept.
      save_every: updates between two copies to go on from.
      seed: of the order of the sequences.
    """

    steps: int = 200
    learning_rate: float = 2e-3
    batch_size: int = 2
    validate_every: int = 50
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_positive(self, "learning_rate")

    def optimizer(self) -> optax.GradientTransformation:
        """Adam on the schedule."""
        warm = max(1, self.steps // 10)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warm, max(self.steps, warm + 1)
        )
        return optax.adam(rate)

    def batch(self, step: int, count: int) -> np.ndarray:
        """Indices of the sequences of an update: epochs in orders of their own, by the seed."""
        per = max(1, count // self.batch_size)
        epoch, place = divmod(step, per)
        order = np.random.default_rng((self.seed, epoch)).permutation(count)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


class _State(NamedTuple):
    """Training so far: enough to go on exactly as if it had not stopped."""

    step: int
    change: Values
    optimizer: Any
    best: Values
    best_loss: float

    def stored(self) -> dict[str, Array]:
        """As arrays by name."""
        return {str(i): a for i, a in enumerate(jax.tree.leaves(self))}

    def restored(self, arrays: Mapping[str, Any]) -> "_State":
        """The state stored, of this one's structure."""
        leaves = [jnp.asarray(arrays[str(i)]) for i in range(len(arrays))]
        state = jax.tree.unflatten(jax.tree.structure(self), leaves)
        return state._replace(step=int(state.step), best_loss=float(arrays[str(len(arrays) - 1)]))


class Progress(NamedTuple):
    """After an update: the training loss, and the held-out one where it was looked at."""

    step: int
    loss: float
    validation: float | None


def heal(
    fn: Callable[[Any, Array], Array],
    params: Any,
    teacher: Any,
    sequences: np.ndarray,
    healing: Healing = Healing(),
    *,
    validation: np.ndarray | None = None,
    also: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
    finished: MutableMapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """`params` trained so that fn(params, x) is what fn(teacher, x) is, in KL over the last axis.

    Trained are the scales, signs (as reals) and codebooks of quantized leaves, and the leaves
    that `also` names; codes stay. Signs become float16 vectors, and are counted.

    Args:
      fn: fn(params, x [batch, ...]) -> logits [..., vocabulary]; run under `quantized`.
      params: quantized tree. teacher: the tree it was made of.
      sequences: inputs [N, ...].
      validation: held-out inputs; the state with the least loss on them is what comes back.
        None: the last state does.
      also: globs of plain leaves to train ("*norm*").
      progress: called after every update.
      finished: where training so far is kept, every `save_every` updates, and gone on from; as in
        `quantize`.
    Raises:
      ValueError: fewer sequences than a batch, or nothing to train.
    Source:
      Tseng et al. 2024, arXiv:2402.04396, train the same on cross-entropy against the teacher's
      probabilities; here KL, and all at once.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (32, 32))
    >>> x = np.random.default_rng(0).normal(size=(8, 4, 32)).astype(np.float32)
    >>> fn = lambda p, x: x @ p["w"]
    >>> q = jq.quantize({"w": w}, jq.rtn(bits=2, group_size=16))
    >>> better = heal(fn, q, {"w": w}, x, Healing(steps=20, learning_rate=0.02))
    >>> far = lambda p: float(jnp.mean(_divergence(fn(p, x), x @ w)))
    >>> far({"w": better["w"].dequantize()}) < far({"w": q["w"].dequantize()})
    True
    """
    if len(sequences) < healing.batch_size:
        raise ValueError(
            f"expected at least batch_size = {healing.batch_size} sequences, got {len(sequences)}"
        )
    opened = open_tree(params, also)
    optimizer = healing.optimizer()
    measure = jax.jit(partial(_loss, fn))

    def held_out(change: Values) -> float:
        if validation is None:
            return float("inf")
        each = [measure(change, opened, teacher, jnp.asarray(v)[None]) for v in validation]
        return float(np.mean(each))

    zero = at_start(opened)
    state = _State(0, zero, optimizer.init(zero), zero, float("inf"))
    if finished is not None and NAME in finished:
        state = state.restored(finished[NAME])
    else:
        state = state._replace(best_loss=held_out(zero))
    update = jax.jit(partial(_update, fn, optimizer))
    while state.step < healing.steps:
        x = jnp.asarray(sequences[healing.batch(state.step, len(sequences))])
        change, slots, loss = update(state.change, state.optimizer, opened, teacher, x)
        state = state._replace(step=state.step + 1, change=change, optimizer=slots)
        seen = None
        last = state.step == healing.steps
        if validation is not None and (last or state.step % healing.validate_every == 0):
            seen = held_out(change)
            if seen < state.best_loss:
                state = state._replace(best=change, best_loss=seen)
        if finished is not None and (last or state.step % healing.save_every == 0):
            finished[NAME] = state.stored()
        if progress is not None:
            progress(Progress(state.step, float(loss), seen))
    return close_tree(params, opened, state.change if validation is None else state.best)


def _update(
    fn: Callable, optimizer: Any, change: Values, slots: Any, opened: Any, teacher: Any, x: Array
) -> tuple[Values, Any, Array]:
    loss, slope = jax.value_and_grad(partial(_loss, fn))(change, opened, teacher, x)
    step, slots = optimizer.update(slope, slots, change)
    return optax.apply_updates(change, step), slots, loss


def _loss(fn: Callable, change: Values, opened: Any, teacher: Any, x: Array) -> Array:
    student = quantized(fn)(trained(opened, change), x)
    return jnp.mean(_divergence(student, jax.lax.stop_gradient(fn(teacher, x))))


def _divergence(logits: Array, target: Array) -> Array:
    """KL(softmax(target) || softmax(logits)) over the last axis, nats."""
    log_p = jax.nn.log_softmax(target.astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
