"""Healing: after rounding, train what stayed continuous, against the model as it was."""

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
from jaxquant.tuning.trainable import Opened, Values, close_tree, open_tree, trained
from jaxquant.tuning.trainer import Healing, Progress, Trainer, divergence, relative_error

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
    """`params` trained so that fn(params, x) is what fn(teacher, x) is, in KL over the last axis.

    Trained are the scales, signs (as reals) and codebooks of quantized leaves, and the leaves
    that `also` names; codes stay. Signs become float16 vectors, and formats with nothing to train
    (`EntropyCoded`, say) get a float16 factor for every input and output; both are counted.

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
    >>> far = lambda p: float(jnp.mean(divergence(fn(p, x), x @ w)))
    >>> far({"w": better["w"].dequantize()}) < far({"w": q["w"].dequantize()})
    True
    """
    check_arguments(heal, locals())
    opened = open_tree(params, also)
    trainer = Trainer(partial(distillation, fn), healing)
    change = trainer.fit_sequences(
        opened, sequences, validation, teacher, name="healing", progress=progress, finished=finished
    )
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
    """Stacked blocks trained in order, each to give what the teacher's gives.

    A block is fed what the quantized blocks before it make of the inputs, and the squared error of
    every output vector, relative to its energy, is brought down: a norm comes next, which would
    undo the great size that some tokens have. A cheap start for `heal`: a block takes a fraction of
    a model's time.

    Args:
      block: block(params of one block, h [batch, ...]) -> h.
      params: quantized tree whose leaves carry a leading axis over blocks. teacher: as in `heal`.
      hidden: inputs of the first block. The last eighth of them is held out.
      also, progress, finished: as in `heal`.
    Raises:
      ValueError: as in `heal`; leaves that disagree on the number of blocks, with one another or
        with the teacher's; one input only.
    Source:
      Tseng et al. 2024, arXiv:2402.04396, and Chen et al. 2024, arXiv:2407.11062, train blocks.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 4
    >>> x = np.random.default_rng(0).normal(size=(16, 4, 32)).astype(np.float32)
    >>> block = lambda p, h: h + jnp.tanh(h @ p["w"])
    >>> q = jq.quantize({"w": w}, jq.rtn(bits=2, group_size=16))
    >>> heal_blocks(block, q, {"w": w}, x)["w"].shape
    (2, 32, 32)
    """
    check_arguments(heal_blocks, locals())
    blocks = common_stack_size(params, teacher)
    trainer, plain = Trainer(partial(_block_loss, block), healing), jax.jit(block)
    of_block = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    done = []

    def closed(i: int, opened: Opened, change: Values) -> Callable[[Array], Array]:
        done.append(close_tree(of_block(params, i), opened, change))
        return partial(plain, dequantize(done[-1]))  # once, not for every example

    trainer.fit_blocks(
        blocks, hidden, lambda i: open_tree(of_block(params, i), also),
        lambda i: partial(plain, of_block(teacher, i)), closed,
        name="healing", progress=progress, finished=finished,
    )  # fmt: skip
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)


def _block_loss(block: Callable, change: Values, opened: Opened, h: Array, after: Array) -> Array:
    return relative_error(quantized(block)(trained(opened, change), h), after)


def distillation(fn: Callable, change: Values, opened: PyTree, teacher: PyTree, x: Array) -> Array:
    student = quantized(fn)(trained(opened, change), x)
    return jnp.mean(divergence(student, jax.lax.stop_gradient(fn(teacher, x))))
