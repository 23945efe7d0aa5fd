"""Block-by-block quantization, with statistics of only one block in memory at a time."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxquant.calibration.calibrate import calibrate
from jaxquant.calibration.statistics import Weighting
from jaxquant.core.arguments import check_arguments
from jaxquant.core.dispatch import quantized
from jaxquant.core.paths import stack_size
from jaxquant.methods.method import Method
from jaxquant.ptq.quantize import quantize
from jaxquant.ptq.quantize_leaf import Done
from jaxquant.recipes.recipe import Recipe


def quantize_blocks(
    block: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    hidden: Iterable[PyTree],
    recipe: Recipe | Method,
    *,
    loss: Callable[[PyTree, PyTree], jax.Array] | None = None,
    weighting: Weighting | None = None,
    progress: Callable[[int, Done], None] | None = None,
) -> tuple[PyTree, list[PyTree]]:
    """Quantize stacked blocks in order, each calibrated on outputs of the quantized ones before.

    Memory beyond `params` is the hidden states of all batches and two copies of one block's second
    moments, instead of those of all blocks (see `calibrate`).

    Args:
      block: function block(parameters of one block, h) -> h.
      params: tree whose leaves have a leading axis over blocks.
      hidden: inputs of the first block, one per batch, all of one shape.
      recipe: recipe for the tree of one block: paths as in `params`, shapes without the leading
        axis.
      loss: loss(block output, block input) -> scalar, for gradient weighting; see `calibrate`.
      weighting: weighting of the rows; see `calibrate`.
      progress: called with the index of the block and a `Done` for each matrix.
    Returns:
      The stacked tree with `QTensor` leaves, and the outputs of the last quantized block by batch.
    Raises:
      ValueError: there are no batches, or leaves disagree on the number of blocks.

    >>> import jaxquant as jq
    >>> x = jnp.ones((2, 32))
    >>> q, _ = quantize_blocks(lambda p, h: jnp.tanh(h @ p["w"]), {"w": jnp.ones((3, 32, 32))},
    ...                        [x], jq.gptq(group_size=32))
    >>> q["w"].shape
    (3, 32, 32)
    """
    check_arguments(quantize_blocks, locals())
    states = list(hidden)
    run = jax.jit(quantized(block))
    done = []
    for i in range(stack_size(params)):
        one = jax.tree.map(lambda a, i=i: a[i], params)
        stats = calibrate(block, one, states, loss=loss, weighting=weighting)
        report = None if progress is None else lambda d, i=i: progress(i, d)
        done.append(quantize(one, recipe, stats, progress=report))
        states = [run(done[-1], h) for h in states]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *done), states
