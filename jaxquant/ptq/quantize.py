"""The quantization driver: from parameters, recipe and statistics to quantized parameters."""

import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.statistics import Stats, seen
from jaxquant.core.arguments import check_arguments, differentiated
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.random_keys import Draw
from jaxquant.core.shardings import (
    auto_axes_in_force,
    is_explicit,
    on_auto_axes,
    packed_sharding,
)
from jaxquant.core.sites import Site
from jaxquant.core.tensor import QTensor
from jaxquant.durable.store import Finished
from jaxquant.methods.method import Method
from jaxquant.ptq.quantize_leaf import Counter, Done, LeafJob
from jaxquant.ptq.round_stacked import Sums, planned
from jaxquant.ptq.shared_transforms import Inputs, Inspection
from jaxquant.recipes.recipe import Recipe, WeightEntry, resolve


def quantize(
    params: PyTree,
    recipe: Recipe | Method,
    stats: Stats | Mapping[str, Site] | None = None,
    *,
    key: Array | None = None,
    inspect: Inspection | None = None,
    transforms: Mapping[tuple[str, int], dict[str, Array]] | None = None,
    progress: Callable[[Done], None] | None = None,
    finished: Finished | None = None,
    first: int = 0,
) -> PyTree:
    """Return `params` with every weight that the recipe covers replaced by a `QTensor`.

    `quantize` itself may be traced. Under `jax.jit` and `jax.vmap` values cannot be checked, and
    non-finite weights or statistics give NaN. Methods that plan bit rates from values (`trellis`)
    always give NaN when traced; use them outside of `jit`. `jax.eval_shape` gives the shapes for
    every method.

    Args:
      params: tree of floating-point arrays.
      recipe: a `Recipe`, or one `Method`, which then applies to every weight that is an operand
        of a matmul according to `stats`.
      stats: the result of `calibrate`, which methods with error feedback or fitted transforms need,
        or of `sites`, which tells how the function uses each weight. If None, the use is guessed:
        the last axis of each weight is taken as the output and the one before it as the input,
        which is wrong for an Equinox `Linear` and for attention weights with an axis of heads.
      key: PRNG key for methods that draw random numbers (rotations, k-means), such as
        `jax.random.key(1)`; an integer seed is refused. Default: `jax.random.key(0)`.
      inspect: function that scores the candidates when a transform is chosen by search; see
        `ptq.shared_transforms.Inspection`. By default the score is the error of the outputs of the
        matmuls.
      transforms: arrays of input transforms that were learned before, as `jaxquant.tuning.learn`
        and `learn_blocks` return them. They are used as given and not fitted again.
      progress: called with a `ptq.quantize_leaf.Done` after each matrix.
      finished: store of finished matrices. It maps the name of each matrix to its packed arrays,
        the fields of its `Report` ("report.loss", ...) and a digest of its weights, second moments,
        method and key. A matrix with a matching digest is taken from the store; every other one is
        computed and added. A mapping on disk (`jaxquant.durable.store.Folder`) makes a long run
        resumable.
      first: for `params` that hold only the layers from number `first` on of larger stacks, as
        when a model is quantized layer by layer: their names, keys and indices are then those that
        they have in the whole stacks, and so is the result. Leaves without leading axes have no
        layers, and are not concerned. Methods that plan rates over all layers (`trellis`) need the
        planned method as recipe. Default: 0.
    Returns:
      The tree, with `QTensor` leaves for the quantized weights and the other leaves unchanged. A
      weight that is on a mesh gives a quantized weight on the same mesh, split in the same way. If
      that would break groups, words or tiles of codes, the compiler chooses the sharding; on
      Explicit axes, this raises ValueError instead.
    Raises:
      ValueError: the recipe does not fit the tree, weights or statistics are not finite, a method
        needs statistics that are missing, or the result for a matrix is not finite. The recipe is
        checked, and missing statistics are detected, before any computation.
    Warns:
      If the damping of a second moment had to be raised, statistics are all zero, the scales of the
      format cannot represent the smallest or the largest weights, a single `Method` passed as the
      recipe leaves weights unquantized, a weight on Auto axes is split so that its packed arrays
      cannot be, or `stats` is None and the guess is likely to be wrong.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> fn = lambda p, x: x @ p["w"].T + p["b"]
    >>> params, x = {"w": jnp.ones((32, 64)), "b": jnp.zeros(32)}, jnp.ones((2, 64))
    >>> q = jq.quantize(params, jq.rtn(bits=4), jq.sites(fn, params, x))
    >>> q["w"], q["b"].shape
    (QTensor(float32[32, 64], rtn, Integer(bits=4, group_size=64), 4.312 bits per weight), (32,))
    >>> jq.quantized(fn)(q, x).shape
    (2, 32)
    """
    check_arguments(quantize, locals())
    _check_not_differentiated(params)
    found = stats.sites if isinstance(stats, Stats) else stats
    plan = resolve(recipe, params, found)
    for entry in plan.weights:
        _check_statistics(entry.path, entry.method, stats)
    report = Counter(plan.matrices, progress)
    given = dict(path_leaves(params))
    for entry in plan.weights:
        _check_split(entry, given[entry.path])
    (leaves, stats, key), mesh = on_auto_axes((given, stats, key))
    known = stats if isinstance(stats, Stats) else None
    new = {}
    with auto_axes_in_force(mesh):
        draw = Draw.of(key)
        inputs = Inputs.of(plan.weights, found, leaves, known, inspect, transforms, first)
        for entry in plan.weights:
            sums = Sums.of(entry.path, entry.method, stats)
            job = LeafJob(entry, draw, inputs, finished, first)
            packed = job.run(leaves[entry.path], sums, report)
            new[entry.path] = _placed(entry.path, packed, given[entry.path])
    return replace_leaves(params, new)


def importance(
    params: PyTree,
    recipe: Recipe | Method,
    stats: Stats | Mapping[str, Site] | None = None,
    *,
    key: Array | None = None,
    inspect: Inspection | None = None,
    first: int = 0,
) -> dict[str, Float[np.ndarray, "blocks"]]:
    """Return what formats that plan their rates need to know of each weight.

    `quantize` plans the rates of a whole stack of layers. A stack that is quantized a few layers at
    a time needs a pass before that, over all of it: the sum of the parts' importance is that of
    the whole, and `planned` gives the method with which `quantize` is then called.

    Args:
      params, recipe, stats, key, inspect, first: as in `quantize`.
    Returns:
      The loss per unit of relative distortion of each block of rows, float64, by the path of each
      weight whose format has `plans`.
    Raises:
      ValueError: as in `quantize`.
    """
    found = stats.sites if isinstance(stats, Stats) else stats
    plan = resolve(recipe, params, found)
    (leaves, stats, key), mesh = on_auto_axes((dict(path_leaves(params)), stats, key))
    known = stats if isinstance(stats, Stats) else None
    out = {}
    with auto_axes_in_force(mesh):
        draw = Draw.of(key)
        inputs = Inputs.of(plan.weights, found, leaves, known, inspect, first=first)
        for entry in (e for e in plan.weights if e.method.format.plans):
            _check_statistics(entry.path, entry.method, stats)
            job = LeafJob(entry, draw, inputs, None, first)
            sums = Sums.of(entry.path, entry.method, stats)
            out[entry.path] = job.importance(leaves[entry.path], sums)
    return out


def quantize_array(
    w: Float[Array, "k n"],
    method: Method,
    gram: Float[Array, "k k"] | None = None,
    *,
    output_gram: Float[Array, "n n"] | None = None,
    inputs: Float[Array, "t k"] | None = None,
    key: Array | None = None,
) -> QTensor:
    """Quantize one matrix w of a product y = x @ w.

    Args:
      w: matrix [k, n] of a floating-point dtype.
      method: the method, as made by `rtn`, `gptq`, ...
      gram: [k, k] mean of x x^T, required by methods with error feedback. Default: computed from
        `inputs`.
      output_gram: [n, n] mean of g g^T, where g is the gradient of the loss at y; required by
        two-sided methods.
      inputs: [t, k] rows x, required by methods that fit transforms or scales to activations.
      key: PRNG key for methods that draw random numbers. Default: `jax.random.key(0)`.
    Returns:
      The packed matrix.
    Raises:
      ValueError: shapes disagree, values are not finite, the group size does not divide k, or
        something that the method needs is missing.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> jq.quantize_array(jnp.ones((64, 32)), jq.rtn(bits=2, group_size=32)).bits_per_weight
    2.5625
    """
    check_arguments(quantize_array, locals())
    if w.ndim != 2:
        raise ValueError(f"expected a matrix [k, n], got shape {w.shape}")
    _check_not_differentiated(w)
    stats = None
    if inputs is not None:
        if inputs.ndim != 2 or inputs.shape[1] != w.shape[0]:
            raise ValueError(f"inputs must be [t, {w.shape[0]}], got {list(inputs.shape)}")
        stats = seen(inputs.astype(jnp.float32), w.shape[1])
        gram = stats.gram("w") if gram is None else gram
    elif method.needs_channels or method.needs_sample:
        raise ValueError(f"method {method.name!r} needs inputs=, an array [t, {w.shape[0]}]")
    needs = {"gram": method.needs_gram, "output_gram": method.needs_output}
    for name, given, size in (("gram", gram, w.shape[0]), ("output_gram", output_gram, w.shape[1])):
        if needs[name] and given is None:
            raise ValueError(f"method {method.name!r} needs {name}=, an array [{size}, {size}]")
        if given is not None and given.shape != (size, size):
            raise ValueError(f"{name} must be [{size}, {size}], got {list(given.shape)}")
    given = w
    (w, gram, output_gram, key), mesh = on_auto_axes((w, gram, output_gram, key))
    (entry,) = resolve(method, {"w": w}).weights
    _check_split(entry, given)
    with auto_axes_in_force(mesh):
        shared = Inputs.of([entry], None, {"w": w}, stats)
        job = LeafJob(entry, Draw.of(key), shared, {})
        packed = job.run(w, Sums(gram, output_gram), Counter(1, None))
        return _placed("w", packed, given)


def _split(w: Array) -> NamedSharding | None:
    """Return how an array is split over the devices of a mesh, or None."""
    place = None if isinstance(w, jax.core.Tracer) else getattr(w, "sharding", None)
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        return None
    return place if place.mesh.size > 1 else None


def _check_split(entry: WeightEntry, w: Array) -> None:
    """Raise ValueError if the packed weight cannot be split over Explicit axes as w is."""
    place = _split(w)
    if place is None or not is_explicit(place.mesh):
        return
    method, (*batch, k, n) = entry.method, entry.matrix
    if method.format.plans:
        method = planned(method, np.ones(method.stored(k, n)[0] // method.format.block))
    stack = lambda a: jax.ShapeDtypeStruct((*batch, *a.shape), a.dtype)
    shapes = jax.tree.map(stack, method.format.shapes(*method.stored(k, n)))
    packed = QTensor(
        shapes, method.format, entry.view, w.dtype.name, input=method.input, output=method.output
    )
    try:
        packed_sharding(packed, place.mesh, place.spec)
    except ValueError as error:
        raise ValueError(f"{entry.path}: {error}") from None


def _placed(path: str, packed: QTensor, w: Array) -> QTensor:
    """Return a packed weight on the mesh of the weight w, if it lies on one, and split as it is."""
    place = _split(w)
    if place is None:
        return packed
    try:
        return jax.device_put(packed, packed_sharding(packed, place.mesh, place.spec))
    except ValueError as error:
        if is_explicit(place.mesh):
            raise ValueError(f"{path}: {error}") from None
        warnings.warn(
            f"{path} stays where the compiler of the rounding put it, because its packed arrays "
            f"cannot be split as the weight is: {error}",
            stacklevel=3,
        )
        return packed


def _check_not_differentiated(params: PyTree) -> None:
    if any(differentiated(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "quantizing has no gradient: train with jaxquant.qat or jaxquant.latent, which round "
            "in every step, or differentiate jaxquant.quantized(fn) in its other arguments"
        )


def _check_statistics(path: str, method: Method, stats: Stats | Mapping[str, Site] | None) -> None:
    needs = {
        "gram": method.needs_gram,
        "output": method.needs_output,
        "magnitude": method.needs_channels,
        "extreme": method.needs_sample,
    }
    if not any(needs.values()):
        return
    if not isinstance(stats, Stats):
        raise ValueError(
            f"method {method.name!r} for {path!r} needs statistics: pass the result of "
            f"calibrate(fn, params, batches)"
        )
    for name, needed in needs.items():
        if needed:
            stats.kept(path, name)
