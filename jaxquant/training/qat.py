"""Training latent weights: end to end, or block by block first, resumable, judged on held-out data.

The loops are those that heal (`trainer`); a loop of one's own needs no more than `jax.grad` of
`jq.quantized(loss)` and Optax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.core.dispatch import quantized
from jaxquant.core.paths import common_stack_size, path_leaves, replace_leaves
from jaxquant.core.tensor import QTensor
from jaxquant.core.tree import dequantize
from jaxquant.durable.store import Finished
from jaxquant.training.descent import QAT
from jaxquant.training.latent import freeze
from jaxquant.training.zeroqat import ZeroQAT
from jaxquant.tuning.trainable import Opened, check_globs
from jaxquant.tuning.trainer import Progress, Trainer, divergence, next_token_loss, relative_error

How = QAT | ZeroQAT
END_TO_END, BLOCKS = QAT(), QAT(steps=20, learning_rate=3e-3)


def open_latent(params: Any, how: How) -> Opened:
    """The tree apart: what stays, and what trains, in float32 whatever it is stored in.

    Raises:
      ValueError: nothing is latent; `also` (of `ZeroQAT`: `others`) matches no floating leaf.
    """
    check_globs(params, how.also)
    train, rest = eqx.partition(params, how.trained(params))
    if not jax.tree.leaves(train):
        raise ValueError("nothing to train: no leaf is latent; make some with jq.latent or jq.thaw")
    return Opened(rest, jax.tree.map(lambda a: a.astype(jnp.float32), train))


def qat(
    fn: Callable[[Any, Array], Array],
    params: Any,
    sequences: np.ndarray,
    how: How = END_TO_END,
    *,
    teacher: Any = None,
    validation: np.ndarray | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Any:
    """Latent weights trained end to end.

    Args:
      fn: fn(params, x [batch, ...]) -> logits [..., vocabulary]; run under `quantized`.
      params: tree with latent weights.
      sequences: inputs [N, ...]; without a teacher tokens [N, t], each told from those before.
      teacher: a tree whose predictions are to be met, in KL (the floats, say); None: the text is.
      how: `QAT`, by derivatives, or `ZeroQAT`, forward only.
      validation: held-out inputs; the state with the least loss on them is what comes back.
        None: the last state does.
      progress: called after every update.
      finished: where training so far is kept, every `save_every` updates, and gone on from; as in
        `quantize`.
    Returns:
      the trained tree, latent still; `freeze` packs it.
    Raises:
      ValueError: fewer sequences than a batch; nothing to train; a loss that is no number.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (32, 32))
    >>> x = np.random.default_rng(0).normal(size=(8, 4, 32)).astype(np.float32)
    >>> p = jq.latent({"w": w}, jq.lsq(bits=2, group_size=16))
    >>> fn = lambda p, x: x @ p["w"]
    >>> better = jq.qat(fn, p, x, jq.QAT(steps=20, learning_rate=0.02), teacher={"w": w})
    >>> far = lambda p: float(jnp.mean(divergence(x @ p["w"].dequantize(), x @ w)))
    >>> far(jq.freeze(better)) < far(jq.freeze(p))
    True
    """
    check_arguments(qat, locals())
    opened = open_latent(params, how)
    trainer = Trainer(partial(_loss, fn), how, how.rule())
    change = trainer.fit_sequences(
        opened, sequences, validation, teacher, name="qat", progress=progress, finished=finished
    )
    return _stored_as(params, eqx.combine(change, opened.params))


def _stored_as(params: Any, trained: Any) -> Any:
    """The trained tree, its plain leaves in the dtypes that they had."""
    plain = {path: w.dtype for path, w in path_leaves(params) if not isinstance(w, QTensor)}
    new = {path: w.astype(plain[path]) for path, w in path_leaves(trained) if path in plain}
    return replace_leaves(trained, new)


def _rounds_inputs(params: Any) -> bool:
    return any(getattr(w, "activations", None) is not None for _, w in path_leaves(params))


def _loss(fn: Callable, change: Any, opened: Opened, teacher: Any, x: Array) -> Array:
    logits = quantized(fn)(eqx.combine(change, opened.params), x)
    if teacher is None:
        return next_token_loss(logits, x)
    return jnp.mean(divergence(logits, jax.lax.stop_gradient(quantized(fn)(teacher, x))))


def qat_blocks(
    block: Callable[[Any, Array], Array],
    params: Any,
    teacher: Any,
    hidden: Float[np.ndarray, "N ..."],
    how: How = BLOCKS,
    *,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Any:
    """Stacked blocks of latent weights trained in order, each to give what the teacher's gives.

    A block is fed what the rounded blocks before it make of the inputs; what is brought down is the
    squared error of every output vector, relative to its energy. Memory is a block's.

    Args:
      block: block(params of one block, h [batch, ...]) -> h.
      params: tree whose leaves carry a leading axis over blocks. teacher: the same of floats.
      hidden: inputs of the first block. The last eighth of them is held out.
      how, progress, finished: as in `qat`.
    Raises:
      ValueError: as `qat`; leaves that disagree on the number of blocks; one input only.
    Source:
      Block-AP of EfficientQAT (Chen et al. 2024, arXiv:2407.11062). We differ: the error is
      relative, since a few tokens' outputs are thousands of times as large as others'.
    """
    check_arguments(qat_blocks, locals())
    blocks = common_stack_size(params, teacher)
    trainer = Trainer(partial(_block_loss, block), how, how.rule())
    plain = jax.jit(quantized(block))
    of_block = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    done = []

    def closed(i: int, opened: Opened, change: Any) -> Callable[[Array], Array]:
        done.append(_stored_as(of_block(params, i), eqx.combine(change, opened.params)))
        served = freeze(done[-1])
        if not _rounds_inputs(served):
            served = dequantize(served)  # once, not for every example
        return partial(plain, served)

    trainer.fit_blocks(
        blocks, hidden, lambda i: open_latent(of_block(params, i), how),
        lambda i: partial(plain, of_block(teacher, i)), closed,
        name="qat", progress=progress, finished=finished,
    )  # fmt: skip
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)


def _block_loss(block: Callable, change: Any, opened: Opened, h: Array, after: Array) -> Array:
    return relative_error(quantized(block)(eqx.combine(change, opened.params), h), after)
