"""The products in a traced function, and which of them multiply floats."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Primitive
from jaxtyping import PyTree

from jaxquant.core.arguments import check_arguments
from pallas_kernels.lowering import choices

# Primitives that multiply and sum.
PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}
# Primitives that cannot be looked into, though JAX knows some of them; see also `_is_kernel`.
KERNELS = {
    "ffi_call", "pallas_call", "custom_call", "tpu_custom_call", "pure_callback", "io_callback",
    "fft", "custom_linear_solve",
}  # fmt: skip
# What JAX computes itself, operation by operation. A primitive of any other name is a kernel, so
# that one that is added to JAX, or registered by a library, cannot hide a product.
KNOWN = {one.name for one in vars(jax.lax).values() if isinstance(one, Primitive)} | {
    "random_bits", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split",
    "random_clone", "threefry2x32", "name", "platform_index", "pcast", "reshard", "mesh_cast",
    "layout_constraint", "psum_invariant", "reduce_scatter", "all_gather_invariant", "get", "swap",
    "addupdate",
}  # fmt: skip
# Sums, and what may lie between an elementwise product and its sum: it moves or selects entries,
# rounds them, or scales them all alike.
SUMS = {
    "reduce_sum", "reduce", "cumsum", "reduce_window_sum", "reduce_window", "scatter-add", "psum",
    "psum_invariant", "reduce_scatter",
}  # fmt: skip
ADDS = {"add", "sub", "add_any"}
MOVES = {
    "convert_element_type", "reduce_precision", "reshape", "transpose", "broadcast_in_dim",
    "squeeze", "copy", "name", "optimization_barrier", "stop_gradient", "sharding_constraint",
    "slice", "dynamic_slice", "dynamic_update_slice", "gather", "split", "unstack", "stack", "pad",
    "concatenate", "rev", "sort", "select_n", "clamp", "neg", "round",
}  # fmt: skip

Factors = Sequence[Any]  # the two arrays whose elementwise product a value is; empty if it is none


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
    arrays that is then summed counts too, even if it is moved, masked or scaled before, or made and
    summed in two different functions; a square, as in a norm, does not count. A primitive that JAX
    does not compute operation by operation (a solver, a Fourier transform, one of a library) counts
    as a kernel.

    Not recognized are products that are made and added up one by one, in a loop or not, and those
    that are not written as products: sums of inputs that a mask selects, differences of squares,
    exponentials of sums of logarithms.

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


def _products(jaxpr: Any, given: Sequence[Factors] = ()) -> Generator[Product, None, list[Factors]]:
    """Yield the products of a jaxpr and of all jaxprs inside it, except inside kernels.

    Args:
      jaxpr: the jaxpr.
      given: the factors of its inputs.
    Returns:
      The factors of its outputs.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known: dict[Any, Factors] = dict(zip(jaxpr.invars, given, strict=False))
    factors = lambda v: () if isinstance(v, Literal) else known.get(v, ())
    for eqn in jaxpr.eqns:
        name, of = eqn.primitive.name, [factors(v) for v in eqn.invars]
        if _is_kernel(eqn):
            yield _product(eqn, eqn.invars)
            continue
        if name in PRODUCTS:
            yield _product(eqn, eqn.invars[:2])
        elif any(of) and _sums(name, of):
            yield _product(eqn, next(filter(None, of)))
        inside = yield from _inside(eqn, of)
        known.update(zip(eqn.outvars, inside or _made(eqn, of), strict=False))
    return [factors(v) for v in jaxpr.outvars]


def _sums(name: str, of: Sequence[Factors]) -> bool:
    """Return whether a primitive adds entries of an elementwise product to each other."""
    # Two parts of one product, as in `associative_scan`; a rotation adds two different products.
    return name in SUMS or (name in ADDS and of[0] is of[1])


def _inside(eqn: Any, of: Sequence[Factors]) -> Generator[Product, None, list[Factors]]:
    """Yield the products inside an equation; return the factors of its results, if it has any."""
    found: list[list[Factors]] = []
    for part in _parts(eqn):
        # The operands of a body are the last ones of the equation: before them lie the index of a
        # condition, and what only the condition of a while loop takes.
        count = len(getattr(part, "jaxpr", part).invars)
        found.append((yield from _products(part, of[-count:] if count else ())))
    for choice in choices(eqn):  # functions that are traced only when they are lowered
        traced = jax.make_jaxpr(choice)(*(v.aval for v in eqn.invars))
        found.append((yield from _products(traced, of)))
    alike = [one for one in found if len(one) == len(eqn.outvars)]
    return [next(filter(None, several), ()) for several in zip(*alike, strict=True)]


def _made(eqn: Any, of: Sequence[Factors]) -> list[Factors]:
    """Return the factors of the results of an equation without a body."""
    name, made = eqn.primitive.name, next(filter(None, of), ())
    if name == "mul":
        one, other = eqn.invars
        scaled = isinstance(one, Literal) or isinstance(other, Literal)
        if not scaled:
            made = () if one is other else (one, other)
    elif name == "div":
        made = of[0]
    elif name in ADDS:
        made = made if all(of) else ()
    elif name not in MOVES:
        made = ()
    return [made] * len(eqn.outvars)


def _parts(eqn: Any) -> list[Any]:
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [value for value in values if _is_jaxpr(value)]


def _is_kernel(eqn: Any) -> bool:
    """Return whether an equation has results that it computes in a way that is not known."""
    if eqn.primitive.name in KERNELS:
        return True
    known = eqn.primitive.name in PRODUCTS | KNOWN or _parts(eqn) or choices(eqn)
    return bool(eqn.outvars) and not known


def _product(eqn: Any, operands: Sequence[Any]) -> Product:
    avals = [v.aval for v in operands if hasattr(v.aval, "dtype")]
    return Product(
        eqn.primitive.name,
        tuple(a.dtype.name for a in avals),
        tuple(tuple(a.shape) for a in avals),
        eqn.outvars[0].aval.dtype.name if eqn.outvars else "",
        _is_kernel(eqn),
    )


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")
