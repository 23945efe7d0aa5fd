"""Training of the free values of an opened tree: resumable, and evaluated on held-out data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.durable.states import as_arrays, as_tree, mark
from jaxquant.durable.store import Finished
from jaxquant.tuning.trainable import Opened, Values, at_start

MARK, DONE = "start", "done"  # stored beside a state: digest of its start, whether it has ended
Loss = Callable[..., Array]  # loss(change, opened, *batch)


@dataclasses.dataclass(frozen=True)
class Healing:
    """Training settings: Adam, with a warm-up over a tenth of the steps, then cosine decay to zero.

    Attributes:
      steps: number of updates.
      learning_rate: peak learning rate, of relative changes.
      batch_size: sequences per update.
      validate_every: updates between evaluations of the held-out loss; the best state is kept.
      save_every: updates between copies of the training state in the store.
      seed: seed of the order of the sequences.
    """

    steps: int = 200
    learning_rate: float = 2e-3
    batch_size: int = 1
    validate_every: int = 50
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_positive(self, "learning_rate")

    def schedule(self) -> optax.Schedule:
        """Return the learning rate as a function of the update."""
        warm = max(1, self.steps // 10)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warm, max(self.steps, warm + 1)
        )

    def batch(self, step: int, count: int) -> np.ndarray:
        """Return the indices of the sequences of an update.

        Every epoch has its own order, drawn from the seed.

        Args:
          step: index of the update, from 0.
          count: number of sequences.
        Returns:
          At most `batch_size` indices below `count`.
        """
        per = max(1, count // self.batch_size)
        epoch, place = divmod(step, per)
        order = np.random.default_rng((self.seed, epoch)).permutation(count)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


class _State(NamedTuple):
    """The state of training, enough to resume exactly where it stopped."""

    step: int
    change: Values
    slots: PyTree
    best: Values | None
    best_loss: float

    def stored(self, begun: np.ndarray, done: bool) -> dict[str, np.ndarray]:
        """Return copies of the state's arrays by name, with a digest of what training began with.

        They are copies because updates donate the buffers of the state.
        """
        return as_arrays(self) | {MARK: begun, DONE: np.array(done)}

    def restored(self, arrays: Mapping[str, Array]) -> "_State":
        """Return the stored state, in the structure of this one."""
        state = as_tree(arrays, self)
        return state._replace(step=int(state.step), best_loss=float(state.best_loss))


# Copies changes, since an update overwrites the buffers that it is given.
_copied = jax.jit(lambda change: jax.tree.map(jnp.copy, change))


class Progress(NamedTuple):
    """Progress report after an update.

    Attributes:
      name: name of the training.
      step: number of updates done.
      loss: training loss before the update.
      validation: held-out loss, or None if it was not evaluated at this step.
      measured: every number that the rule measures, the loss included.
      params: function that returns the tree as the loss sees it after the update, trained arrays in
        float32. Use its result before the callback returns, since the next update overwrites the
        trained arrays. None in loops that train block by block, codes or transforms.
    """

    name: str
    step: int
    loss: float
    validation: float | None
    measured: Mapping[str, float] = {}
    params: Callable[[], PyTree] | None = None


class Rule(Protocol):
    """A training rule; `change` holds everything the loss depends on beside the opened tree."""

    def init(self, opened: Opened) -> tuple[Values, PyTree]:
        """Return the initial change and the initial state of the rule for an opened tree."""

    def update(
        self, loss: Loss, change: Values, slots: PyTree, opened: Opened, *batch: PyTree
    ) -> tuple[Values, PyTree, dict[str, Array]]:
        """Make one update.

        Args:
          loss: loss(change, opened, *batch) -> scalar.
          change: the change before the update.
          slots: the state of the rule.
          opened: the opened tree.
          batch: further arguments of the loss.
        Returns:
          The new change, the new state, and numbers to report: "loss" before the update, and any
          others.
        """


class Adam:
    """Relative changes of continuous values by Adam (Kingma and Ba 2014, arXiv:1412.6980)."""

    def __init__(self, healing: Healing) -> None:
        self.optimizer = optax.adam(healing.schedule())

    def init(self, opened: Opened) -> tuple[Values, PyTree]:
        zero = at_start(opened)
        return zero, self.optimizer.init(zero)

    def update(
        self, loss: Loss, change: Values, slots: PyTree, opened: Opened, *batch: PyTree
    ) -> tuple[Values, PyTree, dict[str, Array]]:
        value, slope = jax.value_and_grad(loss)(change, opened, *batch)
        step, slots = self.optimizer.update(slope, slots, change)
        return optax.apply_updates(change, step), slots, {"loss": value}


def _replace(states: list[Array], function: Callable[[Array], Array]) -> None:
    """Replace every array by the function of it, so that memory holds only one more."""
    for j, h in enumerate(states):
        states[j] = function(h)


def _kept(finished: Finished | None, begun: np.ndarray, name: str) -> Mapping[str, Array] | None:
    """Return the stored state of this training, or None; other trainings that ended are ignored."""
    kept = None if finished is None or name not in finished else finished[name]
    if kept is None or np.array_equal(kept[MARK], begun):
        return kept
    if not kept[DONE]:
        raise ValueError(
            f"the stored state of {name}, at step {int(kept['0'])}, belongs to "
            "another training, with other weights, another recipe or other settings. "
            "It was not changed: continue with those, or store this training "
            "elsewhere"
        )
    return None


def _finite(measured: dict[str, float], name: str, step: int, healing: Healing) -> dict[str, float]:
    for what, value in measured.items():
        if not np.isfinite(value):
            raise ValueError(
                f"{name}, step {step}: the {what} is {value}; lower the learning rate "
                f"({healing.learning_rate:g}) or check the sequences of this step. The "
                "state stored before is unchanged"
            )
    return measured


class Trainer:
    """Runs the updates of one loss on one schedule, compiled once per tree structure.

    Args:
      loss: loss(change, opened, *batch) -> scalar.
      healing: training settings.
      rule: what is trained and how. Default: `Adam`.
    """

    def __init__(self, loss: Loss, healing: Healing, rule: Rule | None = None) -> None:
        self.healing = healing
        self.rule = rule or Adam(healing)
        self.measure = jax.jit(loss)
        self.update = jax.jit(partial(self.rule.update, loss), donate_argnums=(0, 1))

    def fit(
        self,
        opened: Opened,
        batch: Callable[[np.ndarray], tuple],
        count: int,
        held_out: Sequence[tuple] = (),
        *,
        name: str,
        tree: Callable[[Values], PyTree] | None = None,
        progress: Callable[[Progress], None] | None = None,
        finished: Finished | None = None,
    ) -> Values:
        """Train the values of an opened tree.

        Args:
          opened: the tree.
          batch: function of indices below `count` that returns the arguments of the loss after the
            opened tree.
          count: number of training sequences.
          held_out: arguments of the loss on held-out data, one tuple per evaluation.
          name: name of the state in the store and in progress reports.
          tree: function of the changes that returns the tree as the loss sees it, for progress
            reports. Default: none; they then have no `params`.
          progress: called with a `Progress` after every update.
          finished: store of the state, written every `save_every` updates.
        Returns:
          The changes with the least loss on `held_out`, the initial ones included; without held-out
          data the last ones.
        Raises:
          ValueError: there are fewer sequences than one batch needs, the store holds an unfinished
            run with other weights or settings, or a loss or gradient is not finite.
        """
        healing = self.healing
        if count < healing.batch_size:
            raise ValueError(
                f"expected at least batch_size = {healing.batch_size} sequences, got {count}"
            )

        def judged(change: Values) -> float:
            each = [float(self.measure(change, opened, *one)) for one in held_out]
            return float(np.mean(each)) if each else float("inf")

        start, slots = self.rule.init(opened)
        begun = np.zeros(0, np.uint8)
        if finished is not None:  # hashing reads every weight
            first = batch(healing.batch(0, count)), [one[-1] for one in held_out]
            begun = mark(str(healing), (opened, first))
        best = start if held_out else None  # without held-out data, no second copy is needed
        state = _State(0, _copied(start), slots, best, float("inf"))
        if kept := _kept(finished, begun, name):
            state = state.restored(kept)
        else:
            state = state._replace(best_loss=judged(start))
        while state.step < healing.steps:
            now = batch(healing.batch(state.step, count))
            change, slots, seen = self.update(state.change, state.slots, opened, *now)
            state = state._replace(step=state.step + 1, change=change, slots=slots)
            measured = _finite({k: float(a) for k, a in seen.items()}, name, state.step, healing)
            last, held = state.step == healing.steps, None
            if held_out and (last or state.step % healing.validate_every == 0):
                held = judged(change)
                if held < state.best_loss:
                    state = state._replace(best=_copied(change), best_loss=held)
            if finished is not None and (last or state.step % healing.save_every == 0):
                finished[name] = state.stored(begun, last)
            if progress is not None:
                params = None if tree is None else partial(tree, state.change)
                progress(Progress(name, state.step, measured["loss"], held, measured, params))
        return state.change if state.best is None else state.best

    def fit_sequences(
        self,
        opened: Opened,
        sequences: np.ndarray,
        validation: np.ndarray | None,
        *before: PyTree,
        **options: Any,
    ) -> Values:
        """Run `fit` for a loss (change, opened, *before, x) of rows x of an array.

        Args:
          opened, options: as in `fit`; the options are `name`, `tree`, `progress` and
            `finished`.
          sequences: training rows.
          validation: held-out rows, or None.
          before: arguments that are the same for every batch.
        Returns:
          The changes, as in `fit`.
        """
        held_out = () if validation is None else validation
        return self.fit(
            opened,
            lambda ids: (*before, jnp.asarray(sequences[ids])),
            len(sequences),
            [(*before, jnp.asarray(v)[None]) for v in held_out],
            **options,
        )

    def fit_examples(
        self, opened: Opened, inputs: Sequence[Array], outputs: Sequence[Array], **options: Any
    ) -> Values:
        """Run `fit` for a loss (change, opened, inputs, outputs), with the last eighth held out.

        Args:
          opened, options: as in `fit`; the options are `name`, `progress` and `finished`.
          inputs, outputs: examples, each with a leading axis along which a batch is concatenated.
        Returns:
          The changes, as in `fit`.
        """
        examples, kept = list(zip(inputs, outputs, strict=True)), max(1, len(inputs) // 8)
        training = examples[:-kept]

        def batch(ids: np.ndarray) -> tuple:
            return tuple(map(jnp.concatenate, zip(*(training[j] for j in ids), strict=True)))

        return self.fit(opened, batch, len(training), examples[-kept:], **options)

    def fit_blocks(
        self,
        blocks: int,
        hidden: Float[np.ndarray, "N ..."],
        opened: Callable[[int], Opened],
        wanted: Callable[[int], Callable[[Array], Array]],
        closed: Callable[[int, Opened, Values], Callable[[Array], Array]],
        *,
        name: str,
        **options: Any,
    ) -> None:
        """Run `fit_examples` on one block after another, each fed the outputs of those before it.

        Args:
          blocks: number of blocks.
          hidden: inputs of the first block; the last eighth is held out.
          opened: function of a block's index that returns its opened tree.
          wanted: function of a block's index that returns the target function, applied to the
            targets of the block before (to `hidden` for the first).
          closed: function of the index, the opened tree and the changes found that returns the
            trained block as a function of its inputs.
          name: the training of block 3 is called "NAME of block 3".
          options: `progress` and `finished`, as in `fit`.
        Raises:
          ValueError: there is only one input.
        """
        if len(hidden) < 2:
            raise ValueError("expected at least two inputs, one of which is held out, got one")
        ours = [jnp.asarray(h)[None] for h in hidden]
        theirs = list(ours)
        for i in range(blocks):
            _replace(theirs, wanted(i))
            block = opened(i)
            change = self.fit_examples(block, ours, theirs, name=f"{name} of block {i}", **options)
            _replace(ours, closed(i, block, change))
            del block, change  # before the next block is read
