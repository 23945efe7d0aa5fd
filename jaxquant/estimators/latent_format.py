"""`Latent`: the format of a weight in training, floats that are rounded anew in every matmul.

The forward pass is that of inference: the matrix is packed and multiplied by the kernel of its
format, with rounded rows. What `freeze` stores therefore gives the results of training bit for bit,
in integer arithmetic where the format uses it. The backward pass uses the rounded rows and the
packed matrix, from which gradients continue through the estimators.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.core import activations
from jaxquant.core.activations import Activations
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Estimator, Format, LevelFormat, RangeEstimator
from jaxquant.estimators.kurtosis import watched
from jaxquant.estimators.weight_estimators import chance, randomness, spread
from pallas_kernels import partition

KEY, EPSILON = "key", "epsilon"  # arrays of a weight that is perturbed where it is used


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How random directions are drawn.

    Attributes:
      signs: draw signs instead of normal numbers.
      relative: multiply the numbers of a weight by its quantization steps.
      shared: draw one number for an entire array (one per layer of a stack). So few numbers remain
        that a handful of losses determine the direction, but nothing outside their span can be
        reached.

    >>> Drawing(signs=True).values(jax.random.key_data(jax.random.key(0)), (3,)).tolist()
    [...1.0, ...1.0, ...1.0]
    """

    signs: bool = False
    relative: bool = False
    shared: bool = False

    __post_init__ = check_fields

    def values(self, key: Array, shape: tuple[int, ...], axes: int = 0) -> Float[Array, "..."]:
        """Draw numbers of zero mean and unit variance.

        Args:
          key: a typed PRNG key, or key data.
          shape: shape of the numbers.
          axes: number of leading axes along which a shared number is drawn anew.
        Returns:
          The numbers, float32; if shared, with axes of size 1 after the leading ones.
        """
        if self.shared:
            shape = shape[:axes] + (1,) * (len(shape) - axes)
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        key = key if typed else jax.random.wrap_key_data(key)
        draw = jax.random.rademacher if self.signs else jax.random.normal
        return draw(key, shape).astype(jnp.float32)

    def of(self, key: Array, latent: "Latent", data: dict[str, Array]) -> Float[Array, "k n"]:
        """Draw the direction of one latent matrix.

        Args:
          key: a PRNG key.
          latent: the matrix's format.
          data: its arrays.
        Returns:
          The direction.
        """
        z = self.values(key, data["codes"].shape)
        return z * latent.step(data) if self.relative else z


NORMAL = Drawing()


@dataclasses.dataclass(frozen=True)
class Latent(Format):
    """The format of a latent weight: floats [k, n] under the name "codes", and learned arrays.

    Attributes:
      format: the format to which the floats are rounded, and which `freeze` stores.
      estimator: estimator of the weights (`StraightThrough`, `LSQ`, ...).
      inputs: estimator of the activation ranges (`LSQRange`, `PACT`), or None if none are learned.
      drawing: distribution of the perturbation of a weight that holds a key.
    """

    format: Format
    estimator: Estimator
    inputs: RangeEstimator | None = None
    drawing: Drawing = NORMAL

    latent: ClassVar[bool] = True

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Raise ValueError: latent weights are made by `jaxquant.latent` and `thaw`."""
        raise ValueError(
            "Latent cannot encode weights: make latent weights with jaxquant.latent "
            "or jaxquant.thaw"
        )

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return what such weights lose to the format's range; ValueError if they do not fit."""
        return self.format.check(w)

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if the format cannot store a matrix [k, n]."""
        self.format.check_shape(k, n)

    def code_rows(self, k: int, n: int) -> int:
        """Return k: the codes are the floats."""
        return k

    def value(self, data: dict[str, Array]) -> Float[Array, "k n"]:
        """Return the rounded matrix.

        Args:
          data: arrays of the weight: "codes" and what the estimator learns.
        Returns:
          The matrix, differentiable in all arrays.
        """
        packed, data = self.packed(data), self.moved(data)
        return self.estimator.value(data["codes"], _learned(data), self.format, packed)

    def moved(self, data: dict[str, Array]) -> dict[str, Array]:
        """Return the arrays of a weight, perturbed if it holds a key.

        Args:
          data: arrays of the weight; "key" and "epsilon" say how it is perturbed.
        Returns:
          The arrays without these two.
        """
        if KEY not in data:
            return data
        data = dict(data)
        key, epsilon = data.pop(KEY), data.pop(EPSILON)
        z = self.drawing.of(key, self, data)
        return data | {"codes": data["codes"] + (epsilon * z).astype(data["codes"].dtype)}

    def step(self, data: dict[str, Array]) -> Float[Array, "k n"]:
        """Return the scale of every weight.

        Args:
          data: arrays of the weight.
        Returns:
          The scales.
        Raises:
          ValueError: the format has no levels.
        """
        if not isinstance(self.format, LevelFormat):
            raise ValueError(
                f"relative directions need a format with levels (a LevelFormat), got {self.format}"
            )
        grid = self.format.stored_grid(
            self.estimator.packed(data["codes"], _learned(data), self.format)
        )
        return spread(grid, self.format, data["codes"].shape).scale

    def packed(self, data: dict[str, Array]) -> dict[str, Array]:
        """Return the packed arrays of the rounded matrix.

        Args:
          data: arrays of the weight.
        Returns:
          The arrays of `format`; no gradient passes through them.
        """
        return _packed(self, jax.lax.stop_gradient(data), chance())

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        """Return the rounded matrix."""
        return self.value(data)

    def product(
        self,
        form: Activations | None,
        x: Float[Array, "m k"],
        data: dict[str, Array],
        of_inputs: dict[str, Array],
    ) -> Float[Array, "m n"]:
        """Return x @ w, with inputs rounded.

        Args:
          form: how inputs are rounded, or None.
          x: rows.
          data: arrays of the weight.
          of_inputs: arrays of the activations, learned or static.
        Returns:
          The product, float32.
        """
        if self.inputs is not None and form is not None:
            rounded = self.inputs.value(x, of_inputs, form)
            of_inputs = self.inputs.served(of_inputs, form)
        else:
            rounded = x.astype(jnp.float32) if form is None else form.straight(x, of_inputs)
        fixed = jax.lax.stop_gradient((x, self.packed(data), of_inputs))
        args = partition.varied(rounded, self.value(data), *fixed)
        return watched(_product((self.format, form, partition.in_force()), *args))

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        """Return x @ w, with x rounded in a form that kernels handle themselves."""
        return self.product(Activations.of(activations), x, data, {})

    def matmul_transposed(
        self, x: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        """Return x @ w.T."""
        packed = jax.lax.stop_gradient(self.packed(data))
        x = x.astype(jnp.float32)
        args = partition.varied(x, self.value(data), packed)
        return _product_transposed((self.format, k, partition.in_force()), *args)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        return self.value(data)[:, ids]

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        return self.value(data)[ids]

    def kernel(self) -> str:
        """Return a description of what computes a matmul."""
        return f"rounded for every product, then {self.format.kernel()}"


@partial(jax.jit, static_argnums=0)
def _packed(latent: Latent, data: dict[str, Array], key: Array | None) -> dict[str, Array]:
    """Return the packed arrays, by arithmetic that does not depend on the surrounding program.

    The barriers keep XLA from fusing it with other code, which would change the order of sums (such
    as those of a mean).
    """
    data = jax.lax.optimization_barrier(data)
    data = latent.moved(data)
    with randomness(key):  # an argument, because a compiled function cannot see the context
        packed = latent.estimator.packed(data["codes"], _learned(data), latent.format)
    return jax.lax.optimization_barrier(packed)


def batched(fn: Callable, axes: int) -> Callable:
    """Vectorize fn over leading axes.

    Args:
      fn: function of arrays.
      axes: number of leading axes.
    Returns:
      The vectorized function.
    """
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def _learned(data: dict[str, Array]) -> dict[str, Array]:
    return {name: a for name, a in data.items() if name != "codes"}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    how: tuple[Format, Activations | None, partition.Placement | None],
    rounded: Float[Array, "m k"],
    value: Float[Array, "k n"],
    x: Float[Array, "m k"],
    packed: dict[str, Array],
    of_inputs: dict[str, Array],
) -> Float[Array, "m n"]:
    """Return the kernel's product; gradients treat it as that of `rounded` and `value`."""
    format, form, placement = how
    rows, kernel_form, leave = activations.entered(form, x, of_inputs)
    with partition.placed(placement):  # again, as derivatives of a scan are traced later
        return leave(format.matmul(rows, packed, kernel_form))


def _forward(how: tuple, rounded: Array, value: Array, *fixed: PyTree) -> tuple[Array, tuple]:
    return _product(how, rounded, value, *fixed), (rounded, *fixed)


def _backward(how: tuple, kept: tuple, g: Array) -> tuple:
    rounded, x, packed, _ = kept
    with partition.placed(how[2]):
        back = how[0].matmul_transposed(g, packed, rounded.shape[-1])
    return back, rounded.T @ g, jnp.zeros_like(x), None, None


_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_transposed(
    how: tuple[Format, int, partition.Placement | None],
    x: Float[Array, "m n"],
    value: Float[Array, "k n"],
    packed: dict[str, Array],
) -> Float[Array, "m k"]:
    format, k, placement = how
    with partition.placed(placement):
        return format.matmul_transposed(x, packed, k)


def _transposed_forward(how: tuple, x: Array, value: Array, packed: dict) -> tuple:
    return _product_transposed(how, x, value, packed), (x, packed)


def _transposed_backward(how: tuple, kept: tuple, g: Array) -> tuple:
    format, _, placement = how
    x, packed = kept
    with partition.placed(placement):
        return format.matmul(g, packed), g.T @ x, None


_product_transposed.defvjp(_transposed_forward, _transposed_backward)
