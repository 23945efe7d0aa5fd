"""Training of adapters: settings, and a loop that is resumable and evaluates held-out data.

A loop of one's own needs only `jax.grad` of `jq.quantized(loss)` and Optax.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxquant.adapters.adam_8bit import adam8bit
from jaxquant.adapters.paging import paged
from jaxquant.adapters.signed_steps import LAST_SHARE, falling, sign_descent
from jaxquant.core.arguments import check_arguments
from jaxquant.core.dispatch import quantized
from jaxquant.durable.store import Finished
from jaxquant.estimators.weight_estimators import randomness
from jaxquant.training.latent import ADAPTER, OTHER, SCALE, trained
from jaxquant.training.optimizers import optimizer, relative
from jaxquant.training.qat import sequence_loss
from jaxquant.tuning.trainable import Opened, check_globs
from jaxquant.tuning.trainer import Healing, Loss, Progress, Rule, Trainer

LORA_A, LORA_B, MAGNITUDE, TERNARY = ADAPTER


@dataclasses.dataclass(frozen=True)
class Finetuning(Healing):
    """Settings for training adapters: warm-up over a tenth of the steps, then cosine decay to zero.

    Ternary arrays have no learning rate: they are trained by `jaxquant.adapters.sign_descent`. The
    fields `steps`, `batch_size`, `validate_every`, `save_every` and `seed` are those of
    `jaxquant.tuning.Healing`.

    Attributes:
      learning_rate: peak learning rate of the matrices A, and of the magnitudes of DoRA, where it
        is relative to each magnitude; positive. Default: 2e-4.
      b_ratio: factor by which the rate of the matrices B is larger, 0 or more. 1 (the default) is
        plain LoRA, 16 the value that LoRA+ (Hayou et al. 2024, arXiv:2402.12354) suggests, and 0
        freezes B.
      scale_rate: peak rate of scales, codebooks and offsets, 0 or more: relative to the magnitude
        of each number, for an offset to its scale. 0 freezes them. Default: 1e-3.
      ternary_share: fraction of the entries of each ternary matrix that move in the first step:
        0, which freezes them, or at least 1e-3 and below 1. It falls as in
        `jaxquant.adapters.falling`. Default: 0.05.
      also: globs of plain floating-point leaves to train as well ("*norm*"). Default: none.
      other_rate: peak learning rate of these leaves, 0 or more. Default: 1e-4.
      weight_decay: weight decay of A and B, 0 or more. Default: 0.
      clip: largest gradient norm of each kind of array that has a learning rate; 0 disables
        clipping. Default: 0.3.
      optimizer: "adamw" (the default), or "adam8bit", whose state takes 2 bytes per number instead
        of 8 in arrays of at least 4,096 numbers.
      paged: whether the state of the optimizer is kept in the memory of the host
        (`jaxquant.adapters.paged`) for arrays of at least 100,000 numbers; that of smaller arrays
        stays on the device. Default: False.
    Raises:
      ValueError: a field is out of its range.
    """

    learning_rate: float = 2e-4
    b_ratio: float = 1.0
    scale_rate: float = 1e-3
    ternary_share: float = 0.05
    also: tuple[str, ...] = ()
    other_rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 0.3
    optimizer: Literal["adamw", "adam8bit"] = "adamw"
    paged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "b_ratio",
            "scale_rate",
            "other_rate",
            "weight_decay",
            "clip",
            "ternary_share",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.ternary_share and not LAST_SHARE <= self.ternary_share < 1:
            raise ValueError(
                f"ternary_share must be 0, or at least {LAST_SHARE}, to which it falls, and below "
                f"1, got {self.ternary_share}"
            )

    @property
    def rates(self) -> dict[str, float]:
        """The peak rate, or the share, of every kind of array that is trained, by label."""
        every = {
            LORA_A: self.learning_rate,
            LORA_B: self.learning_rate * self.b_ratio,
            MAGNITUDE: self.learning_rate,
            SCALE: self.scale_rate,
            TERNARY: self.ternary_share,
            OTHER: self.other_rate if self.also else 0.0,
        }
        return {label: rate for label, rate in every.items() if rate}

    def trained(self, params: PyTree) -> PyTree:
        """Return which arrays of a tree are trained.

        Args:
          params: tree with adapters.
        Returns:
          A tree of booleans, like `params`.
        """
        return trained(params, *self.rates, also=self.also)

    def rule(self) -> Rule:
        """Return the rule for `Trainer`."""
        return AdapterDescent(self)

    def optimizer_of(self, train: PyTree) -> optax.GradientTransformation:
        """Return the optimizer of these settings.

        Args:
          train: tree of the trained arrays.
        Returns:
          The optimizer, with one rate per kind of array.
        """
        make = {"adamw": optax.adamw, "adam8bit": adam8bit}[self.optimizer]

        def of(label: str, rate: float) -> optax.GradientTransformation:
            if label == TERNARY:
                return sign_descent(falling(self.steps, rate))
            schedule = dataclasses.replace(self, learning_rate=rate).schedule()
            decay = self.weight_decay if label in (LORA_A, LORA_B) else 0.0
            step = make(schedule, weight_decay=decay)
            parts = [optax.clip_by_global_norm(self.clip)] if self.clip else []
            parts += [paged(step) if self.paged else step]
            return optax.chain(*parts, *([relative()] if label in (SCALE, MAGNITUDE) else []))

        each = {label: of(label, rate) for label, rate in self.rates.items()}
        return optimizer(train, also=("*",), **each)  # the leaves of `train` are those of `also`


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer that computes, and keeps its state, in float32 for bfloat16 parameters.

    It is for loops of one's own; `finetune` trains float32 copies of the parameters.

    Args:
      inner: any Optax optimizer.
    Returns:
      The optimizer. Its updates are float32; `optax.apply_updates` adds them in the dtype of the
      parameters.

    >>> p = {"w": jnp.ones(2, "bfloat16")}
    >>> in_float32(optax.adam(0.1)).init(p)[0].nu["w"].dtype.name
    'float32'
    """
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return inner.update(wide(updates), state, None if params is None else wide(params))

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)


class _Slots(NamedTuple):
    step: Array
    optimizer: optax.OptState


class AdapterDescent:
    """A training rule (`trainer.Rule`) that trains a tree's adapters with an Optax optimizer.

    Args:
      how: training settings.
    """

    def __init__(self, how: Finetuning) -> None:
        self.how = how

    def init(self, opened: Opened) -> tuple[PyTree, PyTree]:
        state = self.how.optimizer_of(opened.start).init(opened.start)
        return opened.start, _Slots(jnp.int32(0), state)

    def update(
        self, loss: Loss, change: PyTree, slots: _Slots, opened: Opened, *batch: PyTree
    ) -> tuple[PyTree, _Slots, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(self.how.seed), slots.step)

        def with_dropout(change: PyTree) -> Array:
            with randomness(key):
                return loss(change, opened, *batch)

        value, slope = jax.value_and_grad(with_dropout)(change)
        step, state = self.how.optimizer_of(change).update(slope, slots.optimizer, change)
        measured = {"loss": value, "gradient": optax.tree.norm(slope)}
        return optax.apply_updates(change, step), _Slots(slots.step + 1, state), measured


FINETUNING = Finetuning()


def finetune(
    fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    sequences: np.ndarray,
    how: Finetuning = FINETUNING,
    *,
    loss: Callable[[Array, Array], Array] | None = None,
    teacher: PyTree = None,
    validation: np.ndarray | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> PyTree:
    """Train the adapters of a tree end to end.

    Weights that are packed stay packed; `L4Q` keeps their floats until the merge.

    Args:
      fn: fn(params, x [batch, ...]) -> logits [..., vocabulary]; run under `quantized`.
      params: tree with adapters (`jaxquant.adapt`).
      sequences: training inputs [N, ...]. Without a teacher and a `loss` they are tokens, int
        [N, t], and the loss is the cross-entropy of the next token.
      how: settings.
      loss: loss(logits, x) -> scalar, in the place of the cross-entropy; for example one that
        counts completions only. Not allowed with a teacher.
      teacher: tree whose predictions are the target (the loss is the mean KL divergence from them).
        Default: none.
      validation: held-out inputs, like `sequences`. The state with the least loss on them is
        returned, which may be the initial one. Default: none; the last state is returned.
      progress: called with a `jaxquant.tuning.trainer.Progress` after every update.
      finished: mutable mapping that keeps the training state, such as
        `jaxquant.durable.store.Folder(path, run)`, written every `save_every` updates (a field of
        `how`). A run that was interrupted resumes from it. Default: none.
    Returns:
      The tree, with trained adapters; `jaxquant.merge` merges them.
    Raises:
      ValueError: there are fewer sequences than one batch needs, there is nothing to train, both a
        loss and a teacher are given, a glob of `also` matches no floating-point leaf, the store
        holds an unfinished run with other weights or settings, or a loss or a gradient is not
        finite.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (32, 32))
    >>> x = np.random.default_rng(0).normal(size=(8, 4, 32)).astype(np.float32)
    >>> q = jq.quantize({"w": w}, jq.rtn(bits=2, group_size=16))
    >>> p = jq.adapt(q, jq.adapters.LoRA(rank=8))
    >>> fn = lambda p, x: x @ p["w"]
    >>> how = Finetuning(steps=30, learning_rate=0.02)
    >>> better = finetune(fn, p, x, how, teacher={"w": w})
    >>> far = lambda p: float(jnp.mean((p["w"].dequantize() - w) ** 2))
    >>> far(better) < far(p)
    True
    """
    check_arguments(finetune, locals())
    if loss is not None and teacher is not None:
        raise ValueError("give either a loss or a teacher, whose predictions define the loss")
    whole = partial(sequence_loss, fn) if loss is None else partial(_own_loss, fn, loss)
    trainer = Trainer(whole, how, how.rule())
    opened = open_adapted(params, how)
    change = trainer.fit_sequences(
        opened, sequences, validation, teacher, name="finetuning", progress=progress,
        finished=finished, tree=lambda change: eqx.combine(change, opened.params),
    )  # fmt: skip
    cast = lambda a, like: a.astype(like.dtype)
    return jax.tree.map(cast, eqx.combine(change, opened.params), params)


def _own_loss(
    fn: Callable, loss: Callable, change: PyTree, opened: Opened, teacher: PyTree, x: Array
) -> Array:
    return loss(quantized(fn)(eqx.combine(change, opened.params), x), x)


def open_adapted(params: PyTree, how: Finetuning) -> Opened:
    """Split a tree into fixed arrays and trained arrays, the latter in float32.

    Args:
      params: tree with adapters.
      how: training settings, which say what is trained.
    Raises:
      ValueError: nothing is trained, or `also` matches no floating-point leaf.
    """
    check_globs(params, how.also)
    train, rest = eqx.partition(params, how.trained(params))
    if not jax.tree.leaves(train):
        rates = ", ".join(how.rates) or "none"
        raise ValueError(
            f"nothing to train: no array has one of the labels {rates}, whose rates are not 0; add "
            "adapters with jaxquant.adapt"
        )
    return Opened(rest, jax.tree.map(lambda a: a.astype(jnp.float32), train))
