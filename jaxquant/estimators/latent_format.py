"""`Latent`: the format of a weight that trains, floats that are rounded anew in every product.

The forward pass is the one that serves: the matrix is packed, and the kernel of its format takes
the rounded rows. So what `freeze` stores gives what training saw, bit for bit, in integers where
these are used. The backward pass has the rounded rows and the packed matrix; from them derivatives
go on through the estimators.
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

KEY, EPSILON = "key", "epsilon"  # of a weight that is moved at random where it is used


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How random directions are drawn: normal or of signs; `relative`: times the weights' steps.

    `shared`: one number for all of an array, of a stack one for each layer's: so few numbers that a
    handful of losses say where to go, though no further than they reach.

    >>> Drawing(signs=True).values(jax.random.key_data(jax.random.key(0)), (3,)).tolist()
    [...1.0, ...1.0, ...1.0]
    """

    signs: bool = False
    relative: bool = False
    shared: bool = False

    __post_init__ = check_fields

    def values(self, key: Array, shape: tuple[int, ...], axes: int = 0) -> Float[Array, "..."]:
        """Numbers of unit variance. The key may be typed, or its data.

        Args:
          axes: leading ones, along which a number is not shared.
        """
        if self.shared:
            shape = shape[:axes] + (1,) * (len(shape) - axes)
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        key = key if typed else jax.random.wrap_key_data(key)
        draw = jax.random.rademacher if self.signs else jax.random.normal
        return draw(key, shape).astype(jnp.float32)

    def of(self, key: Array, latent: "Latent", data: dict[str, Array]) -> Float[Array, "k n"]:
        """The direction of a weight."""
        z = self.values(key, data["codes"].shape)
        return z * latent.step(data) if self.relative else z


NORMAL = Drawing()


@dataclasses.dataclass(frozen=True)
class Latent(Format):
    """Floats [k, n] as "codes", and what the estimator learns.

    Attributes:
      format: that they are rounded to, and `freeze` stores.
      estimator: of the weights (`StraightThrough`, `LSQ`, ...).
      inputs: of the ranges of activations (`LSQRange`, `PACT`), or None: nothing is learned there.
      drawing: of a weight that holds a key: how it is moved.
    """

    format: Format
    estimator: Estimator
    inputs: RangeEstimator | None = None
    drawing: Drawing = NORMAL

    latent: ClassVar[bool] = True

    def encode(self, w: Float[Array, "k n"]) -> dict[str, Array]:
        """Nothing becomes latent by itself: `jaxquant.latent` and `thaw` do it."""
        raise ValueError("a latent weight is made by jaxquant.latent or jaxquant.thaw")

    def check(self, w: Float[Array, "k n"]) -> str:
        """What such weights lose to the format's range; ValueError unless it takes them."""
        return self.format.check(w)

    def check_shape(self, k: int, n: int) -> None:
        """Raise ValueError if a matrix [k, n] cannot be stored."""
        self.format.check_shape(k, n)

    def value(self, data: dict[str, Array]) -> Float[Array, "k n"]:
        """The rounded matrix, differentiable in all arrays."""
        packed, data = self.packed(data), self.moved(data)
        return self.estimator.value(data["codes"], _learned(data), self.format, packed)

    def moved(self, data: dict[str, Array]) -> dict[str, Array]:
        """The data, the weight at its random place if it holds a key."""
        if KEY not in data:
            return data
        data = dict(data)
        key, epsilon = data.pop(KEY), data.pop(EPSILON)
        z = self.drawing.of(key, self, data)
        return data | {"codes": data["codes"] + (epsilon * z).astype(data["codes"].dtype)}

    def step(self, data: dict[str, Array]) -> Float[Array, "k n"]:
        """The scale of every weight."""
        if not isinstance(self.format, LevelFormat):
            raise ValueError(f"relative directions are of formats with levels, got {self.format}")
        grid = self.format.stored_grid(
            self.estimator.packed(data["codes"], _learned(data), self.format)
        )
        return spread(grid, self.format, data["codes"].shape).scale

    def packed(self, data: dict[str, Array]) -> dict[str, Array]:
        """What the format stores of the rounded matrix."""
        return _packed(self, jax.lax.stop_gradient(data), chance())

    def decode(self, data: dict[str, Array], k: int) -> Float[Array, "k n"]:
        """The rounded matrix."""
        return self.value(data)

    def product(
        self,
        form: Activations | None,
        x: Float[Array, "m k"],
        data: dict[str, Array],
        of_inputs: dict[str, Array],
    ) -> Float[Array, "m n"]:
        """x @ w, x rounded as `form` says by the arrays of the activations."""
        if self.inputs is not None and form is not None:
            rounded = self.inputs.value(x, of_inputs, form)
            of_inputs = self.inputs.served(of_inputs, form)
        else:
            rounded = x.astype(jnp.float32) if form is None else form.straight(x, of_inputs)
        fixed = jax.lax.stop_gradient((x, self.packed(data), of_inputs))
        return watched(_product((self.format, form), rounded, self.value(data), *fixed))

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        """x @ w, x in the form that kernels round themselves."""
        return self.product(Activations.of(activations), x, data, {})

    def matmul_transposed(
        self, x: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        """x @ w.T."""
        packed = jax.lax.stop_gradient(self.packed(data))
        x = x.astype(jnp.float32)
        return _product_transposed(self.format, k, x, self.value(data), packed)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        return self.value(data)[:, ids]

    def rows(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "i n"]:
        return self.value(data)[ids]

    def kernel(self) -> str:
        """What serves a matmul."""
        return f"rounded anew, then {self.format.kernel()}"


@partial(jax.jit, static_argnums=0)
def _packed(latent: Latent, data: dict[str, Array], key: Array | None) -> dict[str, Array]:
    """Walled off, so that it is the same arithmetic in whatever program, and alone: sums (of a
    mean, say) would else be of another order."""
    data = jax.lax.optimization_barrier(data)
    data = latent.moved(data)
    with randomness(key):  # given, for what is compiled once may not look for it
        packed = latent.estimator.packed(data["codes"], _learned(data), latent.format)
    return jax.lax.optimization_barrier(packed)


def batched(fn: Callable, axes: int) -> Callable:
    """fn over so many leading axes."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def _learned(data: dict[str, Array]) -> dict[str, Array]:
    return {name: a for name, a in data.items() if name != "codes"}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    how: tuple[Format, Activations | None],
    rounded: Float[Array, "m k"],
    value: Float[Array, "k n"],
    x: Float[Array, "m k"],
    packed: dict[str, Array],
    of_inputs: dict[str, Array],
) -> Float[Array, "m n"]:
    """The kernel's product of x and the packed matrix, as one of the rounded rows and values."""
    format, form = how
    rows, kernel_form, leave = activations.entered(form, x, of_inputs)
    return leave(format.matmul(rows, packed, kernel_form))


def _forward(how: tuple, rounded: Array, value: Array, *fixed: PyTree) -> tuple[Array, tuple]:
    return _product(how, rounded, value, *fixed), (rounded, *fixed)


def _backward(how: tuple, kept: tuple, g: Array) -> tuple:
    rounded, x, packed, _ = kept
    back = how[0].matmul_transposed(g, packed, rounded.shape[-1])
    return back, rounded.T @ g, jnp.zeros_like(x), None, None


_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product_transposed(
    format: Format, k: int, x: Float[Array, "m n"], value: Float[Array, "k n"], packed: dict
) -> Float[Array, "m k"]:
    return format.matmul_transposed(x, packed, k)


def _transposed_forward(format: Format, k: int, x: Array, value: Array, packed: dict) -> tuple:
    return format.matmul_transposed(x, packed, k), (x, packed)


def _transposed_backward(format: Format, k: int, kept: tuple, g: Array) -> tuple:
    x, packed = kept
    return format.matmul(g, packed), g.T @ x, None


_product_transposed.defvjp(_transposed_forward, _transposed_backward)
