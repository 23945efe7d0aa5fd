"""The driver: params, recipe, statistics -> params."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.calibrate import Stats
from jaxquant.methods import Method
from jaxquant.paths import path_leaves, replace_leaves
from jaxquant.recipe import Entry, Recipe, leaf_bytes, resolve
from jaxquant.sites import Site, is_weight
from jaxquant.standin import is_standin
from jaxquant.tensor import QTensor


@dataclasses.dataclass(frozen=True)
class Done:
    """Report on one quantized leaf.

    Attributes:
      index, total: which of how many.
      damping: largest fraction of mean(diag H) that its matrices needed; 0 without feedback.
      dead: input channels that calibration never saw active, over all its matrices.
    """

    path: str
    index: int
    total: int
    bits_per_weight: float
    damping: float
    dead: int
    seconds: float


def quantize(
    params: Any,
    recipe: Recipe | Method,
    stats: Stats | Mapping[str, Site] | None = None,
    *,
    key: Array | None = None,
    progress: Callable[[Done], None] | None = None,
) -> Any:
    """The same tree with `QTensor` leaves where the recipe says so.

    Args:
      params: tree of floating arrays.
      recipe: a `Recipe`, or one method for every weight the function contracts.
      stats: `calibrate`'s result; or `sites`' result; or None (the last axis is the output).
      key: randomness of methods that need it; none of today's does.
      progress: called with `Done` after each leaf.
    Raises:
      ValueError: the recipe does not resolve, weights are not finite, or a method needs
        statistics that are missing. Before any compute, but for the check of the weights.
    Warns:
      where the damping had to be raised.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize({"w": jnp.ones((64, 32)), "b": jnp.zeros(8)}, jq.rtn(bits=4))
    >>> q["w"].bits_per_weight, q["b"].shape
    (4.3125, (8,))
    """
    del key
    found = stats.sites if isinstance(stats, Stats) else stats
    plan = resolve(recipe, params, found)
    todo = [(e, e.method) for e in plan.entries if isinstance(e.method, Method)]
    grams = {e.path: _gram_of(e.path, method, stats) for e, method in todo}
    leaves = dict(path_leaves(params))
    new = {}
    for i, (entry, method) in enumerate(todo):
        start = time.monotonic()
        gram = grams[entry.path]()
        tensor, report = _quantize_leaf(leaves[entry.path], entry, method, gram)
        new[entry.path] = tensor
        seconds = time.monotonic() - start
        done = Done(entry.path, i + 1, len(todo), tensor.bits_per_weight, *report, seconds)
        _warn(done, method, entry)
        if progress is not None:
            progress(done)
    return replace_leaves(params, new)


def _gram_of(
    path: str, method: Method, stats: Stats | Mapping[str, Site] | None
) -> Callable[[], Array | None]:
    """How to get the mean of x x^T of a weight; made when asked for, one at a time."""
    if not method.rounder.needs_gram:
        return lambda: None
    if not isinstance(stats, Stats):
        raise ValueError(
            f"method {method.name!r} for {path!r} needs statistics: pass the result of "
            f"calibrate(fn, params, batches)"
        )
    stats.check(path)
    return partial(stats.gram, path)


def quantize_array(
    w: Float[Array, "k n"], method: Method, gram: Float[Array, "k k"] | None = None
) -> QTensor:
    """One matrix, y = x @ w.

    Args:
      w: [k, n], floating.
      method: from `rtn`, `gptq`, ...
      gram: [k, k] mean of x x^T; required by methods with feedback.
    Raises:
      ValueError: shapes disagree, values are not finite, the group size does not divide k.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> jq.quantize_array(jnp.ones((64, 32)), jq.rtn(bits=2, group_size=32)).bits_per_weight
    2.5625
    """
    if not isinstance(method, Method):
        raise ValueError(f"expected a method, such as gptq(bits=4), got {method!r}")
    if w.ndim != 2:
        raise ValueError(f"expected a matrix [k, n], got shape {w.shape}")
    if method.rounder.needs_gram and gram is None:
        raise ValueError(
            f"method {method.name!r} needs gram=, the mean of x x^T, [{w.shape[0]}] squared"
        )
    if gram is not None and gram.shape != (w.shape[0], w.shape[0]):
        raise ValueError(f"gram must be [{w.shape[0]}, {w.shape[0]}], got {list(gram.shape)}")
    (entry,) = resolve(method, {"w": w}).entries
    tensor, report = _quantize_leaf(w, entry, method, gram)
    _warn(Done("w", 1, 1, tensor.bits_per_weight, *report, 0.0), method, entry)
    return tensor


def _quantize_leaf(
    w: Array, entry: Entry, method: Method, gram: Array | None
) -> tuple[QTensor, tuple[float, int]]:
    """All matrices of a leaf, one after another through one compiled program."""
    view, order = entry.form
    *batch, k, n = entry.matrix
    if gram is not None and gram.shape != (*batch, k, k):
        raise ValueError(
            f"{entry.path}: statistics of shape {list(gram.shape)}, expected {[*batch, k, k]}; "
            f"calibrate the function that uses this tree"
        )
    # Under eval_shape there are no values to judge; what is asked of jnp tells, not w's own type.
    abstract = isinstance(jnp.isfinite(w), jax.core.Tracer)
    if not abstract:
        _check_values(w, entry.path, method, gram)
    matrices = jnp.transpose(w, order).reshape(-1, k, n)
    if gram is not None:
        gram = gram.reshape(-1, k, k)
    data, report = _round_all(matrices, gram, method)
    data = {name: a.reshape(*batch, *a.shape[1:]) for name, a in data.items()}
    tensor = QTensor(
        data=data,
        format=method.format,
        view=view,
        logical_dtype=jnp.dtype(w.dtype).name,
        method=method.name,
    )
    if abstract:
        return tensor, (0.0, 0)
    return tensor, (float(jnp.max(report["damping"])), int(jnp.sum(report["dead"])))


def _check_values(w: Array, path: str, method: Method, gram: Array | None) -> None:
    mesh = getattr(w.sharding, "mesh", None) if isinstance(w, jax.Array) else None
    if jax.sharding.AxisType.Explicit in getattr(mesh, "axis_types", ()):
        raise ValueError(
            f"{path} lies on a mesh with Explicit axes; quantize on one with Auto axes: "
            f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...))"
        )
    if not bool(jnp.all(jnp.isfinite(w))):
        raise ValueError(f"{path}: weights are not finite (NaN or infinity)")
    if gram is not None and not bool(jnp.all(jnp.isfinite(gram))):
        raise ValueError(f"{path}: statistics are not finite; check the calibration data")
    try:
        method.format.check(w)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@partial(jax.jit, static_argnames="method")
def _round_all(w: Array, gram: Array | None, method: Method) -> tuple[dict, dict]:
    """Round [b, k, n] matrix by matrix: memory of one, compiled once per shape."""

    def one(args: tuple[Array, Array | None]) -> tuple[dict, dict]:
        w, h = args
        return method.rounder(w.astype(jnp.float32), method.format, h)

    return jax.lax.map(one, (w, gram))


def _warn(done: Done, method: Method, entry: Entry) -> None:
    *batch, k, _ = entry.matrix
    if done.dead == k * math.prod(batch):
        warnings.warn(
            f"{done.path}: the statistics are zero throughout; rounded to nearest", stacklevel=3
        )
    wanted = getattr(method.rounder, "damping", 0.0)
    if done.damping > 1.5 * wanted:
        warnings.warn(
            f"{done.path}: the second moment is not positive definite; damping was raised from "
            f"{wanted:g} to {done.damping:g} of its mean diagonal",
            stacklevel=3,
        )


def bits_per_weight(params: Any) -> float:
    """Bits per weight over the quantized leaves, every byte counted.

    Of a tree with none, over the leaves that could be quantized (0 if there are none of them).

    >>> import jax.numpy as jnp
    >>> bits_per_weight({"w": jnp.ones((4, 4), jnp.bfloat16), "b": jnp.ones(4)})
    16.0
    """
    leaves = [w for _, w in path_leaves(params)]
    chosen = [w for w in leaves if is_standin(w)] or [w for w in leaves if is_weight(w)]
    size = sum(w.size for w in chosen)
    return 8 * sum(map(leaf_bytes, chosen)) / max(1, size)


def dequantize(params: Any) -> Any:
    """The same tree with plain arrays."""
    return jax.tree.map(
        lambda w: w.dequantize() if is_standin(w) else w, params, is_leaf=is_standin
    )
