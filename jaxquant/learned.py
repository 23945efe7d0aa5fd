"""Learned transforms: block by block, until rounded blocks give what blocks of floats gave."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.calibrate import Stats
from jaxquant.codebooks import Dense
from jaxquant.codebooks.integer import Integer, spread
from jaxquant.dispatch import quantized
from jaxquant.draw import Draw
from jaxquant.inputs import Inputs, Member
from jaxquant.methods import Method
from jaxquant.opened import Opened, Values
from jaxquant.paths import path_leaves, replace_leaves, stack_size
from jaxquant.recipe import Recipe, resolve
from jaxquant.resume import Finished
from jaxquant.straight import rounded
from jaxquant.tensor import QTensor, part
from jaxquant.training import Healing, Progress, Trainer, relative_error

Transforms = dict[tuple[str, int], dict[str, Array]]  # (leader of an input, index) -> arrays
LEARNING = Healing(steps=100, learning_rate=5e-3, batch_size=1, validate_every=25)


def learn(
    block: Callable[[Any, Array], Array],
    params: Any,
    name: str,
    recipe: Recipe | Method,
    stats: Stats,
    hidden: Float[np.ndarray, "N ..."],
    healing: Healing = LEARNING,
    *,
    key: Array | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Transforms:
    """Arrays for the transforms of a recipe that can be learned (`Kronecker`).

    In every step weights are transformed, rounded to nearest and multiplied by rounded inputs, with
    straight-through derivatives; what is brought down is the squared error of a block's outputs,
    relative to each one's energy. A block is fed what the rounded blocks before it give.

    Args:
      block: block(params of one block, h [batch, ...]) -> h.
      params: tree of floats, `params[name]` the blocks, stacked.
      recipe, stats, key: as `quantize` will have them.
      hidden: inputs of the first block. The last eighth of them is held out.
      progress: called after every update.
      finished: where learning so far is kept; as in `quantize`.
    Returns:
      what `quantize` takes as `transforms`.
    Raises:
      ValueError: no transform of the recipe can be learned; one input only.
    """
    if len(hidden) < 2:
        raise ValueError("expected two inputs or more, one of them to be held out, got one")
    entries = resolve(recipe, params, stats.sites).entries
    todo = [Member(e, e.method) for e in entries if isinstance(e.method, Method)]
    inputs = Inputs.of(todo, stats.sites, dict(path_leaves(params)), stats)
    blocks = _Blocks(name, inputs)
    if not blocks.learning:
        raise ValueError("nothing to learn: no transform of the recipe can be learned (Kronecker)")
    trainer = Trainer(partial(_loss, block, blocks), healing)
    plain = jax.jit(block)
    after_rounding = jax.jit(partial(_run, block, blocks))
    ours, theirs = [[jnp.asarray(h)[None] for h in hidden] for _ in range(2)]
    found: Transforms = {}
    for i in range(stack_size(params[name])):
        layer = jax.tree.map(lambda a, i=i: a[i], params[name])
        after = [plain(layer, h) for h in theirs]
        opened = blocks.opened(layer, i, Draw.of(key))
        change = trainer.fit_examples(
            opened, ours, after, name=f"learning of block {i}", progress=progress, finished=finished
        )
        for leader, arrays in blocks.arrays(opened, change).items():
            found[leader, i] = {f"input.{part}": a for part, a in arrays.items()}
        ours, theirs = [after_rounding(change, opened, h) for h in ours], after
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    """How blocks are rounded: which weights, by which methods, sharing which transforms."""

    name: str
    inputs: Inputs

    @property
    def members(self) -> list[Member]:
        prefix = f"{self.name}/"
        every = [m for group in self.inputs.members.values() for m in group]
        return [m for m in every if m.entry.path.startswith(prefix)]

    @property
    def learning(self) -> list[str]:
        """The leaders whose transforms are learned."""
        leaders = {self.inputs.leader[m.entry.path]: m.method.input for m in self.members}
        return [leader for leader, side in leaders.items() if hasattr(side, "learned")]

    def opened(self, layer: Any, i: int, draw: Draw) -> Opened:
        """A block of floats, its matrices, transforms as fitted, and zeros to learn."""
        fitted, matrices = {}, {}
        for entry, method in self.members:
            leader = self.inputs.leader[entry.path]
            k = entry.matrix[-2]
            matrices[entry.path] = entry.matrices(self.inputs.leaves[entry.path])[i]
            known = self.inputs.arrays(leader, i, draw.of_input(leader, i))
            if known is not None:
                fitted[leader] = part(known, "input.")
            elif method.input is not None:
                raise ValueError(
                    f"{entry.path}: beside learned transforms stand such that all weights of an "
                    f"input share, or none; {method.input} of {k} channels is the weight's own"
                )
        start = {
            leader: self.inputs.members[leader][0].method.input.latent(fitted[leader])
            for leader in self.learning
        }
        return Opened((layer, matrices, fitted), start)

    def arrays(self, opened: Opened, change: Values) -> dict[str, dict[str, Array]]:
        """By leader, the transforms after the change."""
        fitted = opened.params[2]
        side = lambda leader: self.inputs.members[leader][0].method.input
        return {leader: side(leader).learned(fitted[leader], change[leader]) for leader in change}

    def rounded(self, opened: Opened, change: Values) -> Any:
        """The block's tree with rounded weights, inputs to be rounded."""
        layer, matrices, fitted = opened.params
        arrays = fitted | self.arrays(opened, change)
        new = {}
        for entry, method in self.members:
            own, w = arrays.get(self.inputs.leader[entry.path], {}), matrices[entry.path]
            if method.input is not None:
                w = method.input.inverse(w.T, own).T
            data = {"codes": nearest(w, method.format)} | {f"input.{n}": a for n, a in own.items()}
            new[entry.path.removeprefix(f"{self.name}/")] = QTensor(
                data, Dense(), entry.form[0], w.dtype.name, method.name, method.input,
                activations=method.activations,
            )  # fmt: skip
        return replace_leaves(layer, new)


def nearest(w: Float[Array, "k n"], format: Any) -> Float[Array, "k n"]:
    """w rounded to nearest, with a straight-through derivative: of integers also in the scales.

    >>> jax.grad(lambda w: jnp.sum(nearest(w, Integer(2, 4))))(jnp.ones((4, 1))).shape
    (4, 1)
    """
    if not isinstance(format, Integer):
        value = format.dequantize(format.encode(w), w.shape[0])
        return w + jax.lax.stop_gradient(value - w)
    grid = spread(format.grids(w), format.rows_per_group(w.shape[0]), w.shape[0])
    zero = jax.lax.stop_gradient(grid.zero)
    code = jnp.clip(rounded(w / grid.scale) + zero, *format.limits)
    return grid.scale * (code - zero)


def _run(block: Callable, blocks: _Blocks, change: Values, opened: Opened, h: Array) -> Array:
    return quantized(block)(blocks.rounded(opened, change), h)


def _loss(
    block: Callable, blocks: _Blocks, change: Values, opened: Opened, h: Array, after: Array
) -> Array:
    return relative_error(_run(block, blocks, change, opened, h), after)
