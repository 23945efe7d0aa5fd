"""`Observed`: a weight whose product says, by way of a cotangent, what its input was like.

`dot(x, w, probe)` has a backward rule whose cotangent for the probe is a summary of x and of the
gradient at the output, whatever summary is asked for. So one `jax.grad` collects every layer, those
inside `lax.scan` included; where a function multiplies by one weight several times, they add up.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float

from jaxquant.contraction import Contraction
from jaxquant.standin import StandIn, is_standin


class Seen(NamedTuple):
    """What one product with one matrix saw.

    Attributes:
      rows: its input.
      energy: |g|^2 of every row, g the gradient at the output.
      output: g.
    """

    rows: Float[Array, "m k"]
    energy: Float[Array, " m"]
    output: Float[Array, "m n"]


class Summary(Protocol):
    """What is kept of the products with a matrix [k, n]; hashable, for it is static."""

    def zeros(self, k: int, n: int) -> Any:
        """Nothing seen yet: a pytree of float32 arrays."""

    def of(self, seen: Seen) -> Any:
        """Of one product: a pytree like it."""


class Observed(StandIn):
    """A dense weight with a probe, stored [*batch, ...]; its matmul fills the probe."""

    array: Array
    probe: Any
    order: tuple[int, ...] = eqx.field(static=True)
    core: int = eqx.field(static=True)  # axes that are not batch axes
    # Stored axes, from the end, that are summed over.
    contracted: tuple[int, ...] = eqx.field(static=True)
    summary: Summary = eqx.field(static=True)

    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def aval(self) -> Any:
        return jax.core.ShapedArray(self.view_shape(), self.array.dtype)

    def materialise(self) -> Array:
        return jnp.transpose(self.array, self.axes())

    def reordered(self, order: tuple[int, ...]) -> "Observed":
        return dataclasses.replace(self, order=order)

    def cast(self, dtype: Any) -> "Observed":
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def at_leading(self, fn: Any) -> "Observed":
        array, probe = jax.tree.map(fn, (self.array, self.probe))
        return dataclasses.replace(self, array=array, probe=probe)

    def leading(self) -> int:
        return self.array.ndim - self.core


@quax.register(jax.lax.dot_general_p)
def _(x: Any, w: Observed, **params: Any) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=False)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: Observed, x: Any, **params: Any) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=True)


def _observe(x: Array, w: Observed, params: dict[str, Any], *, weight_left: bool) -> Array:
    """The plain dot, with the rule that fills the probe in the backward pass."""
    axes, leading = w.axes(), w.leading()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=weight_left)
    inner = {a for a in c.contracted(axes) if a >= leading}

    def dot(x: Array, dense: Array) -> Array:
        operands = (dense, x) if weight_left else (x, dense)
        return jax.lax.dot_general_p.bind(*operands, **params)

    def summary(x: Array, g: Array) -> Any:
        rows, paired = c.rows(x, axes, leading, inner)
        missing = [i for i, has in enumerate(paired) if not has]
        rows = jnp.expand_dims(rows, missing).astype(jnp.float32)
        of: Callable[[Seen], Any] = w.summary.of
        sizes = w.stored_shape()[:leading]
        seen = Seen(rows, c.energy(g, axes, leading), c.output_rows(g, axes, leading))
        for size in reversed(sizes):
            of = _mapped(of, size)
        found = of(seen)
        return jax.tree.map(lambda a, like: a.astype(like.dtype), found, w.probe)

    ndim = len(w.stored_shape())
    if {a - ndim for a in inner} != set(w.contracted):  # the other way round: not this one's
        return dot(x, w.materialise())
    return _observed_dot(dot, summary, x, w.materialise(), w.probe)


def _mapped(of: Callable[[Seen], Any], size: int) -> Callable[[Seen], Any]:
    """`of` along a leading axis, which is 1 for what is the same all along it."""

    def mapped(seen: Seen) -> Any:
        axes: Any = Seen(*(0 if len(a) == size else None for a in seen))  # type: ignore[arg-type]
        one = Seen(*(a if axis == 0 else a[0] for a, axis in zip(seen, axes, strict=True)))
        return jax.vmap(of, in_axes=(axes,), axis_size=size)(one)

    return mapped


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed_dot(dot: Callable, summary: Callable, x: Array, w: Array, probe: Any) -> Array:
    return dot(x, w)


def _forward(dot: Callable, summary: Callable, x: Array, w: Array, probe: Any) -> Any:
    return dot(x, w), (x, w)


def _backward(dot: Callable, summary: Callable, residuals: Any, g: Array) -> Any:
    x, w = residuals
    _, pull = jax.vjp(dot, x, w)
    return *pull(g), summary(x, g)


_observed_dot.defvjp(_forward, _backward)
