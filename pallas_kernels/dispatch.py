"""The dispatch table: which implementation runs each op, and the derivative rules.

The implementation is chosen when a program is lowered (`lowering.by_lowering`). A program lowered
for a TPU on a machine that has none therefore gets the TPU kernels, and a program that the compiler
partitions over devices gets the reference. Whether a kernel supports the given shapes and dtypes is
decided earlier, when the program is traced. Ops that no kernel supports run in the reference, and
`describe` gives the reason.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import activations, checks, partition, reference
from pallas_kernels.context import Setting
from pallas_kernels.kernel import Kernel
from pallas_kernels.lowering import by_lowering, default_platform

BACKENDS = {
    "cpu": "pallas_kernels.cpu",
    "tpu": "pallas_kernels.tpu",
    "cuda": "pallas_kernels.gpu",
}
# With fewer words of codes than this, an accelerator's kernel does not pay for its tracing and its
# launch.
SMALL = 1 << 12
KERNELS = ("auto", "reference", *BACKENDS)  # the values that `using` accepts

_using = Setting[str]("kernels", "auto")
_described = Setting[tuple[str, int] | None]("described", None)
_heard = Setting[list[str] | None]("heard", None)


@contextlib.contextmanager
def using(kernels: str) -> Iterator[None]:
    """Select the implementation of the products traced inside the `with` block.

    Args:
      kernels: "auto" runs the kernels of each platform where they support the product, and the
        reference elsewhere; "reference" always runs the reference; "cpu", "tpu" or "cuda" runs only
        that backend, and a product that it does not support raises a ValueError.
    Raises:
      ValueError: kernels is not one of `KERNELS`.

    >>> with using("reference"):
    ...     pass
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {KERNELS}, got {kernels!r}")
    with _using.set(kernels):
        yield


@contextlib.contextmanager
def describing(platform: str | None = None, devices: int = 1) -> Iterator[None]:
    """Make `listening` record what would run each product of a given kind of program.

    Args:
      platform: "cpu", "tpu" or "cuda"; by default the platform of this machine.
      devices: number of devices over which the compiler partitions the program.
    """
    with _described.set((platform or default_platform(), devices)):
        yield


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Collect a description of what runs each product traced inside the `with` block.

    The list stays empty unless `describing` is active.

    Returns:
      A list with one string per product, filled while tracing.
    """
    heard: list[str] = []
    with _heard.set(heard):
        yield heard


def product(op: str, *arrays: Array | None, **static: Any) -> Float[Array, "m n"]:
    """Return the product `op` of its arrays, as float32 [m, n].

    It is differentiable in x and in every floating-point array (scales, codebooks); integer arrays
    have no cotangent. The backward rule decodes the packed words again, so no floating-point copy
    of a weight is kept. With integer activations the derivative is that of the floating-point
    product at the rounded x.

    Args:
      op: a key of `reference.OPS`.
      *arrays: x, followed by the arrays of the op.
      **static: the static arguments of the op.
    Raises:
      ValueError: an argument is not what the op requires; the message names it.
    """
    checks.product(op, arrays, static)
    placement = partition.of_product(arrays[0])
    if placement is not None and partition.can_split(op, *arrays):
        return partition.product(product, op, placement, *arrays, **static)
    static_items = tuple(sorted(static.items()))
    kernels = _using.get()
    _tell(lambda *of: describe(op, *of, arrays, static, kernels))
    return _product(op, static_items, kernels, partition.varied(*arrays))


def products(
    op: str, x: Float[Array, "m k"], matrices: Sequence[tuple], **static: Any
) -> tuple[Float[Array, "m n"], ...]:
    """Return the products of one x with several matrices, in one kernel call where possible.

    Args:
      op: a key of `reference.OPS`.
      x: activations [m, k].
      matrices: for each matrix, the arrays of the op after x.
      **static: the static arguments of the op, which all matrices share.
    Returns:
      A tuple of float32 [m, n], one per matrix.
    Raises:
      ValueError: an argument is not what the op requires; the message names it.
    """
    kernels = _using.get()
    split = partition.of_product(x) is not None
    one_call = len(matrices) > 1 and kernels in ("auto", "cpu") and not split
    if one_call:
        chosen = [choose(op, "cpu", (x, *matrix), static)[0] for matrix in matrices]
        one_call = all(kernel and kernel.together for kernel in chosen)
    if not one_call:
        return tuple(product(op, x, *matrix, **static) for matrix in matrices)
    for matrix in matrices:
        checks.product(op, (x, *matrix), static)

    def described(platform: str, devices: int) -> str:
        said = describe(op, platform, devices, (x, *matrices[0]), static, kernels)
        return f"{said}, one call for {len(matrices)}" if said == "cpu kernel" else said

    _tell(described)
    return _together(
        op, tuple(sorted(static.items())), kernels, *partition.varied(x, tuple(matrices))
    )


def function(op: str, reference: Callable[..., Array], *arrays: Array) -> Array:
    """Return the result of an op that is not a product, from a kernel where one supports it.

    The derivative is that of the reference. `using` a single backend has no effect here; it
    restricts products only.

    Args:
      op: name of the op in the backends' tables.
      reference: the jnp function that defines the op.
      *arrays: its arguments.
    """
    kernels = _using.get()
    if kernels == "reference":
        return reference(*arrays)
    found = {p: choose(op, p, arrays, {}, spare_small=False)[0] for p in BACKENDS}
    fast = {p: kernel.call for p, kernel in found.items() if kernel is not None}
    if not fast:
        return reference(*arrays)

    @jax.custom_jvp
    def served(*arrays: Array) -> Array:
        return by_lowering(fast, reference, *arrays)

    @served.defjvp
    def _(arrays: tuple, tangents: tuple) -> tuple[Array, Array]:
        return served(*arrays), jax.jvp(reference, arrays, tangents)[1]

    return served(*arrays)


def _tell(described: Callable[[str, int], str]) -> None:
    """Append the description of a product to the list of `listening`."""
    asked, heard = _described.get(), _heard.get()
    if asked is not None and heard is not None:
        heard.append(described(*asked))


def describe(
    op: str,
    platform: str,
    devices: int,
    arrays: tuple,
    static: dict[str, Any],
    kernels: str,
) -> str:
    """Return what runs a product in such a program: a kernel, or the reference and the reason.

    Args:
      op: a key of `reference.OPS`.
      platform: "cpu", "tpu" or "cuda".
      devices: number of devices over which the compiler partitions the program.
      arrays: the arguments of the op, arrays or their `jax.ShapeDtypeStruct`.
      static: the static arguments of the op.
      kernels: the selection in force, one of `KERNELS`.
    """
    if kernels == "reference":
        return "reference (XLA): requested"
    if kernels == "auto" and devices > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        return f"reference (XLA): only shard_map can split a kernel over {devices} devices"
    platform, small = (platform, True) if kernels == "auto" else (kernels, False)
    kernel, reason = choose(op, platform, arrays, static, spare_small=small)
    return f"{platform} kernel" if kernel is not None else f"reference (XLA): {reason}"


def choose(
    op: str, platform: str, arrays: tuple, static: dict[str, Any], *, spare_small: bool = True
) -> tuple[Kernel | None, str]:
    """Return the platform's kernel for these arrays and "", or None and the reason.

    Args:
      op: name of the op.
      platform: "cpu", "tpu" or "cuda".
      arrays: the arguments of the op, arrays or their `jax.ShapeDtypeStruct`.
      static: the static arguments of the op.
      spare_small: whether accelerators leave products of fewer than `SMALL` words of codes to the
        reference.
    """
    if platform not in BACKENDS:
        return None, f"there are no kernels for {platform}"
    if is_empty(op, arrays):
        return None, "an empty product needs no kernel"
    kernel = backend(platform).get(op)
    if kernel is None:
        return None, f"{op} has no {platform} kernel"
    if spare_small and platform != "cpu" and arrays[1].size < SMALL:
        return None, f"{arrays[1].size} words of codes are too few to gain from a kernel"
    shapes = [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    reason = kernel.serves(*shapes, **static)
    return (None, reason) if reason else (kernel, "")


def is_empty(op: str, arrays: tuple) -> bool:
    """Return whether the result has no rows or no columns, or is a sum over nothing.

    Args:
      op: name of the op.
      arrays: the arguments of the op.
    """
    return arrays[0].size == 0 or (op in reference.OPS and arrays[1].size == 0)


@functools.cache
def backend(platform: str) -> dict[str, Kernel]:
    """Return the kernel table of a platform, importing its module on first use.

    Args:
      platform: a key of `BACKENDS`.
    Returns:
      Name of an op -> its kernel.
    """
    return importlib.import_module(BACKENDS[platform]).KERNELS


# --- the product and its derivative ---------------------------------------------------------


def _served(op: str, static: tuple, kernels: str, arrays: tuple) -> Array:
    named = dict(static)
    slow = partial(reference.OPS[op], **named)
    if kernels == "reference" or is_empty(op, arrays):
        return slow(*arrays)
    if kernels != "auto":
        kernel, reason = choose(op, kernels, arrays, named, spare_small=False)
        if kernel is None:
            raise ValueError(f"the {kernels} kernels do not support this {op}: {reason}")
        return kernel.call(*arrays, **named)
    found = {p: choose(op, p, arrays, named)[0] for p in BACKENDS}
    fast = {p: partial(kernel.call, **named) for p, kernel in found.items() if kernel is not None}
    if not fast:
        return slow(*arrays)
    return by_lowering(fast, slow, *arrays)


_differentiable = jax.custom_vjp(_served, nondiff_argnums=(0, 1, 2))
_product = jax.jit(_differentiable, static_argnums=(0, 1, 2), inline=True)  # traced once per shape


def _forward(op: str, static: tuple, kernels: str, arrays: tuple) -> tuple[Array, tuple]:
    return _product(op, static, kernels, arrays), arrays


def _backward(op: str, static: tuple, kernels: str, arrays: tuple, g: Array) -> tuple[tuple]:
    dx, dfloats = _cotangents(op, static, kernels, arrays, g)
    found = iter(dfloats)
    others = (next(found) if _is_float(a) else _float0(a) for a in arrays[1:])
    return ((dx, *others),)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _cotangents(
    op: str, static: tuple, kernels: str, arrays: tuple, g: Array
) -> tuple[Array, list[Array]]:
    """Return the cotangents of x and of the floating-point arrays after it."""
    x, *rest = arrays
    named = dict(static)
    form = named.pop("activations", "float")

    def weights_only(floats: list[Array]) -> Array:
        kept = iter(floats)
        merged = [next(kept) if _is_float(a) else a for a in rest]
        return reference.OPS[op](activations.rounded(x, form), *merged, **named)

    dx = _cotangent(op, named, kernels, x, tuple(rest), g)
    (dfloats,) = jax.vjp(weights_only, list(filter(_is_float, rest)))[1](g)  # traced only if used
    return dx.astype(x.dtype), dfloats


def _cotangent(op: str, static: dict, kernels: str, x: Array, rest: tuple, g: Array) -> Array:
    """Return the cotangent of x: the product of g with the transposed weights."""
    g = g.astype(x.dtype)  # as it was before the result was widened to float32
    backwards = f"{op}_transposed"
    if backwards in reference.OPS:
        items = tuple(sorted({**static, "k": x.shape[-1]}.items()))
        allowed = kernels if kernels in ("auto", "reference") else "auto"
        return _product(backwards, items, allowed, (g, *rest))
    named = {name: v for name, v in static.items() if name != "k"}  # op was the transposed product
    return _product(
        op.removesuffix("_transposed"), tuple(sorted(named.items())), kernels, (g, *rest)
    )


def _is_float(a: Array | None) -> bool:
    return a is not None and jnp.issubdtype(a.dtype, jnp.floating)


def _float0(a: Array | None) -> np.ndarray | None:
    return None if a is None else np.zeros(a.shape, jax.dtypes.float0)


_differentiable.defvjp(_forward, _backward)


def _served_together(op: str, static: tuple, kernels: str, x: Array, matrices: tuple) -> tuple:
    one_call: Any = backend("cpu")[op].together
    in_one = lambda x, matrices: tuple(one_call(x, matrices, **dict(static)))
    if kernels == "cpu":
        return in_one(x, matrices)
    return by_lowering(
        {"cpu": in_one}, partial(_in_turn, _served, op, static, kernels), x, matrices
    )


_differentiable_together = jax.custom_vjp(_served_together, nondiff_argnums=(0, 1, 2))
_together = jax.jit(_differentiable_together, static_argnums=(0, 1, 2), inline=True)


def _in_turn(
    one: Callable, op: str, static: tuple, kernels: str, x: Array, matrices: tuple
) -> tuple:
    return tuple(one(op, static, kernels, (x, *matrix)) for matrix in matrices)


def _together_forward(
    op: str, static: tuple, kernels: str, x: Array, matrices: tuple
) -> tuple[tuple, tuple]:
    return _together(op, static, kernels, x, matrices), (x, matrices)


def _together_backward(
    op: str, static: tuple, kernels: str, arrays: tuple, g: tuple
) -> tuple[Array, tuple]:
    in_turn = partial(_in_turn, _product, op, static, kernels)
    return jax.vjp(in_turn, *arrays)[1](g)  # the products themselves are dropped as unused


_differentiable_together.defvjp(_together_forward, _together_backward)
