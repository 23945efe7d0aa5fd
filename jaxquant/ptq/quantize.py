"""The driver: params, recipe, statistics -> params."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.statistics import Stats, seen
from jaxquant.core.arguments import check_arguments, differentiated
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.random_keys import Draw
from jaxquant.core.sites import Site
from jaxquant.core.tensor import QTensor
from jaxquant.durable.store import Finished
from jaxquant.methods.method import Method
from jaxquant.ptq.quantize_leaf import Counter, Done, LeafJob, moments_for
from jaxquant.ptq.shared_transforms import Inputs, Inspection
from jaxquant.recipes.recipe import Recipe, resolve
from jaxquant.rounding import Moments


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
) -> PyTree:
    """The same tree with `QTensor` leaves where the recipe says so.

    Args:
      params: tree of floating arrays.
      recipe: a `Recipe`, or one method for every weight the function contracts.
      stats: `calibrate`'s result; or `sites`' result; or None (the last axis is the output).
      key: randomness of methods that need it (rotations, k-means), a `jax.random.key`, no number;
        default `jax.random.key(0)`.
      inspect: what judges the candidates of a transform that is searched for, in place of the
        products' error; see `shared_transforms.Inspection`.
      transforms: arrays of input transforms that are known already: from `learn`, `learn_blocks`.
      progress: called with `Done` after each matrix.
      finished: by matrix, its packed arrays and those of its `Report`, "report.loss" and so on,
        and a digest of its weights, second moments, method and key: of others it is not taken.
        What is in it is not done again, what is done is put in it. A mapping that lives on disk
        (`durable.store.Folder`) makes a long run resumable.
    Raises:
      ValueError: the recipe does not resolve, weights are not finite, or a method needs
        statistics that are missing. Before any compute, but for the check of the weights. And if
        the result for a matrix is not finite.
    Warns:
      where the damping had to be raised.

    Under `jax.jit` and `jax.vmap` there are no values to look at: weights or statistics that are
    not finite give NaN, and so do rates planned from values (`trellis`), which need a call outside.
    `jax.eval_shape` gives the shapes of all.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize({"w": jnp.ones((64, 32)), "b": jnp.zeros(8)}, jq.rtn(bits=4))
    >>> q["w"].bits_per_weight, q["b"].shape
    (4.3125, (8,))
    """
    check_arguments(quantize, locals())
    _check_not_differentiated(params)
    found = stats.sites if isinstance(stats, Stats) else stats
    plan = resolve(recipe, params, found)
    for entry in plan.weights:
        _check_statistics(entry.path, entry.method, stats)
    draw = Draw.of(key)
    report = Counter(plan.matrices, progress)
    leaves = dict(path_leaves(params))
    known = stats if isinstance(stats, Stats) else None
    inputs = Inputs.of(plan.weights, found, leaves, known, inspect, transforms)
    new = {}
    for entry in plan.weights:
        moments = moments_for(entry.path, entry.method, stats)
        job = LeafJob(entry, draw, inputs, finished)
        new[entry.path] = job.run(leaves[entry.path], moments, report)
    return replace_leaves(params, new)


def quantize_array(
    w: Float[Array, "k n"],
    method: Method,
    gram: Float[Array, "k k"] | None = None,
    *,
    output_gram: Float[Array, "n n"] | None = None,
    inputs: Float[Array, "t k"] | None = None,
    key: Array | None = None,
) -> QTensor:
    """One matrix, y = x @ w.

    Args:
      w: [k, n], floating.
      method: from `rtn`, `gptq`, ...
      gram: [k, k] mean of x x^T; required by methods with feedback. By default that of `inputs`.
      output_gram: [n, n] mean of g g^T, g the loss gradient at y; required by two-sided ones.
      inputs: rows x; required by methods that fit transforms or scales to activations.
      key: randomness of methods that need it; default `jax.random.key(0)`.
    Raises:
      ValueError: shapes disagree, values are not finite, the group size does not divide k.

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
        raise ValueError(f"method {method.name!r} needs inputs=, [t, {w.shape[0]}]")
    needs = {"gram": method.needs_gram, "output_gram": method.needs_output}
    for name, given, size in (("gram", gram, w.shape[0]), ("output_gram", output_gram, w.shape[1])):
        if needs[name] and given is None:
            raise ValueError(f"method {method.name!r} needs {name}=, [{size}] squared")
        if given is not None and given.shape != (size, size):
            raise ValueError(f"{name} must be [{size}, {size}], got {list(given.shape)}")
    (entry,) = resolve(method, {"w": w}).weights
    moments = Moments(gram, output_gram)
    shared = Inputs.of([entry], None, {"w": w}, stats)
    job = LeafJob(entry, Draw.of(key), shared, {})
    return job.run(w, moments, Counter(1, None))


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
