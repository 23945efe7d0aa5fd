"""Calibration of one block of a model, given the gradients of the loss at its outputs.

A model larger than memory is calibrated one block at a time: hidden states run forward through all
blocks, then gradients run back, and each block's statistics are collected when they pass it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxquant.calibration.observation import total
from jaxquant.calibration.probing import Probing
from jaxquant.calibration.statistics import Probe, Stats, Weighting
from jaxquant.core.arguments import check_arguments
from jaxquant.core.programs import program_memory
from jaxquant.core.sites import Site, sites
from jaxquant.core.standin import run


class Passed(NamedTuple):
    """One batch after it has passed a block.

    Attributes:
      outputs: the block's outputs; None if gradients were given.
      gradients: the gradients of the loss at the block's inputs; None if none were given.
    """

    outputs: PyTree
    gradients: PyTree


def calibrate_block(
    block: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches: Iterable[tuple[PyTree, PyTree]],
    *,
    weighting: Weighting,
    gram: bool = True,
    output: tuple[str, ...] = (),
    sample: int = 0,
    passed: Callable[[int, Passed], None] | None = None,
) -> Stats:
    """Return the statistics of one block; with gradients they equal those of the whole model.

    Memory is that of `params`, two copies of the statistics, and one backward pass of the block.

    Args:
      block: function block(parameters of the block, h) -> h of the same shape. Blocks of equal
        shapes are compiled once if this is the same function object.
      params: a stack of blocks cut down to one: every leaf is [1, ...].
      batches: pairs (inputs h of the block, gradients of the loss at its outputs). The gradients
        may be None if the weighting is not "gradient".
      weighting, gram, output, sample: as in `calibrate`.
      passed: called with the number of each batch, from 0, and what came out of the block.
    Returns:
      `Stats`, by the paths of `params`; the sums have a leading axis of 1.
    Raises:
      ValueError: there are no batches, gradients are needed and not given, or `output` is asked for
        with another weighting.

    >>> block = lambda p, h: jnp.tanh(h @ p["w"])
    >>> h, w = jnp.ones((2, 4)), jnp.eye(4)
    >>> stats = calibrate_block(block, {"w": w[None]}, [(h, h)], weighting="gradient")
    >>> stats.gram("w").shape
    (1, 4, 4)
    """
    check_arguments(calibrate_block, locals())
    if output and weighting != "gradient":
        raise ValueError('output= needs weighting="gradient"')
    sums, plan = None, None
    for i, (h, g) in enumerate(batches):
        if sums is None:
            found = sites(block, jax.eval_shape(only, params), h)
            plan = Probing.of(found, weighting, gram, output, sample)
            sums = jax.tree.map(lambda a: a[None], plan.probes())
        if g is None and weighting == "gradient":
            raise ValueError("gradients of the loss at the outputs of the block are needed")
        sums, out = _step(sums, params, h, g, block, plan)
        jax.block_until_ready(sums)
        if passed is not None:
            passed(i, Passed(out, None) if g is None else Passed(None, out))
    if sums is None or plan is None:
        raise ValueError("calibration needs at least one batch, got none")
    return Stats(stacked_sites(found), sums, dict(plan.holder))


def calibration_memory(
    block: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    h: PyTree,
    *,
    weighting: Weighting,
    gram: bool = True,
    output: tuple[str, ...] = (),
    sample: int = 0,
) -> tuple[int, int]:
    """Return the bytes of the statistics of a block, and those that collecting them takes besides.

    The latter are those of the compiled program, without its arguments.

    Args:
      block, weighting, gram, output, sample: as in `calibrate_block`.
      params: shapes of the parameters, [1, ...].
      h: shapes of the inputs of one batch.
    """
    found = sites(block, jax.eval_shape(only, params), h)
    plan = Probing.of(found, weighting, gram, output, sample)
    sums = jax.eval_shape(lambda: jax.tree.map(lambda a: a[None], plan.probes()))
    g = h if weighting == "gradient" else None
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(sums))
    return held, program_memory(_step, sums, params, h, g, block, plan)


def stacked_sites(found: Mapping[str, Site]) -> dict[str, Site]:
    """Return how weights are used as those of a stack of one block.

    Args:
      found: how the block uses its weights.
    """
    more = lambda axes: tuple(axis + 1 for axis in axes)
    return {
        path: dataclasses.replace(
            site,
            shape=(1, *site.shape),
            contracted=more(site.contracted),
            batch=(0, *more(site.batch)),
            experts=more(site.experts),
            gathered=None if site.gathered is None else site.gathered + 1,
            also=tuple(map(more, site.also)),
        )
        for path, site in found.items()
    }


def only(stack: PyTree) -> PyTree:
    """Return the only block of a stack; within a compiled program this copies nothing.

    Args:
      stack: a tree of arrays [1, ...].
    """
    return jax.tree.map(lambda a: a[0], stack)


@partial(jax.jit, static_argnames=("block", "plan"), donate_argnames="sums")
def _step(
    sums: dict[str, Probe], params: PyTree, h: PyTree, g: PyTree, block: Callable, plan: Probing
) -> tuple[dict[str, Probe], PyTree]:
    """Merge the statistics of one batch into the sums; return the gradients, or the outputs."""
    stack, params, sums = sums, only(params), only(sums)

    def scalar(probes: dict[str, Probe], h: PyTree) -> tuple[Array, PyTree]:
        out = run(block, plan.planted(params, probes), h)
        if g is None:
            return total(out), out
        products = jax.tree.map(jnp.vdot, out, g)
        return sum(jax.tree.leaves(products), jnp.float32(0)), None

    # A probe's value is never read, so the running sums can take the place of zeros.
    if g is None:
        found, out = jax.grad(scalar, has_aux=True)(sums, h)
    else:
        (found, out), _ = jax.grad(scalar, argnums=(0, 1), has_aux=True)(sums, h)
    merged = plan.merged(sums, found)
    return jax.tree.map(lambda a, like: a.reshape(like.shape), merged, stack), out
