"""Training of latent weights, end to end or block by block: resumable, with held-out evaluation.

The training loop is the one of healing (`trainer`). A loop of one's own needs only `jax.grad` of
`jq.quantized(loss)` and Optax.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jaxquant.adapters.adapted import is_adapted
from jaxquant.core.arguments import check_arguments
from jaxquant.core.dispatch import quantized
from jaxquant.core.paths import common_stack_size, path_leaves, replace_leaves
from jaxquant.core.tensor import QTensor
from jaxquant.core.tree import dequantize
from jaxquant.durable.store import Finished
from jaxquant.estimators.kurtosis import flattened
from jaxquant.training import stability
from jaxquant.training.latent import OTHER, RANGE, SCALE, WEIGHT, freeze, trained
from jaxquant.training.optimizers import optimizer, relative
from jaxquant.training.zeroqat import ZeroQAT
from jaxquant.tuning.losses import divergence, next_token_loss, relative_error
from jaxquant.tuning.trainable import Opened, check_globs
from jaxquant.tuning.trainer import Healing, Loss, Progress, Rule, Trainer


@dataclasses.dataclass(frozen=True)
class QAT(Healing):
    """Settings for training latent weights: AdamW with warm-up, then cosine decay to zero.

    Attributes:
      learning_rate: peak learning rate of weights.
      in_steps: whether this rate is in units of the quantization step, averaged over a matrix, so
        that one rate suits all layers and bit widths. Applies to integers and tables.
      scale_rate, range_rate: peak rates of learned scales and of learned input ranges, relative to
        their magnitude; 0 freezes them.
      also: globs of plain leaves to train as well ("*norm*").
      other_rate: peak learning rate of these leaves.
      weight_decay: weight decay, of latent weights only.
      clip: largest gradient norm, applied to weights, scales, ranges and other leaves separately; 0
        disables clipping.
      dampening: final factor of `stability.dampening` in the loss; it rises as a cosine over the
        last three quarters of the steps. 0 disables it.
      holding: final threshold of `stability.hold`, which freezes codes that oscillate more often;
        it falls as a cosine from ten times this value. 0 disables it.
      steadying: scales whose gradient changes sign in a larger share of the steps are frozen until
        it no longer does (`stability.frozen_scales`). 0 disables it.
      kurtosis: weight of the kurtosis of outputs in the gradient (`flattened`).
      watch: whether to measure in every step the share of codes that changed and the drift of
        scales. Costs rounding all weights two more times.
    """

    learning_rate: float = 1e-4
    in_steps: bool = False
    scale_rate: float = 1e-3
    range_rate: float = 1e-3
    also: tuple[str, ...] = ()
    other_rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    dampening: float = 0.0
    holding: float = 0.0
    steadying: float = 0.0
    kurtosis: float = 0.0
    watch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "scale_rate", "range_rate", "other_rate", "weight_decay", "clip", "dampening",
            "holding", "steadying", "kurtosis",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if 0 < self.holding <= stability.MOMENTUM:
            raise ValueError(
                f"holding must be 0, or above {stability.MOMENTUM}, which a single change "
                f"of a code reaches, got {self.holding}"
            )

    @property
    def rates(self) -> dict[str, float]:
        """The peak rate of every kind of array that is trained, by label."""
        every = {WEIGHT: self.learning_rate, SCALE: self.scale_rate, RANGE: self.range_rate,
                 OTHER: self.other_rate if self.also else 0.0}  # fmt: skip
        return {label: rate for label, rate in every.items() if rate}

    def rule(self) -> Rule:
        """Return the rule for `Trainer`."""
        return Descent(self)

    def trained(self, params: PyTree) -> PyTree:
        """Return which arrays of a tree are trained.

        Args:
          params: tree with latent weights.
        Returns:
          A tree of booleans, like `params`.
        """
        return trained(params, *self.rates, also=self.also)

    def optimizer(self, train: PyTree) -> optax.GradientTransformation:
        """Return the optimizer of these settings.

        Args:
          train: tree of the trained arrays.
        Returns:
          The optimizer, with one rate per kind of array.
        """

        def of(label: str, rate: float) -> optax.GradientTransformation:
            schedule = dataclasses.replace(self, learning_rate=rate).schedule()
            decay = self.weight_decay if label == WEIGHT else 0.0
            parts = [optax.clip_by_global_norm(self.clip)] if self.clip else []
            parts += [optax.adamw(schedule, b2=0.95, weight_decay=decay)]
            return optax.chain(*parts, *([relative()] if label in (SCALE, RANGE) else []))

        return optimizer(train, **{label: of(label, rate) for label, rate in self.rates.items()})

    def dampening_at(self, step: Array) -> Array:
        """Return the factor of dampening.

        Args:
          step: number of updates done.
        Returns:
          The factor, between 0 and `dampening`.
        """
        part = jnp.clip((step / self.steps - 0.25) / 0.75, 0, 1)
        return self.dampening * (1 - jnp.cos(jnp.pi * part)) / 2

    def holding_at(self, step: Array) -> Array:
        """Return the threshold of holding.

        Args:
          step: number of updates done.
        Returns:
          The threshold, between `holding` and ten times that.
        """
        return self.holding * (1 + 9 * (1 + jnp.cos(jnp.pi * step / self.steps)) / 2)


class _Slots(NamedTuple):
    """Training state: of the optimizer, and of the remedies against oscillation and disorder."""

    step: Array
    optimizer: optax.GradientTransformation
    oscillations: dict[str, stability.Oscillation]
    disorder: dict[str, stability.Disorder]


class Descent:
    """A training rule (`trainer.Rule`) that trains a tree's arrays with an Optax optimizer.

    Args:
      how: training settings.
    """

    def __init__(self, how: QAT) -> None:
        self.how = how

    def init(self, opened: Opened) -> tuple[PyTree, PyTree]:
        train, how, tree = opened.start, self.how, eqx.combine(opened.start, opened.params)
        return train, _Slots(
            jnp.int32(0),
            how.optimizer(train).init(train),
            stability.oscillations(tree) if how.holding else {},
            stability.disorder(tree) if how.steadying and how.scale_rate else {},
        )

    def update(
        self, loss: Loss, change: PyTree, slots: _Slots, opened: Opened, *batch: PyTree
    ) -> tuple[PyTree, _Slots, dict[str, Array]]:
        how, tree = self.how, lambda change: eqx.combine(change, opened.params)

        def whole(change: PyTree) -> tuple[Array, Array]:
            with flattened(how.kurtosis):
                value = loss(change, opened, *batch)
            if not how.dampening:
                return value, value
            return value + how.dampening_at(slots.step) * stability.dampening(tree(change)), value

        (_, value), slope = jax.value_and_grad(whole, has_aux=True)(change)
        measured = {"loss": value, "gradient": optax.tree.norm(slope)}
        disorder, oscillations = slots.disorder, slots.oscillations
        if disorder:
            disorder = stability.turned(disorder, slope)
            slope = stability.frozen_scales(disorder, slope, how.steadying)
        step, state = how.optimizer(change).update(slope, slots.optimizer, change)
        if how.in_steps:
            step = stability.times_steps(step, tree(change))
        new = optax.apply_updates(change, step)
        if oscillations:
            threshold = how.holding_at(slots.step)
            oscillations, held = stability.hold(oscillations, tree(new), threshold)
            new = eqx.filter(held, how.trained(held))
            measured["frozen"] = _mean({p: o.frozen for p, o in oscillations.items()})
        if how.watch:
            before, after = tree(change), tree(new)
            changed = stability.flips(stability.codes_of(before), stability.codes_of(after))
            measured["flips"] = _mean(changed)
            measured["drift"] = _mean(stability.drift(before, after))
        return new, _Slots(slots.step + 1, state, oscillations, disorder), measured


def _mean(of: dict[str, Array]) -> Array:
    return jnp.mean(jnp.stack([jnp.mean(a) for a in of.values()])) if of else jnp.zeros(())


How = QAT | ZeroQAT
END_TO_END, BLOCKS = QAT(), QAT(steps=20, learning_rate=3e-3)


def open_latent(params: PyTree, how: How) -> Opened:
    """Split a tree into fixed arrays and trained arrays, the latter in float32.

    Args:
      params: tree with latent weights.
      how: training settings, which say what is trained.
    Returns:
      The opened tree.
    Raises:
      ValueError: nothing is latent, a weight has an adapter, or `also` (`others` of `Zeroth`)
        matches no floating-point leaf.
    """
    check_globs(params, how.also)
    for path, w in path_leaves(params):
        if is_adapted(w):
            raise ValueError(
                f"{path} has an adapter, which jaxquant.training.finetune trains; to train the "
                "weight itself, merge the adapter first"
            )
    train, rest = eqx.partition(params, how.trained(params))
    if not jax.tree.leaves(train):
        raise ValueError("nothing to train: no leaf is latent; make some with jq.latent or jq.thaw")
    return Opened(rest, jax.tree.map(lambda a: a.astype(jnp.float32), train))


def qat(
    fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    sequences: np.ndarray,
    how: How = END_TO_END,
    *,
    teacher: PyTree = None,
    validation: np.ndarray | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> PyTree:
    """Train latent weights end to end.

    Args:
      fn: fn(params, x [batch, ...]) -> logits [..., vocabulary]; run under `quantized`.
      params: tree with latent weights.
      sequences: training inputs [N, ...]; without a teacher, tokens [N, t], and the loss is the
        cross-entropy of the next token.
      how: settings: `QAT` (trains by backpropagation) or `ZeroQAT` (by forward passes only).
      teacher: tree whose predictions are the target (the loss is the mean KL divergence from them),
        for example the floating-point tree. Default: none.
      validation: held-out inputs; the state with the least loss on them is returned. None: the last
        state is returned.
      progress: called with a `tuning.trainer.Progress` after every update.
      finished: store of the training state, written every `save_every` updates (a field of `how`).
        A run that was interrupted resumes from it.
    Returns:
      The trained tree, still latent; `freeze` packs it.
    Raises:
      ValueError: there are fewer sequences than one batch needs, there is nothing to train, the
        store holds an unfinished run with other weights or settings, or a loss is not finite.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (32, 32))
    >>> x = np.random.default_rng(0).normal(size=(8, 4, 32)).astype(np.float32)
    >>> p = jq.latent({"w": w}, jq.lsq(bits=2, group_size=16))
    >>> fn = lambda p, x: x @ p["w"]
    >>> better = jq.qat(fn, p, x, jq.training.QAT(steps=20, learning_rate=0.02), teacher={"w": w})
    >>> far = lambda p: float(jnp.mean(divergence(x @ p["w"].dequantize(), x @ w)))
    >>> far(jq.freeze(better)) < far(jq.freeze(p))
    True
    """
    check_arguments(qat, locals())
    opened = open_latent(params, how)
    trainer = Trainer(partial(sequence_loss, fn), how, how.rule())
    change = trainer.fit_sequences(
        opened, sequences, validation, teacher, name="qat", progress=progress, finished=finished,
        tree=lambda change: eqx.combine(change, opened.params),
    )  # fmt: skip
    return stored_as(params, eqx.combine(change, opened.params))


def stored_as(params: PyTree, trained: PyTree) -> PyTree:
    """Return the trained tree with plain leaves in their original dtypes.

    Args:
      params: the tree before training.
      trained: the tree after it.
    """
    plain = {path: w.dtype for path, w in path_leaves(params) if not isinstance(w, QTensor)}
    new = {path: w.astype(plain[path]) for path, w in path_leaves(trained) if path in plain}
    return replace_leaves(trained, new)


def _rounds_inputs(params: PyTree) -> bool:
    return any(getattr(w, "activations", None) is not None for _, w in path_leaves(params))


def sequence_loss(fn: Callable, change: PyTree, opened: Opened, teacher: PyTree, x: Array) -> Array:
    """Return the cross-entropy of the next token, or the divergence from a teacher's predictions.

    Args:
      fn: fn(params, x) -> logits.
      change: the trained arrays.
      opened: the fixed arrays, in `params`.
      teacher: tree of the teacher, or None.
      x: a batch of inputs.
    """
    logits = quantized(fn)(eqx.combine(change, opened.params), x)
    if teacher is None:
        return next_token_loss(logits, x)
    return jnp.mean(divergence(logits, jax.lax.stop_gradient(quantized(fn)(teacher, x))))


def qat_blocks(
    block: Callable[[PyTree, Array], Array],
    params: PyTree,
    teacher: PyTree,
    hidden: Float[np.ndarray, "N ..."],
    how: How = BLOCKS,
    *,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> PyTree:
    """Train stacked blocks of latent weights in order, each to match the teacher's block.

    The inputs of a block are the outputs of the rounded blocks before it. The loss is the squared
    error of every output vector relative to its energy. Memory is that of one block.

    Args:
      block: block(parameters of one block, h [batch, ...]) -> h.
      params: tree whose leaves have a leading axis over blocks.
      teacher: the floating-point tree of the same structure.
      hidden: inputs of the first block; the last eighth is held out.
      how, progress, finished: as in `qat`.
    Returns:
      The trained stacked tree, still latent.
    Raises:
      ValueError: as in `qat`; or leaves disagree on the number of blocks, or there is only one
        input.
    Source:
      Block-AP of EfficientQAT (Chen et al. 2024, arXiv:2407.11062). This implementation
      differs from the paper: the error is relative, because the outputs of a few tokens are
      thousands of times as large as those of others.
    """
    check_arguments(qat_blocks, locals())
    blocks = common_stack_size(params, teacher)
    trainer = Trainer(partial(_block_loss, block), how, how.rule())
    plain = jax.jit(quantized(block))
    of_block = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    done = []

    def closed(i: int, opened: Opened, change: PyTree) -> Callable[[Array], Array]:
        done.append(stored_as(of_block(params, i), eqx.combine(change, opened.params)))
        served = freeze(done[-1])
        if not _rounds_inputs(served):
            served = dequantize(served)  # decode once, not per example
        return partial(plain, served)

    trainer.fit_blocks(
        blocks, hidden, lambda i: open_latent(of_block(params, i), how),
        lambda i: partial(plain, of_block(teacher, i)), closed,
        name="qat", progress=progress, finished=finished,
    )  # fmt: skip
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)


def _block_loss(block: Callable, change: PyTree, opened: Opened, h: Array, after: Array) -> Array:
    return relative_error(quantized(block)(eqx.combine(change, opened.params), h), after)
