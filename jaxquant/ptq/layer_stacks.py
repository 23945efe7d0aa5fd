"""Layers of a stack as trees of their own: each may then have methods of its own.

A scanned model holds the weights of its layers as one array; so they share a method, and a rate.
`unstack` takes the stack apart, for `quantize` and all that goes by path; `restack` makes it whole
for the model. What is packed is decoded by that, unless all layers are packed alike.
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
    """The tree with the stack params[name], of L layers, as a dict of trees "0" to "L-1".

    Args:
      params: a dict; the leaves of params[name] share a leading axis over layers.
    Raises:
      ValueError: they do not; or there is no such entry.

    >>> {k: v["w"].shape for k, v in unstack({"a": {"w": jnp.ones((2, 3, 4))}}, "a")["a"].items()}
    {'0': (3, 4), '1': (3, 4)}
    """
    check_arguments(unstack, locals())
    stack = _entry(params, name)
    layer = lambda i: jax.tree.map(lambda leaf: _cut(leaf, i), stack, is_leaf=is_standin)
    return {**params, name: {str(i): layer(i) for i in range(stack_size(stack))}}


def restack(params: PyTree, name: str) -> PyTree:
    """Inverse of `unstack`, of a quantized tree too.

    A weight that is packed alike in all layers stays packed; else it is decoded. Also inside a
    `quantized` function, where every packed weight is decoded.

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
    """The trees of the layers that `unstack` made, in their order ("10" after "9").

    Raises:
      ValueError: the entry holds something else.
    """
    layers = _entry(params, name)
    if not is_apart(params, name):
        raise ValueError(f"expected layers '0', '1', ... in {name!r}, got {', '.join(layers)}")
    return [layers[str(i)] for i in range(len(layers))]


def is_apart(params: PyTree, name: str) -> bool:
    """Whether `unstack` has been here."""
    return isinstance(params[name], dict) and set(params[name]) == set(
        map(str, range(len(params[name])))
    )


def _cut(leaf: PyTree, i: int) -> PyTree:
    """Layer i; of what a name says is shared, that layer's."""
    cut = jax.tree.map(lambda a: a[i], leaf)
    shared = _shared(leaf)
    return dataclasses.replace(cut, shared=f"{shared} {i}") if shared else cut


def _shared(leaf: PyTree) -> str:
    return leaf.shared if isinstance(leaf, QTensor) else ""


def _stacked(*leaves: PyTree) -> PyTree:
    names = {_shared(leaf).removesuffix(f" {i}") for i, leaf in enumerate(leaves)}
    if any(names):  # undoes `_cut`; what had other names before is known to share no more
        name = names.pop() if len(names) == 1 else ""
        rename = lambda w: dataclasses.replace(w, shared=name) if isinstance(w, QTensor) else w
        leaves = tuple(map(rename, leaves))
    # Integers that do not fit their words (`DualScale`) are more in one layer than in another.
    forms = {(jax.tree.structure(w), *(a.shape for a in jax.tree.leaves(w))) for w in leaves}
    if is_standin(leaves[0]) and len(forms) == 1:
        return jax.tree.map(lambda *a: jnp.stack(a), *leaves)
    return jnp.stack([leaf.dequantize() if is_standin(leaf) else leaf for leaf in leaves])


def unstack_stats(stats: Stats, name: str) -> Stats:
    """What calibration saw, of the tree that `unstack` makes."""
    check_arguments(unstack_stats, locals())
    prefix = f"{name}/"
    count = {s.shape[0] for p, s in stats.sites.items() if p.startswith(prefix)}
    if len(count) != 1:
        raise ValueError(f"expected weights of one stack at {name!r}, found layers: {count}")
    sites, sums, holder = {}, {}, {}

    def named(path: str) -> list[tuple[str, PyTree]]:
        """The names of a weight's parts, and their index."""
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
    """The site of one layer's weight: the first axis is gone."""
    less = lambda axes: tuple(a - 1 for a in axes if a)
    return dataclasses.replace(
        site,
        path=path,
        shape=site.shape[1:],
        contracted=less(site.contracted),
        batch=less(site.batch),
        gathered=site.gathered - 1 if site.gathered else None,  # along the first, layers are
        also=tuple(map(less, site.also)),
        input=site.input and f"{site.input} {i}",
    )


def _entry(params: PyTree, name: str) -> PyTree:
    if not isinstance(params, dict) or name not in params:
        raise ValueError(f"expected a dict with an entry {name!r}, got {type(params).__name__}")
    return params[name]
