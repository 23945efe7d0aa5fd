"""Learning the rotation of the residual stream that makes the rounded model closest to the floats.

During training the stream itself is not rotated. Weights that read it rotate their inputs, which
are rounded there, and weights that write it rotate their outputs back. This is the function that
`rotate_residual` folds, but neither the embedding nor the head nor any other weight that is not
rounded is multiplied by the rotation in a step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.dispatch import quantized
from jaxquant.core.paths import matches, path_leaves, replace_leaves
from jaxquant.core.protocols import Transform
from jaxquant.core.random_keys import Draw
from jaxquant.core.sites import Site
from jaxquant.core.tensor import Arrays, QTensor, by_kind
from jaxquant.durable.store import Finished
from jaxquant.formats import Dense
from jaxquant.methods.method import Method
from jaxquant.ptq.residual_rotation import Residual, rotate_residual
from jaxquant.ptq.shared_transforms import Inputs
from jaxquant.recipes.recipe import Recipe, WeightEntry, resolve
from jaxquant.transforms import Channels
from jaxquant.tuning.cayley import Cayley
from jaxquant.tuning.learned_transforms import each
from jaxquant.tuning.losses import divergence
from jaxquant.tuning.trainable import Opened, Values
from jaxquant.tuning.trainer import Healing, Progress, Trainer
from pallas_kernels import activations as forms

ROTATING = Healing(steps=100, learning_rate=0.002, batch_size=2, validate_every=10)
_STREAM, _ROTATION = "residual", "rotation"  # names of the trained value


def learn_rotation(
    fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    residual: Residual,
    recipe: Recipe | Method,
    sequences: np.ndarray,
    healing: Healing = ROTATING,
    *,
    start: Float[Array, "d d"],
    stats: Stats | Mapping[str, Site] | None = None,
    round_weights: bool = True,
    key: Array | None = None,
    validation: np.ndarray | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Float[Array, "d d"]:
    """Learn the R for `rotate_residual` that makes the rounded model closest to the float model.

    Inputs are rounded as the methods of the recipe prescribe, after their transforms; weights are
    rounded to nearest whatever the method's rounder; gradients are straight-through. The loss is
    the mean KL divergence from the float model's predictions. It is minimized by `Cayley`, which
    keeps R orthonormal.

    Args:
      fn: fn(params, x [batch, ...]) -> logits [..., vocabulary]; run under `quantized`.
      params: tree of floating-point arrays, not rotated.
      residual: which leaves read and write the stream.
      recipe, key: as `quantize` will get them for the rotated tree. Weights that read the stream
        then need no rotation of their own; others (after an attention or an activation) may have
        one.
      sequences: training inputs [N, ...].
      healing: training settings; the learning rate is an angle, see `Cayley`.
      start: orthonormal matrix [d, d] to begin with, for example a random Hadamard matrix.
      stats: result of `sites`, or if transforms are fitted to inputs, of `calibrate`, for the tree
        rotated by `start`. The transforms stay as fitted to it.
      round_weights: whether weights are rounded in training. SpinQuant sets False if error feedback
        follows.
      validation: held-out inputs; the rotation with the least loss on them is returned, `start`
        included. None: the last rotation is returned.
      progress: called with a `tuning.trainer.Progress` after every update.
      finished: store of the training state, as in `heal`.
    Returns:
      R, orthonormal to 1e-6.
    Raises:
      ValueError: nothing is rounded that a rotation changes; static scales or output transforms are
        in use; or `rotate_residual`, `resolve` or the training raises.
    Source:
      SpinQuant, Liu et al. 2024, arXiv:2405.16406. This implementation differs from the paper: the
      loss is the KL divergence from the float model, not the cross-entropy of the text; no rotation
      of the values of attention heads (R2) is learned.

    >>> import jaxquant as jq
    >>> p = {"in": jnp.eye(8) * 4, "gain": jnp.arange(1.0, 9), "out": jnp.eye(8)}
    >>> fn = lambda p, x: (x @ p["in"] / jnp.linalg.norm(x @ p["in"])) * p["gain"] @ p["out"]
    >>> x = np.random.default_rng(0).normal(size=(4, 1, 8)).astype(np.float32)
    >>> recipe = Recipe([("out", jq.rtn(4, "channel")), ("*", jq.KEEP)])
    >>> stream = Residual(["in"], {"gain": ["out"]})
    >>> r = learn_rotation(fn, p, stream, recipe, x, Healing(2), start=jnp.eye(8))
    >>> bool(jnp.allclose(r @ r.T, jnp.eye(8), atol=1e-6))
    True
    """
    check_arguments(learn_rotation, locals())
    start = jnp.asarray(start, jnp.float32)
    turned = rotate_residual(params, residual, start)
    seen = stats if isinstance(stats, Stats) else None
    known = stats.sites if isinstance(stats, Stats) else stats
    todo = resolve(recipe, turned, known).weights
    stream = _Stream.of(todo, residual, len(start), round_weights)
    for entry in todo:
        _check(entry.path, entry.method, round_weights, seen)
    inputs = Inputs.of(todo, known, dict(path_leaves(turned)), seen)
    fitted = {m.path: _fitted(m, inputs, Draw.of(key)) for m in todo}
    del turned, inputs
    folded = rotate_residual(params, residual, jnp.eye(len(start)))  # folds the gains only
    opened = Opened((folded, fitted), {_STREAM: {_ROTATION: start}})
    trainer = Trainer(partial(_loss, fn, stream), healing, Cayley(healing))
    change = trainer.fit_sequences(
        opened, sequences, validation, name="rotation", progress=progress, finished=finished
    )
    return change[_STREAM][_ROTATION]


@dataclasses.dataclass(frozen=True, eq=False)
class _Stream:
    """The weights that are rounded, and which of them read or write the stream."""

    members: list[WeightEntry]
    reads: set[str]
    writes: set[str]
    round_weights: bool

    @staticmethod
    def of(
        members: list[WeightEntry], residual: Residual, d: int, round_weights: bool
    ) -> "_Stream":
        """Build the stream and check it; see `learn_rotation`."""
        readers = [glob for globs in residual.reads.values() for glob in globs]
        named = lambda m, globs: any(matches(m.path, glob) for glob in globs)
        reads = [m for m in members if named(m, readers)]
        writes = [m for m in members if named(m, residual.writes)]
        stored = [m.method.format for m in (*reads, *writes)]
        weights = round_weights and any(not isinstance(format, Dense) for format in stored)
        if not weights and all(m.method.activations is None for m in reads):
            raise ValueError(
                "nothing to learn: neither the inputs that read the residual stream nor, "
                "in training, the weights on it are rounded; set activations to a form "
                "that is rounded (--activations int4)"
            )
        for wanted, axis, ms in (("reads", -2, reads), ("writes to", -1, writes)):
            for entry in ms:
                if entry.matrix[axis] != d:
                    raise ValueError(
                        f"{entry.path} {wanted} the residual stream of {d} channels, but as a "
                        f"matrix it is {list(entry.matrix[-2:])}"
                    )
        paths = lambda ms: {m.path for m in ms}
        return _Stream(members, paths(reads), paths(writes), round_weights)

    def rounded(self, params: PyTree, fitted: dict[str, dict[str, Array]], r: Array) -> PyTree:
        """Return the tree with rotated and rounded weights that round their inputs."""
        leaves = dict(path_leaves(params))
        new = {}
        for entry in self.members:
            path = entry.path
            new[path] = self._weight(entry, leaves[path], fitted[path], r)
        return replace_leaves(params, new)

    def _weight(
        self, entry: WeightEntry, leaf: Array, own: dict[str, Array], r: Float[Array, "d d"]
    ) -> QTensor:
        method = entry.method
        reads, writes = entry.path in self.reads, entry.path in self.writes
        format = method.format if self.round_weights else Dense()
        floats = isinstance(format, Dense)
        back = reads and floats and method.input is None
        side = _Turn(method.input) if reads else method.input

        def one(w: Float[Array, "k n"], own: dict[str, Array]) -> Arrays:
            arrays = {**own, "turn": r} if reads else own
            if side is not None and not back:
                w = side.inverse(w.T, arrays).T
            if writes and not floats:
                w = w @ r
            data = {"codes": format.nearest(w)} | ({"turn": r} if back else {})
            return Arrays(data, arrays, {"turn": r} if writes and not floats else {}, {})

        stacked, batch = each(one, entry.matrices(leaf), own), entry.matrix[:-2]
        arrays = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), stacked)
        return QTensor(
            arrays.data,
            _Back() if back else Dense(),
            entry.view,
            leaf.dtype.name,
            method.name,
            side,
            _Turn() if writes and not floats else None,
            activations=method.activations,
            input_data=arrays.input,
            output_data=arrays.output,
        )


@dataclasses.dataclass(frozen=True)
class _Turn(Transform):
    """The transform x -> x R, R orthonormal in the array "turn", then another transform."""

    then: Transform | None = None

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Raise ValueError, since the rotation is learned and not fitted."""
        raise ValueError(
            "a learned rotation cannot be fitted to channels: it comes from learn_rotation"
        )

    def size(self, n: int) -> int:
        """Return the number of channels after the transform."""
        return n if self.then is None else self.then.size(n)

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... s"]:
        """Return x A for row vectors x."""
        x = x @ arrays["turn"].astype(x.dtype)
        return x if self.then is None else self.then.apply(x, arrays)

    def transposed(
        self, y: Float[Array, "... s"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """Return y A^T."""
        y = y if self.then is None else self.then.transposed(y, arrays, n)
        return y @ arrays["turn"].T.astype(y.dtype)

    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... s"]:
        """Return x A^-T, which weights become if the vectors that they multiply become x A."""
        x = x @ arrays["turn"].astype(x.dtype)
        return x if self.then is None else self.then.inverse(x, arrays)


@dataclasses.dataclass(frozen=True)
class _Back(Dense):
    """Unrotated floats, whose inputs are rotated back after rounding.

    Computing R^T W instead would cost more than this does for all tokens.
    """

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        x = forms.rounded(x, activations)
        return super().matmul(x @ data["turn"].T.astype(x.dtype), data)


def _check(path: str, method: Method, round_weights: bool, stats: Stats | None) -> None:
    if method.activations is not None and method.activations.static:
        raise ValueError(
            f"{path}: static scales can only be computed once the rotation is known: "
            "learn it with one scale per token (activations without static), then "
            "quantize with static scales"
        )
    if round_weights and method.output is not None:
        raise ValueError(
            f"{path}: round_weights=True does not allow an output transform, got "
            f"{method.output}; use round_weights=False"
        )
    side = method.input
    if side is not None and (side.needs_channels or side.needs_sample) and stats is None:
        raise ValueError(
            f"{path}: {method.input} is fitted to inputs; pass the statistics of the tree rotated "
            f"by `start`, calibrate(fn, rotate_residual(params, residual, start), batches)"
        )


def _fitted(entry: WeightEntry, inputs: Inputs, draw: Draw) -> dict[str, Array]:
    """Return the arrays of a weight's own transform for all matrices of its stack."""
    method, found = entry.method, []
    if method.input is None:
        return {}
    leader = inputs.leader[entry.path]
    for i, w in enumerate(entry.matrices(inputs.leaves[entry.path])):
        drawn = draw.of_input(leader, i)
        known = inputs.arrays(entry.path, i, drawn)
        own = method.input.fit(Channels(w.T), drawn) if known is None else by_kind(known).input
        found.append(own)
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *found)


def _loss(fn: Callable, stream: _Stream, change: Values, opened: Opened, x: Array) -> Array:
    params, fitted = opened.params
    student = quantized(fn)(stream.rounded(params, fitted, change[_STREAM][_ROTATION]), x)
    return jnp.mean(divergence(student, jax.lax.stop_gradient(fn(params, x))))
