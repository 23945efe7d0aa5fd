"""Functions of whole parameter trees: size, dequantization, change of activation format."""

import dataclasses

import jax
from jaxtyping import PyTree

from jaxquant.core.activations import Activations
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves
from jaxquant.core.sites import is_weight
from jaxquant.core.standin import is_standin
from jaxquant.core.tensor import QTensor


def bits_per_weight(params: PyTree) -> float:
    """Return the number of bits per weight, counting all bytes of the quantized leaves.

    Args:
      params: parameter tree.

    Returns:
      The average over the quantized leaves; without any, over the leaves that could be quantized (0
      if there are none).

    >>> import jax.numpy as jnp
    >>> bits_per_weight({"w": jnp.ones((4, 4), jnp.bfloat16), "b": jnp.ones(4)})
    16.0
    """
    leaves = [w for _, w in path_leaves(params)]
    chosen = [w for w in leaves if is_standin(w)] or [w for w in leaves if is_weight(w)]
    size = sum(w.size for w in chosen)
    return 8 * sum(map(leaf_bytes, chosen)) / max(1, size)


def dequantize(params: PyTree) -> PyTree:
    """Replace all quantized weights, and other stand-ins, by plain arrays.

    Args:
      params: parameter tree.

    Returns:
      The same tree with plain arrays.
    """
    return jax.tree.map(
        lambda w: w.dequantize() if is_standin(w) else w, params, is_leaf=is_standin
    )


def with_activations(params: PyTree, activations: Activations | str | None) -> PyTree:
    """Change how the inputs of packed weights are rounded; the weights stay the same.

    Args:
      params: parameter tree; leaves that are not `QTensor`s are left as they are.
      activations: an `Activations` or its text, such as "int8" (a scale per token) or
        "int4,asymmetric"; None or "float" leaves inputs unrounded.

    Returns:
      The same tree, with other `activations` in its `QTensor`s.

    Raises:
      ValueError: the format is unknown, or it has static scales that the weights do not hold.
        Calibration finds those: name the format in the method, and call `quantize` with statistics.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = with_activations({"w": jq.quantize_array(jnp.eye(64), jq.rtn())}, "int8")
    >>> str(q["w"].activations)
    'int8'
    """
    check_arguments(with_activations, locals())
    form = Activations.of(activations)

    def change(w: PyTree) -> PyTree:
        if not isinstance(w, QTensor):
            return w
        if form is not None and set(form.shapes()) - set(w.activations_data):
            raise ValueError(
                f"{form}: static scales are computed from statistics and cannot be added "
                f"later; give activations={str(form)!r} to the method, and statistics to "
                "quantize"
            )
        return dataclasses.replace(w, activations=form)

    return jax.tree.map(change, params, is_leaf=is_standin)


def leaf_bytes(w: PyTree) -> int:
    """Return the number of bytes of an array, a stand-in, or the shape of either."""
    return w.nbytes if is_standin(w) else w.size * w.dtype.itemsize


def tree_bytes(params: PyTree) -> int:
    """Return the number of bytes of all leaves: arrays, stand-ins, or the shapes of either."""
    return sum(leaf_bytes(w) for _, w in path_leaves(params))
