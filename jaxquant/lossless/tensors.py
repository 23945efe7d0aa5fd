"""Weights of a parameter tree held without loss: coded to `QTensor`s, and back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt

from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.sites import Site, is_weight
from jaxquant.core.tensor import QTensor, View
from jaxquant.core.tree import leaf_bytes
from jaxquant.formats import FloatPlanes
from jaxquant.formats.exact_format import bits_of
from jaxquant.lossless.forms import Form, method
from jaxquant.methods.method import Method
from jaxquant.recipes.recipe import layout_of
from pallas_kernels.codecs import float_fields, float_planes


def encode(
    params: PyTree,
    form: Form = "planes",
    *,
    bits: Literal[3, 4] = 3,
    sites: Mapping[str, Site] | None = None,
) -> PyTree:
    """Return a tree whose floating-point weights are held in fewer bytes, without loss.

    Every array of rank 2 or more and of a dtype that can be coded becomes a `QTensor` if that takes
    fewer bytes; weights that are coded already change to the given form. The other leaves stay as
    they are. `jaxquant.quantized(fn)` runs a function on the tree: products decode their weights as
    they go, everything else as a whole.

    Args:
      params: tree of concrete arrays, and of `QTensor`s. Weights may have any values, NaN included.
      form: "planes" (the default) or "huffman"; see `jaxquant.lossless.method`.
      bits: number of bits of an exponent in planes, 3 (the default) or 4.
      sites: how a function uses each weight, from `jaxquant.sites`. By default the last axis is
        taken as the output and the one before it as the input; if that is wrong, products decode
        the whole weight.

    Returns:
      The tree. `decode` gives back every array bit for bit.

    Raises:
      ValueError: an argument is not as described, or an array is traced.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (512, 64)).astype(jnp.bfloat16)
    >>> tree = jq.lossless.encode({"w": w, "b": jnp.zeros(64)})
    >>> round(tree["w"].bits_per_weight, 1), bool((jq.lossless.decode(tree)["w"] == w).all())
    (11.3, True)
    >>> y = jq.quantized(lambda p, x: x @ p["w"] + p["b"])(tree, jnp.ones((1, 512), jnp.bfloat16))
    """
    check_arguments(encode, locals())
    chosen = method(form, bits=bits)
    new: dict[str, QTensor] = {}
    for path, leaf in path_leaves(params):
        if isinstance(leaf, QTensor):
            if leaf.format.exact:
                new[path] = _converted(path, leaf, chosen)
        elif is_weight(leaf) and leaf.size and leaf.dtype.name in float_fields.DTYPES:
            if isinstance(leaf, jax.core.Tracer):
                raise ValueError(
                    f"{path}: expected a concrete array, got a traced one; coding reads values, so "
                    "call it outside of jit"
                )
            coded = _coded(path, jnp.asarray(leaf), chosen, (sites or {}).get(path))
            if coded is not None and coded.nbytes < leaf_bytes(leaf):
                new[path] = coded
    return replace_leaves(params, new)


def decode(params: PyTree) -> PyTree:
    """Return a tree with all weights that are held without loss as plain arrays, bit for bit.

    Args:
      params: tree of arrays and `QTensor`s; those of other formats stay as they are.

    >>> tree = {"w": jnp.full((256, 8), jnp.nan, jnp.bfloat16)}
    >>> decode(encode(tree))["w"].dtype.name
    'bfloat16'
    """
    exact = lambda leaf: isinstance(leaf, QTensor) and leaf.format.exact
    return replace_leaves(params, {p: w.dequantize() for p, w in path_leaves(params) if exact(w)})


def settled(method: Method, dtype: str, u: UInt[Array, "l k n"], path: str) -> Method:
    """Return a method whose format has the sizes that some matrices need.

    Args:
      method: the method, whose format is `exact`.
      dtype: name of the dtype of the weights.
      u: the bits of the matrices that are stored together.
      path: path of their leaf, for messages.

    Raises:
      ValueError: the method has transforms, or the format cannot hold weights of this dtype.
    """
    if method.input is not None or method.output is not None:
        raise ValueError(
            f"{path}: {method.name} has a transform, but a format that keeps the bits of the "
            "weights cannot be combined with one; use a method without transforms"
        )
    try:
        return dataclasses.replace(method, format=method.format.settled(dtype, u))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _coded(path: str, w: Array, method: Method, site: Site | None) -> QTensor | None:
    """Return a coded weight; None if it is seen at once that it would take more bytes."""
    view, order = layout_of(w.shape, site)
    batch = tuple(w.shape[a] for a in order[: w.ndim - len(view.k) - len(view.n)])
    k, n = math.prod(view.k), math.prod(view.n)
    format, dtype = method.format, w.dtype.name
    if isinstance(format, FloatPlanes):
        least = float_planes.nbytes(k, n, dtype, format.bits, 1) * math.prod(batch)
        if least >= leaf_bytes(w):
            return None
    u = jnp.transpose(bits_of(w), order).reshape(-1, k, n)  # floats could lose payloads of NaN
    return _stack(path, dtype, u, batch, view, method)


def _converted(path: str, w: QTensor, method: Method) -> QTensor:
    """Return a coded weight in another form."""
    batch = w.data["codes"].shape[: w.leading()]
    floats = w.format.to_disk(w.data, w.stored_rows)["codes"]
    u = bits_of(floats).reshape(-1, *floats.shape[-2:])
    new = _stack(path, w.format.own, u, batch, w.view, method)
    return dataclasses.replace(w, data=new.data, format=new.format, method=new.method)


def _stack(
    path: str, dtype: str, u: Array, batch: tuple[int, ...], view: View, method: Method
) -> QTensor:
    method = settled(method, dtype, u, path)
    parts = [method.format.encode_bits(one) for one in u]
    data = jax.tree.map(lambda *a: jnp.stack(a).reshape(*batch, *a[0].shape), *parts)
    return QTensor(data, method.format, view, dtype, method.name)
