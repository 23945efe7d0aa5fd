"""What shapes and names tell of how a function uses its weights, where no sites say it."""

import warnings
from collections.abc import Sequence

from jaxtyping import PyTree

from jaxquant.core.sites import is_weight

_VECTORS = frozenset({"bias", "scale"})  # added, or multiplied entry by entry
# Of a matrix with such a name the inputs are often the last axis: [outputs, inputs] in Equinox and
# PyTorch, [entries, channels] in Flax.
_TURNED = frozenset({"weight", "embedding"})


def is_vector(path: str) -> bool:
    """Return whether a path ends as those of biases and scales, also of several axes, do.

    >>> is_vector("attention/query/bias"), is_vector("attention/query/kernel")
    (True, False)
    """
    return _name(path) in _VECTORS


def no_factors(leaves: Sequence[tuple[str, PyTree]]) -> dict[str, str]:
    """Find the weights that no product seems to contract.

    Args:
      leaves: pairs (path, leaf).

    Returns:
      By path, why it seems so: "" for a bias or a scale, by its name; a text for a table, by its
      name, and for a leaf [layers, n] that stands beside a stack [layers, k, n] in the tree, as
      biases and norms of stacked layers do.

    >>> import jax.numpy as jnp
    >>> no_factors([("a/kernel", jnp.ones((8, 4, 2))), ("a/bias", jnp.ones((4, 2)))])
    {'a/bias': ''}
    """
    weights = [(path, w) for path, w in leaves if is_weight(w)]
    stacks = {_stack_of(path, w) for path, w in weights if len(w.shape) > 2}
    found = {}
    for path, w in weights:
        if is_vector(path):
            found[path] = ""
        elif _name(path) == "embedding":
            found[path] = (
                "without sites they look like embedding tables, whose rows are only looked up"
            )
        elif len(w.shape) == 2 and _stack_of(path, w) in stacks:
            found[path] = "without statistics they look like one vector for each layer of a stack"
    return found


def warn_of_guesses(taken: Sequence[tuple[str, tuple[int, ...]]], stacklevel: int) -> None:
    """Warn of weights whose contracted axis is a guess that often fails.

    A matrix is taken for [k, n], as all of this library takes it, and not warned of. Leaves with
    more axes may be a stack of matrices, or one matrix with several input or output axes (as in
    attention), and some names stand for [n, k].

    Args:
      taken: pairs (path, shape) of the weights to quantize.
      stacklevel: how many calls up the warning points, 1 for the caller.
    """
    doubted = [(p, s) for p, s in taken if len(s) > 2 or _name(p) in _TURNED]
    if not doubted:
        return
    some = ", ".join(f"{path} {list(shape)}" for path, shape in doubted[:3])
    more = f" and {len(doubted) - 3} more" if len(doubted) > 3 else ""
    warnings.warn(
        "without sites, the last axis but one is assumed to be the input of "
        f"{some}{more}; pass the sites of the function: jq.quantize(params, "
        "method, jq.sites(fn, params, x))",
        stacklevel=stacklevel + 1,
    )


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stack_of(path: str, w: PyTree) -> tuple[str, int]:
    """Return the key shared by the leaves of a stack of layers: place in the tree and length."""
    return path.rpartition("/")[0].partition("/")[0], w.shape[0]
