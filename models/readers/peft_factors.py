"""The factors of LoRA adapters in the two bases: that of the model, and that of stored matrices.

Weights with transforms store another matrix than the one they stand for, and their adapters are
factors of a change of the stored one. Every function here maps both ways exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.adapters.adapted import Adapted
from jaxquant.adapters.lora import MAGNITUDE, A, B, LoRA, base_of
from jaxquant.core.tensor import Arrays, QTensor


class Factors(NamedTuple):
    """The arrays of an adapter on one matrix [k, n], or on a stack of them.

    Attributes:
      a: [..., k, rank].
      b: [..., rank, n].
      magnitude: norms of the columns as DoRA trained them, [..., n]; None without DoRA.
    """

    a: Float[Array, "... k r"]
    b: Float[Array, "... r n"]
    magnitude: Float[Array, "... n"] | None


def lora_of(w: QTensor) -> tuple[Adapted, LoRA]:
    """Return the format of a weight with a LoRA adapter, and the adapter.

    Args:
      w: the weight.
    Raises:
      ValueError: it has no adapter, or another one.
    """
    adapter = w.format.adapter if isinstance(w.format, Adapted) else None
    if not isinstance(w.format, Adapted) or not isinstance(adapter, LoRA):
        kind = "no adapter" if adapter is None else type(adapter).__name__
        raise ValueError(f"expected a weight with LoRA, got one with {kind}")
    if adapter.dora and w.output is not None:
        raise ValueError(
            "DoRA scales the outputs of the model, but the weight stores transformed ones; use "
            "weights without a transform of their outputs, or an adapter without DoRA"
        )
    return w.format, adapter


def with_factors(w: QTensor, factors: Factors) -> QTensor:
    """Return an adapted weight with the factors of a change of the weight it stands for.

    Args:
      w: a weight with LoRA; its own factors are replaced.
      factors: the factors in the basis of the model.
    Raises:
      ValueError: the adapter is not LoRA, or is DoRA on a weight with transformed outputs.
    """
    _, adapter = lora_of(w)

    def one(a: Array, b: Array, arrays: Arrays) -> tuple[Array, Array]:
        if w.input is not None:
            a = w.input.inverse(a.T, arrays.input).T
        return a, b if w.output is None else w.output.inverse(b, arrays.output)

    with jax.default_matmul_precision("highest"):
        a, b = _over(one, w)(factors.a, factors.b, w.arrays)
        data = {**w.data, A: a.astype(adapter.dtype), B: b.astype(adapter.dtype)}
        if factors.magnitude is not None:
            data[MAGNITUDE] = factors.magnitude * _stretch(w, a, b)
    return w.with_arrays(w.arrays._replace(data=data))


def factors_of(w: QTensor) -> Factors:
    """Return the factors of a change of the weight that an adapted weight stands for.

    Args:
      w: a weight with LoRA.
    Raises:
      ValueError: the adapter is not LoRA, or is DoRA on a weight with transformed outputs; or there
        are several adapters (`jaxquant.training.together`).
    """
    _, adapter = lora_of(w)
    a, b = (w.data[name].astype(jnp.float32) for name in (A, B))
    if a.ndim != w.leading() + 2:
        raise ValueError("expected one adapter, got several together; save them one by one")

    def one(a: Array, b: Array, arrays: Arrays) -> tuple[Array, Array]:
        if w.input is not None:
            a = w.input.transposed(a.T, arrays.input, w.rows_k).T
        n = w.outputs[0]
        return a, b if w.output is None else w.output.transposed(b, arrays.output, n)

    with jax.default_matmul_precision("highest"):
        mine, theirs = _over(one, w)(a, b, w.arrays)
        norms = w.data[MAGNITUDE] / _stretch(w, a, b) if adapter.dora else None
    return Factors(mine, theirs, norms)


def _stretch(w: QTensor, a: Array, b: Array) -> Float[Array, "... n"] | float:
    """Return by what a transform of the inputs stretches the columns of the adapted matrix.

    DoRA divides by the norms of the stored columns here, and by those of the weight in PEFT.
    """
    if w.input is None:
        return 1.0
    side, (format, adapter) = w.input, lora_of(w)

    def one(a: Array, b: Array, arrays: Arrays) -> Array:
        stored = format.format.decode(base_of(arrays.data), w.stored_rows) + adapter.scaling * a @ b
        plain = side.transposed(stored.T, arrays.input, w.rows_k)
        return jnp.linalg.norm(stored, axis=0) / jnp.linalg.norm(plain, axis=1)

    return _over(one, w)(a, b, w.arrays)


def _over(fn: Callable, w: QTensor) -> Callable:
    """Return the function applied to the matrices of a weight one after the other."""
    for _ in range(w.leading()):
        fn = lambda *args, fn=fn: jax.lax.map(lambda each: fn(*each), args)
    return fn
