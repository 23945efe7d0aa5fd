"""Splitting a stack of layers into separate trees, so that each layer may have its own methods.

A scanned model holds each weight of its layers as one array, so the layers share a method and a
rate. `unstack` splits the stack for `quantize` and everything else that works by path; `restack`
joins it again for the model. Joining decodes packed weights unless all layers are packed alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import stack_size
from jaxquant.core.sites import Site
from jaxquant.core.standin import is_standin
from jaxquant.core.tensor import QTensor


def unstack(params: PyTree, name: str) -> PyTree:
    """Replace the stack params[name] of L layers by a dict of trees with keys "0" to str(L - 1).

    Args:
      params: a dict; the leaves of params[name] share a leading axis over layers.
      name: key of the stack.
    Returns:
      The new dict; the other entries are unchanged.
    Raises:
      ValueError: the leaves disagree on the leading axis, or there is no such entry.

    >>> {k: v["w"].shape for k, v in unstack({"a": {"w": jnp.ones((2, 3, 4))}}, "a")["a"].items()}
    {'0': (3, 4), '1': (3, 4)}
    """
    check_arguments(unstack, locals())
    stack = _entry(params, name)
    layer = lambda i: jax.tree.map(lambda leaf: _cut(leaf, i), stack, is_leaf=is_standin)
    return {**params, name: {str(i): layer(i) for i in range(stack_size(stack))}}


def restack(params: PyTree, name: str) -> PyTree:
    """Join the layers that `unstack` split, also after quantization.

    A weight that is packed alike in all layers stays packed; any other packed weight is decoded.
    Inside a `quantized` function, every packed weight is decoded.

    Args:
      params: a dict whose entry `name` holds layers "0", "1", ...
      name: key of the stack.
    Returns:
      The dict with the stack in place of the layers.
    Raises:
      ValueError: there is no such entry, or it does not hold layers.

    >>> import jaxquant as jq
    >>> apart = unstack({"a": {"w": jnp.ones((2, 64, 4))}}, "a")
    >>> mixed = jq.Recipe([("a/0/w", jq.rtn(2)), ("*", jq.rtn(3))])
    >>> restack(jq.quantize(apart, mixed), "a")["a"]["w"].shape
    (2, 64, 4)
    """
    check_arguments(restack, locals())
    layers = layers_of(params, name)
    return {**params, name: jax.tree.map(_stacked, *layers, is_leaf=is_standin)}


def layers_of(params: PyTree, name: str) -> list[PyTree]:
    """Return the trees of the layers that `unstack` made, in numerical order ("10" after "9").

    Args:
      params: a dict, as `unstack` returns it.
      name: key of the stack.
    Returns:
      The trees.
    Raises:
      ValueError: there is no such entry, or it does not hold layers.
    """
    layers = _entry(params, name)
    if not is_apart(params, name):
        raise ValueError(f"expected layers '0', '1', ... in {name!r}, got {', '.join(layers)}")
    return [layers[str(i)] for i in range(len(layers))]


def is_apart(params: PyTree, name: str) -> bool:
    """Return whether an entry has been split by `unstack`.

    Args:
      params: a dict.
      name: key of the entry.
    Returns:
      True if the entry is a dict with the keys "0", "1", ...
    """
    return isinstance(params[name], dict) and set(params[name]) == set(
        map(str, range(len(params[name])))
    )


def _cut(leaf: PyTree, i: int) -> PyTree:
    """Return layer i of a leaf; the index is appended to the name of anything shared."""
    cut = jax.tree.map(lambda a: a[i], leaf)
    shared = _shared(leaf)
    return dataclasses.replace(cut, shared=f"{shared} {i}") if shared else cut


def _shared(leaf: PyTree) -> str:
    return leaf.shared if isinstance(leaf, QTensor) else ""


def _stacked(*leaves: PyTree) -> PyTree:
    names = {_shared(leaf).removesuffix(f" {i}") for i, leaf in enumerate(leaves)}
    if any(names):  # undoes `_cut`; layers whose names differed share nothing after stacking
        name = names.pop() if len(names) == 1 else ""
        rename = lambda w: dataclasses.replace(w, shared=name) if isinstance(w, QTensor) else w
        leaves = tuple(map(rename, leaves))
    # The arrays of integers that overflow their words (`DualScale`) vary in size between layers.
    forms = {(jax.tree.structure(w), *(a.shape for a in jax.tree.leaves(w))) for w in leaves}
    if is_standin(leaves[0]) and len(forms) == 1:
        return jax.tree.map(lambda *a: jnp.stack(a), *leaves)
    return jnp.stack([leaf.dequantize() if is_standin(leaf) else leaf for leaf in leaves])


def unstack_stats(stats: Stats, name: str) -> Stats:
    """Return the statistics of the tree that `unstack` makes.

    Args:
      stats: the result of `calibrate` for the stacked tree.
      name: key of the stack.
    Returns:
      The statistics, by the new paths.
    Raises:
      ValueError: there are no weights at `name`, or they differ in their number of layers.
    """
    check_arguments(unstack_stats, locals())
    prefix = f"{name}/"
    count = {s.shape[0] for p, s in stats.sites.items() if p.startswith(prefix)}
    if len(count) != 1:
        raise ValueError(
            f"expected the weights at {name!r} to have the same number of layers, got "
            f"{sorted(count)}"
        )
    sites, sums, holder = {}, {}, {}

    def named(path: str) -> list[tuple[str, PyTree]]:
        """Return the new paths of a weight, each with its index in the stack."""
        if not path.startswith(prefix):
            return [(path, ...)]
        return [(f"{prefix}{i}/{path.removeprefix(prefix)}", i) for i in range(*count)]

    for path, site in stats.sites.items():
        for new, i in named(path):
            sites[new] = site if i is ... else _layer(site, new, i)
    for path, probe in stats.sums.items():
        for new, i in named(path):
            sums[new] = jax.tree.map(lambda a, i=i: np.asarray(a)[i], probe)
    for path, held in stats.holder.items():
        for (new, _), (there, _) in zip(named(path), named(held), strict=True):
            holder[new] = there
    return Stats(sites, sums, holder)


def _layer(site: Site, path: str, i: int) -> Site:
    """Return the site of one layer's weight, without the leading axis."""
    less = lambda axes: tuple(a - 1 for a in axes if a)
    return dataclasses.replace(
        site,
        path=path,
        shape=site.shape[1:],
        contracted=less(site.contracted),
        batch=less(site.batch),
        experts=less(site.experts),
        gathered=site.gathered - 1 if site.gathered else None,  # axis 0 is the layer axis
        also=tuple(map(less, site.also)),
        input=site.input and f"{site.input} {i}",
    )


def _entry(params: PyTree, name: str) -> PyTree:
    if not isinstance(params, dict) or name not in params:
        raise ValueError(f"expected a dict with an entry {name!r}, got {type(params).__name__}")
    return params[name]
