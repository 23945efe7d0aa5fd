"""`QTensor`: packed codes that stand in for a weight, and the arithmetic of one matrix."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxquant.core.activations import Activations
from jaxquant.core.fields import brief, check_fields
from jaxquant.core.magnitude import shifted, unit
from jaxquant.core.protocols import Format, Transform
from jaxquant.core.standin import Pick, StandIn, arguments, is_array, note
from pallas_kernels import partition
from pallas_kernels.context import compiled


@dataclasses.dataclass(frozen=True)
class View:
    """How the stored array [*batch, k, n] maps to the axes of the weight.

    Attributes:
      k: sizes of the contracted axes that are merged into k, slowest-varying first.
      n: sizes of the output axes that are merged into n, slowest-varying first.
      order: axis i of the weight is axis order[i] of [*batch, *k, *n], counted from the end.
    """

    k: tuple[int, ...]
    n: tuple[int, ...]
    order: tuple[int, ...]

    __post_init__ = check_fields


class Arrays(NamedTuple):
    """The arrays of a weight, grouped by what they belong to.

    Attributes:
      data: packed arrays of the format.
      input: arrays of the input transform.
      output: arrays of the output transform.
      activations: arrays of the activation format.
    """

    data: dict[str, Array]
    input: dict[str, Array]
    output: dict[str, Array]
    activations: dict[str, Array]


class QTensor(StandIn):
    """A quantized weight: a JAX pytree of packed arrays that acts as an array in any function.

    Invariants:
      Every array has the same leading batch axes, `leading()` of them, followed by the axes that
        the format gives one matrix [k, n], or that `input`, `output` and `activations` state in
        `shapes`.
      A transform that is None has no arrays; neither has an activation format that is not static.
      `data` contains "codes". All other fields are static, and equal for all matrices of a stack.

    Attributes:
      data: the format's packed arrays.
      format: codebook and storage (static, hashable).
      view: which axes of the weight are contracted, batch and output axes (static).
      logical_dtype: name of the dtype of the weight it stands for (static).
      method: name of the method that made it (static).
      input, output: transforms A and B, or None; the weight is A W B^T, where W is the matrix
        stored in the format.
      shared: name common to the weights that read the same input in the function they were
        quantized for, through equal transforms (arrays included); "" if unknown. The input is then
        transformed once, and the matmuls are a single call on platforms that have one. The name
        starts with the number of these weights, "3 of", because trees quantized separately may
        contain equal names: if more weights than that carry it, their inputs are taken to differ.
        The arrays that calibration or training produced are part of the name.
      activations: how the (transformed) input is rounded before it meets the codes, an
        `Activations`; None leaves it unrounded.
      input_data, output_data, activations_data: arrays of the transforms and of the activation
        format.
      placement: how its products are split over a mesh whose axes are Auto; None outside of
        functions wrapped by `quantized`.
    """

    data: dict[str, Array]
    format: Format = eqx.field(static=True)
    view: View = eqx.field(static=True)
    logical_dtype: str = eqx.field(static=True)
    method: str = eqx.field(static=True, default="")
    input: Transform | None = eqx.field(static=True, default=None)
    output: Transform | None = eqx.field(static=True, default=None)
    shared: str = eqx.field(static=True, default="")
    activations: Activations | None = eqx.field(static=True, default=None)
    input_data: dict[str, Array] = eqx.field(default_factory=dict)
    output_data: dict[str, Array] = eqx.field(default_factory=dict)
    activations_data: dict[str, Array] = eqx.field(default_factory=dict)
    placement: partition.Placement | None = eqx.field(static=True, default=None)

    @property
    def arrays(self) -> Arrays:
        """All arrays, grouped."""
        return Arrays(self.data, self.input_data, self.output_data, self.activations_data)

    def with_arrays(self, arrays: Arrays, **fields: Any) -> "QTensor":
        """Return a copy with these arrays.

        Args:
          arrays: all arrays of the copy.
          **fields: other fields to replace.
        """
        return dataclasses.replace(
            self,
            data=arrays.data,
            input_data=arrays.input,
            output_data=arrays.output,
            activations_data=arrays.activations,
            **fields,
        )

    @property
    def named(self) -> dict[str, Array]:
        """All arrays in one dict; those outside the format have a prefix, such as "input.signs".

        Checkpoints and training refer to the arrays by these names.
        """
        return flat_names(self.arrays)

    def with_named(self, named: Mapping[str, Array], **fields: Any) -> "QTensor":
        """Return a copy with the arrays of a dict such as `named`.

        Args:
          named: all arrays of the copy.
          **fields: other fields to replace.
        """
        return self.with_arrays(by_kind(named), **fields)

    def unnamed(self) -> "QTensor":
        """Return a copy without `shared` and `method`, so that weights alike share programs."""
        return dataclasses.replace(self, shared="", method="")

    @property
    def order(self) -> tuple[int, ...]:  # type: ignore[override]
        """Axis order of the view."""
        return self.view.order

    @property
    def nbytes(self) -> int:
        """Number of bytes of all arrays: codes, scales, zero points, codebooks."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self.arrays))

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / number of weights."""
        return 8 * self.nbytes / self.size

    def dequantize(self) -> Array:
        """Return the weight as a plain array of `shape` and `dtype`, by one compiled program."""
        return _decoded(self.unnamed())

    def materialise(self) -> Array:
        """Dequantize for a primitive without a rule: correct but slow; `explain` reports it."""
        note("materialised", "no rule for this use; dequantized, then plain JAX")
        return self.dequantize()

    @property
    def rows_k(self) -> int:
        """Length of the contracted axis k."""
        return math.prod(self.view.k)

    @property
    def stored_rows(self) -> int:
        """Length of the contracted axis after the input transform."""
        return self.rows_k if self.input is None else self.input.size(self.rows_k)

    def leading(self) -> int:
        return len(self.data["codes"].shape) - self.format.codes_ndim

    def stored_shape(self) -> tuple[int, ...]:
        return (*self.data["codes"].shape[: self.leading()], *self.view.k, *self.outputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the output axes; inside `shard_map`, the sizes on one device."""
        local = len(self.view.n) == 1 and self.output is None
        return (self.format.outputs(self.data),) if local else self.view.n

    # --- one matrix [k, n], without the batch axes --------------------------------------------

    def stored(self) -> Float[Array, "... s t"]:
        """Decode the matrices of the format, without undoing the transforms."""
        return self.format.dequantize(self.data, self.stored_rows)

    def matrix(self, arrays: Arrays) -> Float[Array, "k n"]:
        """Decode one matrix, with the transforms undone.

        Args:
          arrays: the arrays of that matrix, without batch axes.

        Returns:
          The matrix, [k, n], float32.
        """
        w = self.format.dequantize(arrays.data, self.stored_rows)
        if self.input is None and self.output is None:
            return w
        w, e = unit(w)  # keeps the sums of tiny entries out of float32's subnormal range
        if self.input is not None:
            w = self.input.transposed(w.T, arrays.input, self.rows_k).T
        if self.output is not None:
            w = self.output.transposed(w, arrays.output, math.prod(self.view.n))
        return shifted(w, e)

    def transformed(self, x: Float[Array, "m k"], arrays: Arrays) -> Float[Array, "m s"]:
        """Apply the input transform.

        Args:
          x: the rows, [m, k].
          arrays: the arrays of one matrix.

        Returns:
          The rows as the stored matrix expects them, [m, s].
        """
        return x if self.input is None else self.input.apply(x, arrays.input)

    def finished(self, y: Float[Array, "m t"], arrays: Arrays) -> Float[Array, "m n"]:
        """Undo the output transform.

        Args:
          y: a product with the stored matrix, [m, t].
          arrays: the arrays of that matrix.

        Returns:
          The product with the weight, [m, n].
        """
        if self.output is None:
            return y
        return self.output.transposed(y, arrays.output, math.prod(self.view.n))

    def siblings(self) -> "list[QTensor]":
        """Return the arguments of the running function that read this one's input, itself included.

        They agree in `shared`, `rows_k`, `format`, `input`, `activations`, `logical_dtype` and the
        number of batch axes.
        """
        alike = lambda w: (
            w.rows_k, w.format, w.input, w.activations, w.leading(), w.logical_dtype, w.placement
        )  # fmt: skip
        named = [w for w in arguments() if isinstance(w, QTensor) and w.shared == self.shared]
        different = {tuple(map(id, jax.tree.leaves(w.arrays))) for w in named}
        if len(different) > _readers(self.shared):  # from several trees, so with several inputs
            return [self]
        mine = alike(self)
        known = [w for w in named if alike(w) == mine]
        return known if any(map(self.same, known)) else [self]

    def same(self, other: "QTensor") -> bool:
        """Return whether `other` holds the very same arrays (by identity)."""
        mine, others = self.named, other.named
        return all(others.get(name) is a for name, a in mine.items())

    def matmul_transposed(self, g: Float[Array, "m n"], arrays: Arrays) -> Array:
        """Return g @ w.T for one matrix.

        Args:
          g: [m, n].
          arrays: the arrays of that matrix, without batch axes.

        Returns:
          The product, [m, k].
        """
        k = self.rows_k
        if self.output is not None:
            g = self.output.apply(g, arrays.output)
        y = self.format.matmul_transposed(g, arrays.data, self.stored_rows)
        return y if self.input is None else self.input.transposed(y, arrays.input, k)

    def aval(self) -> jax.core.ShapedArray:
        sharding = partition.sharding(self.data["codes"], self._spec)
        return jax.core.ShapedArray(
            self.view_shape(), jnp.dtype(self.logical_dtype), sharding=sharding
        )

    def _spec(self, codes: Sequence[Any]) -> list[Any]:
        """Return how the axes of the weight are split, where those of the codes are split so."""
        leading = self.leading()
        k, n = [None] * len(self.view.k), [None] * len(self.view.n)
        k[0], n[0] = codes[leading], codes[-1]
        stored = [*codes[:leading], *k, *n]
        return [stored[axis] for axis in self.axes()]

    def reordered(self, order: tuple[int, ...]) -> "QTensor":
        return dataclasses.replace(self, view=dataclasses.replace(self.view, order=order))

    def cast(self, dtype: DTypeLike) -> "QTensor":
        return dataclasses.replace(self, logical_dtype=jnp.dtype(dtype).name)

    def at_leading(self, fn: Callable[[Array], Array]) -> "QTensor":
        # The other weights no longer know which matrix of the stack this is, so nothing is shared.
        # Neither is it known how what is left of the stack lies on a mesh.
        placement = self.placement and dataclasses.replace(self.placement, stack=())
        return self.with_arrays(jax.tree.map(fn, self.arrays), shared="", placement=placement)

    def picked(self, pick: Pick) -> "StandIn | None":
        # A matrix looked up out of range is NaN. Only float arrays (scales) can express that.
        floats = any(jnp.issubdtype(a.dtype, jnp.inexact) for a in self.data.values())
        return super().picked(pick) if floats or not pick.fills else None

    def local(self) -> "QTensor":
        held, rows = self.data["codes"].shape[self.leading()], self.stored_rows
        n = self.format.outputs(self.data)
        parts = self.format.code_rows(rows, n) / held
        if parts == 1 or self.format.codes_ndim != 2:
            return self
        shape = f"{list(self.view.k)} by {list(self.view.n)}"
        split = f"the rows of a weight {shape} are split over devices"
        if self.format.latent:
            raise ValueError(
                f"{split}, which a weight in training cannot be: split it along its outputs"
            )
        first = self.view.k[0] / parts
        rest = {name: a.shape[self.leading() :] for name, a in self.data.items()}
        whole = first.is_integer() and (rows / parts).is_integer() and self.input is None
        if not whole or _packed_shapes(self.format, int(rows / parts), n) != rest:
            raise ValueError(
                f"{split} where its codes cannot be: {self.format} needs whole groups and words on "
                "every device, and no input transform; split the weight along its outputs"
            )
        view = dataclasses.replace(self.view, k=(int(first), *self.view.k[1:]))
        return dataclasses.replace(self, view=view, shared="")

    def __repr__(self) -> str:
        if not all(hasattr(a, "shape") and is_array(a) for a in self.named.values()):
            # It is a tree of shardings, for example.
            return f"QTensor({self.named}, {brief(self.format)})"
        facts = [f"{self.logical_dtype}{list(self.shape)}", self.method, brief(self.format)]
        if self.activations is not None:
            facts.append(f"{self.activations} inputs")
        facts.append(f"{self.bits_per_weight:.3f} bits per weight")
        return f"QTensor({', '.join(filter(None, facts))})"


@compiled
def _decoded(weight: QTensor) -> Array:
    batch, matrix, format = weight.data["codes"].shape, weight.matrix, weight.format
    if format.exact:  # bits, which no operation on floats may touch
        matrix = lambda arrays: format.decode_bits(arrays.data, weight.stored_rows)
    for _ in range(weight.leading()):
        matrix = jax.vmap(matrix)
    w = matrix(weight.arrays)
    w = w.reshape(*batch[: weight.leading()], *weight.view.k, *weight.outputs)
    w = jnp.transpose(w, weight.axes())
    if format.exact:
        w = jax.lax.bitcast_convert_type(w, jnp.dtype(format.own))
    elif weight.logical_dtype == "float16":  # rounding may have gone past its largest number
        w = jnp.clip(w, -65504.0, 65504.0)
    return w.astype(weight.logical_dtype)


def _packed_shapes(format: Format, k: int, n: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the packed arrays of a [k, n] matrix; none if it cannot be stored."""
    try:
        format.check_shape(k, n)
    except ValueError:
        return {}
    return {name: a.shape for name, a in format.shapes(k, n).items()}


def _readers(name: str) -> float:
    """Return the number of weights that a `shared` name states; infinity if it states none."""
    count, of, _ = name.partition(" of ")
    return int(count) if of and count.isdecimal() else math.inf


def flat_names(arrays: Arrays) -> dict[str, Array]:
    """Merge the arrays into one dict: the format's under their own names, others with a prefix.

    Args:
      arrays: the arrays of a weight.

    Returns:
      Arrays by name, such as "codes" and "input.signs".
    """
    kinds = zip(Arrays._fields[1:], arrays[1:], strict=True)
    return arrays.data | {f"{kind}.{name}": a for kind, of in kinds for name, a in of.items()}


def by_kind(named: Mapping[str, Array]) -> Arrays:
    """Split a dict of arrays by the prefixes of their names; the inverse of `flat_names`.

    >>> by_kind({"codes": 1, "input.0.signs": 2}).input
    {'0.signs': 2}
    """
    found: dict[str, dict[str, Array]] = {kind: {} for kind in Arrays._fields}
    for name, a in named.items():
        kind, dot, own = name.partition(".")
        found[kind if dot else "data"][own if dot else name] = a
    return Arrays(**found)
