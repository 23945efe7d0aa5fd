"""Base of adapters whose packed matrix is made anew for every product: L4Q and LoTA.

Products are those of the kernels of the format with the merged matrix, so training and serving are
one model. The backward pass keeps the inputs and the arrays of the adapter, and merges again.
"""

import abc
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.adapters.adapted import served_product
from jaxquant.core.protocols import Adapter, Data, Format
from jaxquant.formats.integer import Integer
from jaxquant.formats.offset import Offset
from pallas_kernels import partition


class Requantized(Adapter):
    """An exact adapter that defines `merged` and the gradients of the merged matrix."""

    exact: ClassVar[bool] = True

    @abc.abstractmethod
    def cotangents(self, format: Any, data: Data, g: Float[Array, "k n"]) -> Data:
        """Return the cotangents of the trained arrays, given that of the merged matrix.

        Args:
          format: the format `home`.
          data: all arrays of the adapted matrix.
          g: the cotangent of the merged matrix.
        """

    def product(
        self, format: Any, form: Any, x: Float[Array, "m k"], data: Data, of_inputs: Data
    ) -> Float[Array, "m n"]:
        rounded = x if form is None else form.straight(x, of_inputs)
        how = _How(self, format, form, partition.in_force())
        return _product(how, *partition.varied(rounded, jax.lax.stop_gradient(x), data, of_inputs))

    def value(self, format: Any, data: Data, k: int) -> Float[Array, "k n"]:
        return _value(_How(self, format, None, None), data, k)


class _How(NamedTuple):
    """What is static in a product: the adapter, the format, how inputs are rounded, the mesh."""

    adapter: Requantized
    format: Any
    form: Any
    placement: partition.Placement | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, rounded: Array, x: Array, data: PyTree, of_inputs: PyTree) -> Array:
    """Return the kernel's product with the merged matrix; x is rounded as `rounded` is."""
    packed = how.adapter.merged(how.format, data, x.shape[-1])
    with partition.placed(how.placement):
        return served_product(how.format, how.form, x, packed, of_inputs)


def _forward(how: _How, rounded: Array, x: Array, data: PyTree, of_inputs: PyTree) -> tuple:
    return _product(how, rounded, x, data, of_inputs), (rounded, data)


def _backward(how: _How, kept: tuple, g: Array) -> tuple:
    rounded, data = kept
    packed = how.adapter.merged(how.format, data, rounded.shape[-1])
    with partition.placed(how.placement):
        back = how.format.matmul_transposed(g, packed, rounded.shape[-1]).astype(rounded.dtype)
    outer = jnp.dot(rounded.T, g.astype(rounded.dtype), preferred_element_type=jnp.float32)
    return back, None, _all(how, data, outer), None


_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _value(how: _How, data: PyTree, k: int) -> Float[Array, "k n"]:
    return how.format.decode(how.adapter.merged(how.format, data, k), k)


_value.defvjp(
    lambda how, data, k: (_value(how, data, k), data),
    lambda how, k, data, g: (_all(how, data, g),),
)


def _all(how: _How, data: PyTree, g: Float[Array, "k n"]) -> PyTree:
    """Return the cotangents of all arrays: zero for those that are not trained."""
    new = how.adapter.cotangents(how.format, data, g)
    cast = lambda name, a: new[name].astype(a.dtype) if name in new else _nothing(a)
    return {name: cast(name, a) for name, a in data.items()}


def _nothing(a: Array) -> Any:
    if jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.zeros_like(a)
    return np.zeros(a.shape, jax.dtypes.float0)


def summed(rows: int, a: Float[Array, "k n"]) -> Float[Array, "g n"]:
    """Return the sum over each group of rows, the last of which may be short.

    Args:
      rows: number of rows per group.
      a: the matrix.

    >>> summed(2, jnp.ones((3, 1))).ravel().tolist()
    [2.0, 1.0]
    """
    k, n = a.shape
    return jnp.pad(a, ((0, -k % rows), (0, 0))).reshape(-1, rows, n).sum(1)


def check_integer(what: str, home: Format, format: Format) -> None:
    """Raise ValueError unless integers with offsets hold the merged matrix.

    Args:
      what: what the adapter does, for the message.
      home: the format of the merged matrix.
      format: the format before it was adapted.
    """
    if not (isinstance(home, Offset) and isinstance(home.format, Integer)):
        raise ValueError(
            f"{what}: it needs the format Integer, with groups of rows or one group per output, "
            f"got {format}; LoRA adapts every format"
        )
