"""The products in a traced function, and which of them multiply floats."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxquant.core.arguments import check_arguments
from pallas_kernels.lowering import choices

# Primitives that multiply and sum. A kernel is one that cannot be looked into.
PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}
KERNELS = {"ffi_call", "pallas_call", "custom_call", "tpu_custom_call"}


class Product(NamedTuple):
    """A product in a traced function.

    Attributes:
      primitive: name of the primitive.
      dtypes: names of the dtypes of its two operands; of all array operands of a kernel.
      shapes: the shapes of the same.
      result: name of the dtype of its (first) result.
      kernel: whether it is a kernel, whose inner arithmetic is unknown.
    """

    primitive: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    result: str
    kernel: bool

    @property
    def floating(self) -> bool:
        """Whether an operand is a float (or complex), so that the product may multiply floats."""
        return any(jnp.issubdtype(jnp.dtype(name), jnp.inexact) for name in self.dtypes)


def products(fn: Callable[..., PyTree], *args: Any) -> list[Product]:
    """List the products of a function, in the order in which they are traced.

    Loops, conditions, and functions called under `jit`, `remat`, `custom_vjp` and `vmap` are
    entered; the body of a loop counts once. Where this project chooses between a kernel and its
    reference at lowering, the products of all of them are listed.

    Args:
      fn: the function; wrap it in `jaxquant.quantized` if it takes packed weights.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s; it is only traced.
    Returns:
      The products.

    >>> found = products(lambda x, w: x @ w, jnp.ones((2, 3), "int8"), jnp.ones((3, 4), "int8"))
    >>> found[0].primitive, found[0].dtypes, found[0].floating
    ('dot_general', ('int8', 'int8'), False)
    """
    check_arguments(products, locals())
    return [_product(eqn) for eqn in _equations(jax.make_jaxpr(fn)(*args)) if _is_product(eqn)]


def float_products(fn: Callable[..., PyTree], *args: Any) -> list[Product]:
    """List the products of a function that have a float among their operands, kernels included.

    A function without any multiplies and sums integers only. Elementwise operations on floats, such
    as scaling a finished sum, are no products.

    Args:
      fn, *args: as in `products`.
    Returns:
      The products; an empty list if there are none.

    >>> float_products(lambda x, w: x @ w, jnp.ones((2, 3)), jnp.ones((3, 4)))[0].dtypes
    ('float32', 'float32')
    """
    check_arguments(float_products, locals())
    return [one for one in products(fn, *args) if one.floating]


def _is_product(eqn: Any) -> bool:
    return eqn.primitive.name in PRODUCTS | KERNELS


def _product(eqn: Any) -> Product:
    kernel = eqn.primitive.name in KERNELS
    operands = eqn.invars if kernel else eqn.invars[:2]
    avals = [v.aval for v in operands if hasattr(v.aval, "dtype")]
    return Product(
        eqn.primitive.name,
        tuple(a.dtype.name for a in avals),
        tuple(tuple(a.shape) for a in avals),
        eqn.outvars[0].aval.dtype.name if eqn.outvars else "",
        kernel,
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of all jaxprs inside it, except inside kernels."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name in KERNELS:
            continue
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                yield from _equations(part)
        for choice in choices(eqn):  # functions that are traced only when they are lowered
            yield from _equations(jax.make_jaxpr(choice)(*(v.aval for v in eqn.invars)))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")
