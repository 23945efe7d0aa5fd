"""The products in a traced function, and which of them multiply floats."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import PyTree

from jaxquant.core.arguments import check_arguments
from pallas_kernels.lowering import choices

# Primitives that multiply and sum. A kernel is one that cannot be looked into.
PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}
KERNELS = {
    "ffi_call", "pallas_call", "custom_call", "tpu_custom_call", "pure_callback", "io_callback",
}  # fmt: skip
# Sums, and what may lie between an elementwise product and its sum without changing the numbers.
SUMS = {"reduce_sum", "cumsum", "reduce_window_sum"}
MOVES = {"convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze", "copy"}


class Product(NamedTuple):
    """A product in a traced function.

    Attributes:
      primitive: name of the primitive; of an elementwise product that is then summed, that of the
        sum.
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
        """Whether it may compute with floats: an operand or the sum is one, or it is a kernel."""
        names = (*self.dtypes, self.result) if self.result else self.dtypes
        return self.kernel or any(jnp.issubdtype(jnp.dtype(n), jnp.inexact) for n in names)


def products(fn: Callable[..., PyTree], *args: Any) -> list[Product]:
    """List the products of a function, in the order in which they are traced.

    Loops, conditions, and functions called under `jit`, `remat`, `custom_vjp` and `vmap` are
    entered; the body of a loop counts once. Where this project chooses between a kernel and its
    reference at lowering, the products of all of them are listed. An elementwise product of two
    arrays that is then summed counts too, unless it is a square, as in a norm. Products that a loop
    adds up one by one are not recognized.

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
    return list(_products(jax.make_jaxpr(fn)(*args)))


def float_products(fn: Callable[..., PyTree], *args: Any) -> list[Product]:
    """List the products of a function with a float among their operands or sums, and all kernels.

    A function without any multiplies and sums integers only, as far as `products` recognizes what
    it does. Elementwise operations on floats, such as scaling a finished sum, are no products. A
    kernel is listed whatever its operands are, since nobody knows what it does with them.

    Args:
      fn, *args: as in `products`.
    Returns:
      The products; an empty list if there are none.

    >>> float_products(lambda x, w: x @ w, jnp.ones((2, 3)), jnp.ones((3, 4)))[0].dtypes
    ('float32', 'float32')
    """
    check_arguments(float_products, locals())
    return [one for one in products(fn, *args) if one.floating]


def _products(jaxpr: Any) -> Iterator[Product]:
    """Yield the products of a jaxpr and of all jaxprs inside it, except inside kernels."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made: dict[Any, Any] = {}  # the equation that computes a variable
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in KERNELS:
            yield _product(eqn, eqn.invars)
            continue
        if name in PRODUCTS:
            yield _product(eqn, eqn.invars[:2])
        elif name in SUMS and (factors := _factors(eqn.invars[0], made)):
            yield _product(eqn, factors)
        made.update((out, eqn) for out in eqn.outvars)
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                yield from _products(part)
        for choice in choices(eqn):  # functions that are traced only when they are lowered
            yield from _products(jax.make_jaxpr(choice)(*(v.aval for v in eqn.invars)))


def _product(eqn: Any, operands: Sequence[Any]) -> Product:
    avals = [v.aval for v in operands if hasattr(v.aval, "dtype")]
    return Product(
        eqn.primitive.name,
        tuple(a.dtype.name for a in avals),
        tuple(tuple(a.shape) for a in avals),
        eqn.outvars[0].aval.dtype.name if eqn.outvars else "",
        eqn.primitive.name in KERNELS,
    )


def _factors(summed: Any, made: dict[Any, Any]) -> Sequence[Any]:
    """Return the two arrays whose elementwise product a value is; none if it is not one."""
    while not isinstance(summed, Literal) and summed in made:
        eqn = made[summed]
        if eqn.primitive.name == "mul":
            one, other = eqn.invars
            scaled = isinstance(one, Literal) or isinstance(other, Literal)
            return () if scaled or one is other else (one, other)
        if eqn.primitive.name not in MOVES:
            return ()
        summed = eqn.invars[0]
    return ()


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")
