"""Learning input transforms so that rounded weights and inputs reproduce the float model.

Learning goes block by block, which is cheap, or end to end, which may start from there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.dispatch import quantized
from jaxquant.core.paths import path_leaves, replace_leaves, stack_size
from jaxquant.core.protocols import Transform
from jaxquant.core.random_keys import Draw
from jaxquant.core.tensor import QTensor, by_kind
from jaxquant.durable.store import Finished
from jaxquant.formats import Dense
from jaxquant.methods.method import Method
from jaxquant.ptq.shared_transforms import Inputs
from jaxquant.recipes.recipe import Recipe, WeightEntry, resolve
from jaxquant.tuning.losses import divergence, relative_error
from jaxquant.tuning.trainable import Opened, Values
from jaxquant.tuning.trainer import Healing, Progress, Trainer

Transforms = Mapping[tuple[str, int], dict[str, Array]]  # (leader of an input, index) -> arrays
END_TO_END = Healing(steps=60, learning_rate=3e-3, validate_every=20)
BLOCKS = Healing(steps=30, learning_rate=5e-3, validate_every=10)


def learn(
    fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    recipe: Recipe | Method,
    stats: Stats,
    sequences: np.ndarray,
    healing: Healing = END_TO_END,
    *,
    transforms: Transforms | None = None,
    validation: np.ndarray | None = None,
    key: Array | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Transforms:
    """Learn the arrays of a recipe's learnable input transforms (`Kronecker`) end to end.

    In every step, weights are transformed, rounded to nearest and multiplied by rounded inputs,
    with straight-through gradients. The loss is the KL divergence of the output of fn from its
    output on floats.

    Args:
      fn: fn(params, x [batch, ...]) -> logits [..., vocabulary].
      params: tree of floating-point arrays.
      recipe, stats, key: as `quantize` will get them.
      sequences: training inputs [N, ...].
      healing: training settings.
      transforms: arrays to start from, as `learn_blocks` returns them. None: the fitted arrays.
      validation: held-out inputs; the arrays with the least loss on them are returned. None: the
        last ones are returned.
      progress: called with a `tuning.trainer.Progress` after every update.
      finished: store of the training state, as in `heal`.
    Returns:
      The arrays, for the argument `transforms` of `quantize`.
    Raises:
      ValueError: no transform of the recipe can be learned, there are fewer sequences than one
        batch needs, or the training raises as in `heal`.
    Source:
      Sun et al. 2024, arXiv:2410.09426, learn by blocks only.
    """
    check_arguments(learn, locals())
    weights = _Weights.of(params, recipe, stats, transforms)
    opened = weights.opened(params, Draw.of(key))

    def loss(change: Values, opened: Opened, x: Array) -> Array:
        wanted = jax.lax.stop_gradient(fn(opened.params[0], x))
        return jnp.mean(divergence(quantized(fn)(weights.rounded(opened, change), x), wanted))

    change = Trainer(loss, healing).fit_sequences(
        opened, sequences, validation, name="learning", progress=progress, finished=finished
    )
    return weights.found(opened, change)


def learn_blocks(
    block: Callable[[PyTree, Array], Array],
    params: PyTree,
    name: str,
    recipe: Recipe | Method,
    stats: Stats,
    hidden: Float[np.ndarray, "N ..."],
    healing: Healing = BLOCKS,
    *,
    key: Array | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Transforms:
    """Learn as `learn` does, one stacked block after another, each to match its output on floats.

    The loss is the squared error of a block's output vectors, relative to the energy of each. The
    inputs of a block are the outputs of the rounded blocks before it.

    Args:
      block: block(parameters of one block, h [batch, ...]) -> h.
      params: tree of floating-point arrays, with the stacked blocks in `params[name]`.
      name: key of the blocks.
      recipe, stats, key, progress, finished: as in `learn`.
      hidden: inputs of the first block; the last eighth is held out.
      healing: training settings of one block.
    Returns:
      The arrays, as `learn` returns them.
    Raises:
      ValueError: no transform of the blocks can be learned, or there is only one input.
    Source:
      Sun et al. 2024, arXiv:2410.09426. This implementation differs from the paper, which feeds a
      block the outputs of the floating-point blocks before it.
    """
    check_arguments(learn_blocks, locals())
    weights = _Weights.of(params, recipe, stats, None, f"{name}/")
    run = lambda change, opened, h: quantized(block)(weights.rounded(opened, change), h)
    loss = lambda change, opened, h, after: relative_error(run(change, opened, h), after)
    trainer, after_rounding, plain = Trainer(loss, healing), jax.jit(run), jax.jit(block)
    of_block = lambda i: jax.tree.map(lambda a: a[i], params[name])
    found: dict[tuple[str, int], dict[str, Array]] = {}

    def closed(i: int, opened: Opened, change: Values) -> Callable[[Array], Array]:
        found.update(weights.found(opened, change, i))
        return partial(after_rounding, change, opened)

    trainer.fit_blocks(
        stack_size(params[name]), hidden, lambda i: weights.opened(of_block(i), Draw.of(key), i),
        lambda i: partial(plain, of_block(i)), closed,
        name="learning", progress=progress, finished=finished,
    )  # fmt: skip
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Weights:
    """The weights to round, with their methods and the transforms that they share.

    Attributes:
      inputs: the shared inputs and transforms.
      prefix: only weights whose path has this prefix are used; "" for all.
    """

    inputs: Inputs
    prefix: str

    @staticmethod
    def of(
        params: PyTree,
        recipe: Recipe | Method,
        stats: Stats,
        known: Transforms | None,
        prefix: str = "",
    ) -> "_Weights":
        todo = resolve(recipe, params, stats.sites).weights
        leaves = dict(path_leaves(params))
        weights = _Weights(Inputs.of(todo, stats.sites, leaves, stats, known=known), prefix)
        if not weights.learning:
            raise ValueError(
                "nothing to learn: the recipe has no transform that can be learned (Kronecker)"
            )
        return weights

    @property
    def members(self) -> list[WeightEntry]:
        every = [m for group in self.inputs.members.values() for m in group]
        return [m for m in every if m.path.startswith(self.prefix)]

    @property
    def learning(self) -> dict[str, Transform]:
        """The transforms that are learned, by leader."""
        sides = {self.inputs.leader[m.path]: m.method.input for m in self.members}
        return {leader: side for leader, side in sides.items() if side and side.learns}

    def _places(self, entry: WeightEntry, i: int | None) -> range:
        """Return the indices of a weight's matrices: all of them, or those of block i."""
        batch = entry.matrix[:-2]
        if i is None:
            return range(math.prod(batch))
        each = math.prod(batch[1:])
        return range(i * each, (i + 1) * each)

    def opened(self, tree: PyTree, draw: Draw, i: int | None = None) -> Opened:
        """Return the tree or block i in floats, with its matrices, fitted transforms and start."""
        fitted: dict[str, PyTree] = {}
        matrices = {}
        for entry in self.members:
            path, places = entry.path, self._places(entry, i)
            leader = self.inputs.leader[path]
            every = entry.matrices(self.inputs.leaves[path])
            matrices[path] = every[places.start : places.stop]
            if entry.method.input is not None and leader not in fitted:
                found = [self._fitted(entry, leader, j, draw) for j in places]
                fitted[leader] = jax.tree.map(lambda *a: jnp.stack(a), *found)
        latent = lambda leader, side: jax.vmap(side.latent)(fitted[leader])
        start = {leader: latent(leader, side) for leader, side in self.learning.items()}
        return Opened((tree, matrices, fitted), start)

    def _fitted(self, entry: WeightEntry, leader: str, j: int, draw: Draw) -> dict[str, Array]:
        known = self.inputs.arrays(leader, j, draw.of_input(leader, j))
        if known is None:
            raise ValueError(
                f"{entry.path}: when transforms are learned, all weights of an input must "
                f"share one transform or have none, but {entry.method.input} belongs to "
                "one weight alone"
            )
        return by_kind(known).input

    def arrays(self, opened: Opened, change: Values) -> dict[str, dict[str, Array]]:
        """Return, by leader, the stacked transforms after the change."""
        fitted = opened.params[2]
        return {
            leader: each(side.learned, fitted[leader], change[leader])
            for leader, side in self.learning.items()
        }

    def found(self, opened: Opened, change: Values, i: int | None = None) -> Transforms:
        """Return the transforms after the change, by leader and index."""
        out = {}
        for leader, arrays in self.arrays(opened, change).items():
            for at, j in enumerate(self._places(self.inputs.members[leader][0], i)):
                out[leader, j] = {f"input.{name}": a[at] for name, a in arrays.items()}
        return out

    def rounded(self, opened: Opened, change: Values) -> PyTree:
        """Return the tree with rounded weights that round their inputs."""
        tree, matrices, fitted = opened.params
        arrays = fitted | self.arrays(opened, change)
        inside = lambda path: path.removeprefix(self.prefix)
        shapes = {path: w.shape for path, w in path_leaves(tree)}
        new = {}
        for entry in self.members:
            method, own = entry.method, arrays.get(self.inputs.leader[entry.path], {})
            codes = each(partial(_rounded, method), matrices[entry.path], own)
            view, order = entry.view, entry.order
            batch = entry.matrix[:-2][len(order) - len(shapes[inside(entry.path)]) :]
            stacked = lambda a, batch=batch: a.reshape(*batch, *a.shape[1:])
            new[inside(entry.path)] = QTensor(
                {"codes": stacked(codes)}, Dense(), view, codes.dtype.name, method.name,
                method.input, activations=method.activations,
                input_data=jax.tree.map(stacked, own),
            )  # fmt: skip
        return replace_leaves(tree, new)


def each(fn: Callable, *stacked: PyTree) -> PyTree:
    """Map fn over the leading axis sequentially: batched inverses can hang XLA 0.10 on the CPU.

    Args:
      fn: function of one matrix, or of one entry of every argument.
      stacked: trees of arrays with a common leading axis.
    Returns:
      The stacked results.

    >>> each(lambda a, b: a + b["x"], jnp.ones(2), {"x": jnp.arange(2.0)}).tolist()
    [1.0, 2.0]
    """
    return jax.lax.map(lambda one: fn(*one), stacked)


def _rounded(
    method: Method, w: Float[Array, "k n"], arrays: dict[str, Array]
) -> Float[Array, "s n"]:
    if method.input is not None:
        w = method.input.inverse(w.T, arrays).T
    return method.format.nearest(w)
