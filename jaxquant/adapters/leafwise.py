"""What a traced function mixes: which inputs reach an output, and whether rows stay apart."""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Any

import jax
from jax.extend.core import Literal

from jaxquant.core.jax_private import jit_p

# What moves data along an axis that its shape does not tell.
_MOVING = (
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "rev",
    "scatter",
    "sort",
    "cum",
    "top",
)
_RANDOM = ("random_", "rng_", "threefry")


def abstract(a: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array, on no device in particular.

    Args:
      a: an array, a number, or the shape and dtype of one.
    Returns:
      Its shape and dtype; a Python number's dtype stays weak.

    >>> abstract(1.0)
    ShapeDtypeStruct(shape=(), dtype=float32, weak_type=True)
    """
    if not isinstance(a, jax.ShapeDtypeStruct):
        a = jax.typeof(a)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type)


def reached(jaxpr: Any, marks: Sequence[int]) -> list[int]:
    """Return the marks of all inputs that each output depends on.

    Control flow other than `cond` counts as if each of its results depended on all its operands.

    Args:
      jaxpr: an open jaxpr.
      marks: of every input a set, as the bits of an integer.
    Returns:
      Of every output the union of the sets.

    >>> import jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(lambda a, b: (2 * a, a + b))(1.0, 1.0).jaxpr
    >>> reached(jaxpr, [1, 2])
    [1, 3]
    """
    known = dict(zip(jaxpr.invars, marks, strict=True))
    of = lambda variables: [0 if isinstance(v, Literal) else known.get(v, 0) for v in variables]
    for eqn in jaxpr.eqns:
        ins = of(eqn.invars)
        outs = [reduce(or_, ins, 0)] * len(eqn.outvars)
        if eqn.primitive is jit_p:
            outs = reached(eqn.params["jaxpr"].jaxpr, ins)
        elif eqn.primitive.name == "cond":  # of which the first operand chooses
            each = [reached(branch.jaxpr, ins[1:]) for branch in eqn.params["branches"]]
            outs = [reduce(or_, bits, ins[0]) for bits in zip(*each, strict=True)]
        known.update(zip(eqn.outvars, outs, strict=True))
    return of(jaxpr.outvars)


def draws(jaxpr: Any) -> bool:
    """Whether random numbers are drawn anywhere in a jaxpr.

    Args:
      jaxpr: an open jaxpr.
    Returns:
      True if any equation draws or splits.

    >>> draws(jax.make_jaxpr(lambda key: jax.random.bits(key))(jax.random.key(0)).jaxpr)
    True
    """
    named = any(eqn.primitive.name.startswith(_RANDOM) for eqn in jaxpr.eqns)
    return named or any(draws(inner) for eqn in jaxpr.eqns for inner in _inside(eqn))


def treats_rows_alone(
    f: Callable, whole: Sequence[jax.ShapeDtypeStruct], piece: Sequence[jax.ShapeDtypeStruct]
) -> bool:
    """Whether f may be computed some rows at a time.

    It may if it makes the same computation of some rows as of all, in which everything computed
    from rows has as many rows. A norm, for example, has none.

    Args:
      f: a function of arrays that returns any tree of arrays.
      whole: the shapes of its arguments.
      piece: the same with fewer rows, that is with a shorter first axis, in those arguments that
        have rows.
    Returns:
      True if it certainly may; False if it may not, or if that is not known.

    >>> import jax.numpy as jnp
    >>> whole, piece = (jax.ShapeDtypeStruct((n, 3), jnp.float32) for n in (8, 2))
    >>> treats_rows_alone(lambda a: a / jnp.sum(a, axis=1, keepdims=True), [whole], [piece])
    True
    >>> treats_rows_alone(lambda a: a / jnp.sum(a), [whole], [piece])
    False
    """
    marks = [a.shape != b.shape for a, b in zip(whole, piece, strict=True)]
    a, b = jax.make_jaxpr(f)(*whole).jaxpr, jax.make_jaxpr(f)(*piece).jaxpr
    return _rows(a, b, marks) is not None


def _rows(a: Any, b: Any, marks: Sequence[bool]) -> list[bool] | None:
    """Return which outputs have rows; None if rows are mixed. Jaxpr a is of all rows, b of some."""
    if len(a.eqns) != len(b.eqns):
        return None
    known = {v for v, mark in zip(a.invars, marks, strict=True) if mark}
    has = lambda v: not isinstance(v, Literal) and v in known
    for x, y in zip(a.eqns, b.eqns, strict=True):
        ins = [has(v) for v in x.invars]
        outs: list[bool] | None = [any(ins)] * len(x.outvars)
        if x.primitive is not y.primitive:
            return None
        if x.primitive is jit_p:
            outs = _rows(x.params["jaxpr"].jaxpr, y.params["jaxpr"].jaxpr, ins)
        elif _mixes(x, y, ins):
            return None
        if outs is None:
            return None
        known |= {v for v, out in zip(x.outvars, outs, strict=True) if out}
    return [has(v) for v in a.outvars]


def _mixes(x: Any, y: Any, ins: Sequence[bool]) -> bool:
    """Whether an equation may mix rows; x is of all rows, y of some."""
    shapes = [(v.aval.shape, w.aval.shape) for v, w in zip(x.outvars, y.outvars, strict=True)]
    if not any(ins):  # a constant: the same in every row, but not a count of them
        return x.primitive.name == "iota" and any(v != w for v, w in shapes)
    if any(True for _ in _inside(x)) or (ins[0] and x.primitive.name.startswith(_MOVING)):
        return True
    return any(v[:1] == w[:1] or v[1:] != w[1:] for v, w in shapes)


def _inside(eqn: Any) -> Iterator[Any]:
    """Yield the jaxprs in an equation's parameters."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner
