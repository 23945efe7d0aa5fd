"""`Adapted`: the format of a frozen matrix with an adapter, whose few numbers are trained.

Products come from the kernels of the matrix's own format, in both directions. Unless the adapter
trains on floats (L4Q), the matrix stays packed, and no float copy of it outlives a product.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.core import activations
from jaxquant.core.activations import Activations
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Adapter, Format, lacking
from jaxquant.core.straight_through import through
from jaxquant.core.tensor import QTensor
from jaxquant.estimators.weight_estimators import chance
from pallas_kernels import partition

# The labels of the arrays that adapters add.
LABELS = LORA_A, LORA_B, MAGNITUDE, TERNARY = ("lora_a", "lora_b", "magnitude", "ternary")


@dataclasses.dataclass(frozen=True)
class Adapted(Format):
    """The packed arrays of a format, and the trained arrays of an adapter beside them.

    Attributes:
      format: format of the matrix. A `Latent` format may be trained together with the adapter, in a
        loop of one's own.
      adapter: what is trained (`LoRA`, `QALoRA`, ...).
    """

    format: Format
    adapter: Adapter

    latent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        for name, kind in (("format", Format), ("adapter", Adapter)):
            if wrong := lacking(kind, getattr(self, name)):
                raise ValueError(f"{name}: {wrong}")

    @property
    def codes_ndim(self) -> int:  # type: ignore[override]
        """Number of axes of "codes" for one matrix."""
        return 2 if self.adapter.floating else self.format.codes_ndim

    @property
    def tile(self) -> tuple[int, int]:  # type: ignore[override]
        """Number of rows and of columns of the matrix that one code covers."""
        return (1, 1) if self.adapter.floating else self.format.tile

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Raise ValueError: adapters are put on quantized weights by `jaxquant.adapt`."""
        raise ValueError("Adapted cannot encode weights: use jaxquant.adapt(params, adapter)")

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored or adapted."""
        self.format.check_shape(k, n)
        self.adapter.check(self.format, k, n)

    def code_rows(self, k: int, n: int) -> int:
        return k if self.adapter.floating else self.format.code_rows(k, n)

    def outputs(self, data: dict[str, Array]) -> int:
        return data["codes"].shape[-1] if self.adapter.floating else self.format.outputs(data)

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        """Return the adapted matrix."""
        return self.adapter.value(self.format, data, k)

    def product(
        self,
        form: Activations | None,
        x: Float[Array, "m k"],
        data: dict[str, Array],
        of_inputs: dict[str, Array],
    ) -> Float[Array, "m n"]:
        """Return x @ w, with the inputs of the packed product rounded.

        Args:
          form: how inputs are rounded, or None.
          x: rows.
          data: arrays of the weight.
          of_inputs: arrays of the activation format.
        Returns:
          The product, float32.
        """
        return self.adapter.product(self.format, form, x, data, of_inputs)

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        """Return x @ w, with x rounded in a form that kernels handle themselves."""
        return self.product(Activations.of(activations), x, data, {})

    def matmul_transposed(
        self, g: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        return self.adapter.product_transposed(self.format, g, data, k)

    def to_disk(self, data: dict[str, Array], k: int) -> dict[str, Array]:
        """Return what the format stores on disk, and the trained arrays."""
        return data if self.adapter.floating else self.format.to_disk(data, k)

    def from_disk(self, kept: dict[str, Array], k: int) -> dict[str, Array]:
        """Invert `to_disk`."""
        return kept if self.adapter.floating else self.format.from_disk(kept, k)

    def kernel(self) -> str:
        """Return a description of what computes a matmul."""
        return f"{self.format.kernel()}, with {type(self.adapter).__name__}"


def frozen_product(
    format: Format,
    form: Activations | None,
    x: Float[Array, "m k"],
    data: dict[str, Array],
    of_inputs: dict[str, Array],
) -> Float[Array, "m n"]:
    """Return x @ w for a packed matrix w that is not trained; differentiable in x.

    The backward pass keeps the packed arrays only, and multiplies by them again. A format in
    training (`Latent`) trains on: its own product is differentiable in its arrays.

    Args:
      format: format of the matrix.
      form: how inputs are rounded, or None.
      x: the rows.
      data: the packed arrays; other arrays are ignored by the format.
      of_inputs: arrays of the activation format.
    Returns:
      The product, float32.
    """
    if format.latent:
        return format.product(form, x, data, of_inputs)
    rounded = x if form is None else form.straight(x, of_inputs)
    how = _How(format, form, x.shape[-1], rounded.dtype.name, partition.in_force())
    fixed = jax.lax.stop_gradient((x, data, of_inputs))
    return _frozen(how, *partition.varied(rounded, *fixed))


def served_product(
    format: Format,
    form: Activations | None,
    x: Float[Array, "m k"],
    data: dict[str, Array],
    of_inputs: dict[str, Array],
) -> Float[Array, "m n"]:
    """Return x @ w as inference computes it, differentiable in x and in the arrays of the format.

    Args:
      format, form, x, data, of_inputs: as in `frozen_product`.
    """
    rows, kernel_form, leave = activations.entered(form, x, of_inputs)
    return leave(format.matmul(rows, data, kernel_form))


@dataclasses.dataclass(frozen=True)
class _How:
    """What is static in a product: the formats, the rows of w, the dtype of x, and the mesh.

    JAX traces derivatives of a scan later, where `partition.placed` is no longer in force.
    """

    format: Format
    form: Activations | None
    k: int
    dtype: str
    placement: partition.Placement | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(how: _How, rounded: Array, x: Array, data: PyTree, of_inputs: PyTree) -> Array:
    """Return the kernel's product of x; gradients treat it as that of `rounded`."""
    with partition.placed(how.placement):
        return served_product(how.format, how.form, x, data, of_inputs)


def _forward(how: _How, rounded: Array, x: Array, data: PyTree, of_inputs: PyTree) -> tuple:
    return _frozen(how, rounded, x, data, of_inputs), data


def _backward(how: _How, data: PyTree, g: Array) -> tuple:
    g = g.astype(how.dtype)  # as it was before the result was widened to float32
    with partition.placed(how.placement):
        back = how.format.matmul_transposed(g, data, how.k).astype(how.dtype)
    return back, None, None, None


_frozen.defvjp(_forward, _backward)


def dropped(x: Float[Array, "m k"], share: float, lora_a: Array) -> Float[Array, "m k"]:
    """Set a share of the entries to zero and scale up the others, inside `randomness(key)` only.

    Outside of it x is returned unchanged, so inference needs no switch.

    Args:
      x: the rows.
      share: fraction of the entries to drop, in [0, 1).
      lora_a: the matrix A. The sum of its bits gives every weight its own key, also in a scan over
        layers, where the key of `randomness` is the same.
    """
    key = chance()
    if not share or key is None:
        return x
    bits = jax.lax.bitcast_convert_type(lora_a.astype(jnp.float32), jnp.uint32)
    key = jax.random.fold_in(key, jnp.sum(bits))
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / (1 - share), 0).astype(x.dtype)


def cast_through(x: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """Return x as it is after storage in a dtype, in float32, with the gradient of x.

    Args:
      x: the values.
      dtype: name of the storage dtype.
    """
    stored = jax.lax.optimization_barrier(jax.lax.stop_gradient(x).astype(dtype))
    return through(x.astype(jnp.float32), stored.astype(jnp.float32))


def is_adapted(w: PyTree) -> bool:
    """Return whether a leaf is a weight with an adapter.

    Args:
      w: leaf of a tree.
    """
    return isinstance(w, QTensor) and isinstance(w.format, Adapted)
