"""Healing: training the continuous values left after rounding against the original model."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.core.arguments import check_arguments
from jaxquant.core.dispatch import quantized
from jaxquant.core.paths import common_stack_size
from jaxquant.core.tree import dequantize
from jaxquant.durable.store import Finished
from jaxquant.tuning.losses import divergence, relative_error
from jaxquant.tuning.trainable import Opened, Values, close_tree, open_tree, trained
from jaxquant.tuning.trainer import Healing, Progress, Trainer

END_TO_END, BLOCKS = Healing(), Healing(steps=20)


def heal(
    fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    teacher: PyTree,
    sequences: np.ndarray,
    healing: Healing = END_TO_END,
    *,
    validation: np.ndarray | None = None,
    also: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> PyTree:
    """Train a quantized tree so that fn(params, x) matches fn(teacher, x) in KL divergence.

    The loss is the mean KL divergence over the last axis of the outputs. Scales, codebooks and
    signs (as real numbers) of quantized leaves are trained, and the leaves that `also` names; codes
    stay fixed. Signs become float16 vectors, and formats with nothing to train (such as
    `EntropyCoded`) get a float16 factor for every input and output channel; both count towards the
    size.

    Args:
      fn: fn(params, x [batch, ...]) -> logits [..., vocabulary]; run under `quantized`.
      params: quantized tree.
      teacher: the floating-point tree from which it was made.
      sequences: training inputs [N, ...].
      healing: number of steps, learning rate and batch size.
      validation: held-out inputs; the state with the least loss on them is returned. None: the last
        state is returned.
      also: globs of plain floating-point leaves to train ("*norm*").
      progress: called with a `tuning.trainer.Progress` after every update.
      finished: store of the training state, written every `save_every` updates (a field of
        `healing`). A run that was interrupted resumes from it.
    Returns:
      The trained quantized tree.
    Raises:
      ValueError: there are fewer sequences than one batch needs, there is nothing to train, the
        store holds an unfinished run with other weights or settings, or a loss is not finite.
    Source:
      Tseng et al. 2024, arXiv:2402.04396, train the same values with cross-entropy against the
      teacher's probabilities. This implementation uses KL, and trains all layers at once.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (32, 32))
    >>> x = np.random.default_rng(0).normal(size=(8, 4, 32)).astype(np.float32)
    >>> fn = lambda p, x: x @ p["w"]
    >>> q = jq.quantize({"w": w}, jq.rtn(bits=2, group_size=16))
    >>> better = heal(fn, q, {"w": w}, x, Healing(steps=20, learning_rate=0.02))
    >>> far = lambda p: float(jnp.mean(divergence(fn(p, x), x @ w)))
    >>> far({"w": better["w"].dequantize()}) < far({"w": q["w"].dequantize()})
    True
    """
    check_arguments(heal, locals())
    opened = open_tree(params, also)
    trainer = Trainer(partial(distillation, fn), healing)
    change = trainer.fit_sequences(
        opened, sequences, validation, teacher, name="healing", progress=progress,
        finished=finished, tree=partial(trained, opened),
    )  # fmt: skip
    return close_tree(params, opened, change)


def heal_blocks(
    block: Callable[[PyTree, Array], Array],
    params: PyTree,
    teacher: PyTree,
    hidden: Float[np.ndarray, "N ..."],
    healing: Healing = BLOCKS,
    *,
    also: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> PyTree:
    """Train stacked quantized blocks in order, each to match the outputs of the teacher's block.

    The inputs of a block are the outputs of the quantized blocks before it. The loss is the squared
    error of every output vector relative to its energy, because the norm that follows would undo
    the large size that some tokens have. Training a block takes a fraction of the time of a whole
    model, which makes this a cheap start for `heal`.

    Args:
      block: block(parameters of one block, h [batch, ...]) -> h.
      params: quantized tree whose leaves have a leading axis over blocks.
      teacher: the floating-point tree from which it was made.
      hidden: inputs of the first block; the last eighth is held out.
      healing: as in `heal`, with fewer steps by default.
      also, progress, finished: as in `heal`.
    Returns:
      The trained stacked tree.
    Raises:
      ValueError: as in `heal`; or leaves disagree on the number of blocks, among themselves or with
        the teacher; or there is only one input.
    Source:
      Tseng et al. 2024, arXiv:2402.04396, and Chen et al. 2024, arXiv:2407.11062, train blocks.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 4
    >>> x = np.random.default_rng(0).normal(size=(16, 4, 32)).astype(np.float32)
    >>> block = lambda p, h: h + jnp.tanh(h @ p["w"])
    >>> fn = lambda p, h: jax.lax.scan(lambda h, p: (block(p, h), None), h, p)[0]
    >>> q = jq.quantize({"w": w}, jq.rtn(2, 16), jq.sites(fn, {"w": w}, x[0]))
    >>> heal_blocks(block, q, {"w": w}, x)["w"].shape
    (2, 32, 32)
    """
    check_arguments(heal_blocks, locals())
    of_block = lambda tree: lambda i: jax.tree.map(lambda a: a[i], tree)
    done: list[PyTree] = []
    heal_each(
        block, common_stack_size(params, teacher), of_block(params), of_block(teacher), hidden,
        healing, keep=lambda i, tree: done.append(tree), also=also, progress=progress,
        finished=finished,
    )  # fmt: skip
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)


def heal_each(
    block: Callable[[PyTree, Array], Array],
    blocks: int,
    params: Callable[[int], PyTree],
    teacher: Callable[[int], PyTree],
    hidden: Float[np.ndarray, "N ..."],
    healing: Healing = BLOCKS,
    *,
    keep: Callable[[int, PyTree], None],
    also: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> None:
    """Train blocks as `heal_blocks` does, each of which is read when its turn comes.

    Memory holds one block of the teacher or one of the quantized blocks at a time, and the hidden
    states three times: as they are given, and after the last block of either.

    Args:
      block, healing, also, progress, finished: as in `heal_blocks`.
      blocks: number of blocks.
      params: function of a block's index that returns its quantized tree.
      teacher: function of a block's index that returns the floating-point tree.
      hidden: inputs of the first block; the last eighth is held out.
      keep: called with the index and the trained tree of every block, in order.
    Raises:
      ValueError: as in `heal_blocks`.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (32, 32)) / 4
    >>> x = np.random.default_rng(0).normal(size=(16, 4, 32)).astype(np.float32)
    >>> block, healed = lambda p, h: h + jnp.tanh(h @ p["w"]), {}
    >>> params = lambda i: jq.quantize({"w": w}, jq.rtn(2, 16))
    >>> heal_each(block, 2, params, lambda i: {"w": w}, x, keep=healed.__setitem__)
    >>> sorted(healed)
    [0, 1]
    """
    trainer, plain = Trainer(partial(_block_loss, block), healing), jax.jit(block)
    held: dict[int, PyTree] = {}

    def opened(i: int) -> Opened:
        held[i] = params(i)
        return open_tree(held[i], also)

    def closed(i: int, opened: Opened, change: Values) -> Callable[[Array], Array]:
        tree = close_tree(held.pop(i), opened, change)
        keep(i, tree)
        return partial(plain, dequantize(tree))  # decode once, not per example

    trainer.fit_blocks(
        blocks, hidden, opened, lambda i: partial(plain, teacher(i)), closed,
        name="healing", progress=progress, finished=finished,
    )  # fmt: skip


def _block_loss(block: Callable, change: Values, opened: Opened, h: Array, after: Array) -> Array:
    return relative_error(quantized(block)(trained(opened, change), h), after)


def distillation(fn: Callable, change: Values, opened: PyTree, teacher: PyTree, x: Array) -> Array:
    student = quantized(fn)(trained(opened, change), x)
    return jnp.mean(divergence(student, jax.lax.stop_gradient(fn(teacher, x))))
