"""Putting adapters on the weights of a tree: `adapt`."""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.adapters.adapted import Adapted
from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import brief, shown
from jaxquant.core.paths import matches, path_leaves, replace_leaves
from jaxquant.core.protocols import Adapter, Data, Format, Known
from jaxquant.core.random_keys import Draw
from jaxquant.core.sites import Site, is_weight
from jaxquant.core.standin import is_array
from jaxquant.core.tensor import QTensor
from jaxquant.estimators.latent_format import batched
from jaxquant.formats.dense import Dense
from jaxquant.methods.method import KEEP, Method
from jaxquant.ptq.quantize import quantize
from jaxquant.recipes.recipe import Recipe
from jaxquant.rounding import Nearest
from jaxquant.training.latent import as_stored
from pallas_kernels.context import compiled

FLOATS = Method("float", Nearest(), Dense())


def adapt(
    params: PyTree,
    adapter: Adapter,
    *,
    key: Array | None = None,
    targets: str | Sequence[str] | None = None,
    floats: PyTree = None,
    stats: Stats | Mapping[str, Site] | None = None,
) -> PyTree:
    """Put an adapter on weights of a tree.

    `jaxquant.merge` merges it into them: `QALoRA`, `L4Q`, `LoTA` and `PEQA` exactly, `LoRA` on
    packed weights by rounding again. The tree runs in any function wrapped by
    `jaxquant.quantized`. `jaxquant.trained(tree)` says which arrays are trained, and
    `jaxquant.labels` gives them labels for `optax.multi_transform`.

    Args:
      params: tree of quantized weights, latent weights (`jaxquant.latent`) or floating-point
        arrays.
      adapter: what to train: `jaxquant.adapters.LoRA`, `QALoRA`, `L4Q`, `LoTA`, `PEQA`.
      key: PRNG key for random initial values. Default: `jax.random.key(0)`.
      targets: glob, or globs, of the paths of the weights to adapt, such as "layers/*kernel"; "*"
        also matches "/". Default: all quantized weights; if there are none, all weights that are
        operands of a matmul according to `stats`.
      floats: the tree from which `params` was quantized, for adapters that start from it: `L4Q`,
        and `LoRA` with an `init`. Default: unknown; L4Q then starts from the values of the codes.
      stats: the result of `calibrate`, needed by `LoRA(init="cloq")`; or of `sites`, which tells
        how floating-point weights are used. Default: none; the use is guessed, as in
        `jaxquant.quantize`.
    Returns:
      The tree, with `QTensor`s in the format `jaxquant.adapters.Adapted`.
    Raises:
      ValueError: `targets` is empty, a glob matches nothing, a weight is adapted already, its
        format or its shape does not suit the adapter, `floats` lacks a weight, something that the
        adapter needs is missing, or the start is not finite.
    Warns:
      If a format has to gain offsets, which take bytes.

    >>> import jaxquant as jq
    >>> q = jq.quantize({"w": jnp.eye(64)}, jq.nf4())
    >>> p = adapt(q, jq.adapters.LoRA(rank=4))
    >>> {name: label for name, label in jq.labels(p)["w"].data.items() if label != "frozen"}
    {'lora_a': 'lora_a', 'lora_b': 'lora_b'}
    """
    check_arguments(adapt, locals())
    if targets is not None and not targets:
        raise ValueError("targets names no weights: give globs of paths, or leave it out for all")
    leaves = dict(path_leaves(params))
    chosen = _chosen(leaves, targets)
    plain = [path for path in chosen if not isinstance(leaves[path], QTensor)]
    if plain or not chosen:
        leaves |= _as_tensors(params, plain, stats)
        chosen = chosen or [path for path, w in leaves.items() if isinstance(w, QTensor)]
    before = _floats_of(chosen, leaves, floats) if adapter.needs_floats else {}
    for path in chosen:
        check_adapter(path, leaves[path], adapter)
    draw, new = Draw.of(key), {}
    for path in chosen:
        gram = stats.gram(path) if isinstance(stats, Stats) and adapter.needs_gram else None
        try:
            new[path] = _adapted(path, leaves[path], adapter, draw, before.get(path), gram)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    _tell_gains(leaves, new)
    return replace_leaves(params, new)


def _chosen(leaves: Mapping[str, PyTree], targets: Sequence[str] | None) -> list[str]:
    """Return the paths of the weights to adapt; none if all that are operands of matmuls are."""
    if targets is None:
        return [path for path, w in leaves.items() if isinstance(w, QTensor)]
    return list(_matching(leaves, [targets] if isinstance(targets, str) else targets))


def chosen_weights(params: PyTree, targets: Sequence[str]) -> dict[str, PyTree]:
    """Return the weights that match globs, by path.

    Args:
      params: tree of weights, packed or not, or of their shapes.
      targets: the globs.
    Raises:
      ValueError: a glob matches no leaf, or no weight.
    """
    return _matching(dict(path_leaves(params)), targets)


def _matching(leaves: Mapping[str, PyTree], targets: Sequence[str]) -> dict[str, PyTree]:
    found: dict[str, PyTree] = {}
    for glob in targets:
        some = [path for path in leaves if matches(path, glob)]
        if not some:
            near = difflib.get_close_matches(glob.replace("*", ""), list(leaves), 3, 0.0)
            raise ValueError(
                f"targets: {shown(glob)} matches no leaf of the tree; nearest: {', '.join(near)}"
            )
        able = lambda w: isinstance(w, QTensor) or is_weight(w)
        weights = {path: leaves[path] for path in some if able(leaves[path])}
        if not weights:
            raise ValueError(
                f"targets: {shown(glob)} matches only leaves that are no weights of a matmul, "
                f"such as {some[0]!r}"
            )
        found |= weights
    return found


def check_adapter(path: str, w: QTensor, adapter: Adapter) -> None:
    """Raise ValueError unless a weight can get an adapter; reads no values.

    Args:
      path: path of the weight, for the error.
      w: the weight, or the same with shapes in the place of arrays.
      adapter: the adapter.
    """
    if isinstance(w.format, Adapted):
        raise ValueError(
            f"{path}: the weight has an adapter already, {brief(w.format.adapter)}; merge it first"
        )
    try:
        adapter.check(w.format, w.stored_rows, _columns(w))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _floats_of(
    chosen: list[str], leaves: Mapping[str, QTensor], floats: PyTree
) -> dict[str, Array | None]:
    """Return the floats of every chosen weight, None where they are unknown."""
    held = {} if floats is None else dict(path_leaves(floats))
    found: dict[str, Array | None] = {}
    for path in chosen:
        leaf, w = held.get(path), leaves[path]
        if leaf is None and w.format == Dense():
            leaf = w.dequantize()
        if floats is not None and not (is_array(leaf) and is_weight(leaf)):
            near = difflib.get_close_matches(path, list(held), 3, 0.0)
            raise ValueError(
                f"{path}: floats holds no array of floats at this path; nearest: {', '.join(near)}"
            )
        found[path] = leaf
    return found


def _as_tensors(params: PyTree, paths: list[str], stats: PyTree) -> dict[str, QTensor]:
    """Return the named floating-point weights, or all, as `QTensor`s of unrounded floats."""
    rules = [(path, FLOATS) for path in paths]
    recipe = Recipe([*rules, ("*", KEEP)]) if paths else FLOATS
    made = quantize(params, recipe, stats)
    new = {}
    for path, w in path_leaves(made):
        if isinstance(w, QTensor) and w.format == Dense() and (not paths or path in paths):
            codes = w.data["codes"].astype(w.logical_dtype)  # exact: they came from this dtype
            new[path] = dataclasses.replace(w, data={"codes": codes})
    return new


def _adapted(
    path: str, w: QTensor, adapter: Adapter, draw: Draw, leaf: Array | None, gram: Array | None
) -> QTensor:
    k, n = w.stored_rows, _columns(w)
    held, shape = w.unnamed(), (k, n)
    stored = None if leaf is None else as_stored(held, leaf)
    grams = None if gram is None else stored_gram(held, gram)

    def one(i: int, data: Data, floats: Array | None, gram: Array | None) -> Data:
        key = draw.of_matrix(f"adapter {path}", i)
        return _started(adapter, w.format, shape, data, floats, gram, key)

    data = each_matrix(one, w.leading(), w.data, stored, grams)
    format = Adapted(adapter.home(w.format), adapter)
    for name, a in data.items():
        if jnp.issubdtype(a.dtype, jnp.floating) and not _finite(a):
            raise ValueError(
                f"{name} is not finite at the start: the weights are outside the range of "
                f"{a.dtype}, or the statistics are singular"
            )
    return dataclasses.replace(w, data=data, format=format)


def _finite(a: Array) -> bool:
    """Return whether an array is finite; True for one that is traced."""
    found = jnp.all(jnp.isfinite(a))
    return isinstance(found, jax.core.Tracer) or bool(found)


@partial(compiled, static_argnums=(0, 1, 2))
def _started(
    adapter: Adapter, format: Format, shape: tuple[int, int], data: Data,
    floats: Array | None, gram: Array | None, key: Array,
) -> Data:  # fmt: skip
    return adapter.start(format, data, Known(*shape, floats, gram, key))


def _columns(w: QTensor) -> int:
    """Return the number of columns of the stored matrix."""
    n = math.prod(w.view.n)
    return n if w.output is None else w.output.size(n)


def each_matrix(fn: Callable[..., PyTree], axes: int, *trees: PyTree) -> PyTree:
    """Apply a function to the matrices of a weight, one after the other, and stack the results.

    Args:
      fn: function of the number of a matrix and of its arrays.
      axes: number of leading axes over matrices.
      trees: trees of arrays that have these axes; None stays None.
    """
    batch = jax.tree.leaves(trees)[0].shape[:axes]
    flat = jax.tree.map(lambda a: a.reshape(math.prod(batch), *a.shape[axes:]), trees)
    at = lambda i: jax.tree.map(lambda a: a[i], flat)
    parts = [fn(i, *at(i)) for i in range(math.prod(batch))]
    return jax.tree.map(lambda *a: jnp.stack(a).reshape(*batch, *a[0].shape), *parts)


def stored_gram(w: QTensor, gram: Float[Array, "... k k"]) -> Float[Array, "... s s"]:
    """Return the second moment of the transformed inputs.

    Args:
      w: the quantized weight.
      gram: second moment of its inputs.
    """
    if w.input is None:
        return gram
    side = w.input
    apply = lambda h, arrays: side.apply(side.apply(h, arrays).T, arrays)
    return batched(apply, w.leading())(gram, w.input_data)


def _tell_gains(leaves: Mapping[str, QTensor], new: Mapping[str, QTensor]) -> None:
    """Warn of formats that gain offsets, and say how many bits they cost."""
    forms: dict[str, Any] = {path: w.format for path, w in new.items()}
    gained = [path for path, form in forms.items() if form.format != leaves[path].format]
    if not gained:
        return
    path = gained[0]
    w, served = leaves[path], forms[path].format
    k, n = w.stored_rows, _columns(w)
    size = 8 * sum(math.prod(a.shape) * a.dtype.itemsize for a in served.shapes(k, n).values())
    rest = f" (and {len(gained) - 1} more)" if gained[1:] else ""
    warnings.warn(
        f"{path}{rest} gains offsets, which {type(forms[path].adapter).__name__} merges into: "
        f"{size / (k * n):.3f} bits per weight when merged instead of {w.bits_per_weight:.3f}; "
        "quantize to jaxquant.formats.Offset to count them from the beginning",
        stacklevel=3,
    )
