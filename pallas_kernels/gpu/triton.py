"""The single module that depends on Pallas-Triton, JAX's GPU kernel language, and its versions.

JAX 0.10 to 0.12 include it; it is deprecated since 0.11 and will eventually be removed. Everything
is imported on first use. Where it is missing, `missing` returns the reason and the references run.

Interpret mode runs a kernel's body as jnp operations on any device. It does not support inline
assembly, so every piece of assembly here has an equivalent in jnp.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.context import Setting

_INTERPRETED = Setting[bool]("interpreted", False)


@functools.cache
def missing() -> str:
    """Return why Pallas-Triton is unavailable; "" if it is available."""
    try:
        triton = _triton()
    except ImportError as error:
        return f"JAX {jax.__version__} has no Pallas-Triton ({error})"
    needed = ("CompilerParams", "elementwise_inline_asm", "load", "store")
    lacking = [name for name in needed if not hasattr(triton, name)]
    return f"Pallas-Triton of JAX {jax.__version__} lacks {', '.join(lacking)}" if lacking else ""


def _triton() -> Any:
    return importlib.import_module("jax.experimental.pallas.triton")


def _pallas() -> Any:
    return importlib.import_module("jax.experimental.pallas")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels traced inside the `with` block in interpret mode, on any device."""
    with _INTERPRETED.set(True):
        yield


def launch(
    body: Callable,
    name: str,
    *,
    grid: tuple[int, ...],
    inputs: Sequence[Array],
    blocks: Sequence[tuple[tuple[int | None, ...], Callable]],
    out: tuple[jax.ShapeDtypeStruct, tuple[int | None, ...], Callable],
    warps: int,
    stages: int,
) -> Array:
    """Run a kernel body on blocks of its inputs.

    Args:
      body: function of references to the blocks of the inputs, followed by that of the output.
      name: name of the kernel, in profiles and in its PTX.
      grid: number of programs along each axis.
      inputs: the arrays.
      blocks: for each input, the shape of a block and its index as a function of the program's.
      out: shape and dtype of the output, the shape of a block, and its index.
      warps: number of warps per program.
      stages: number of pipeline stages, loads in flight.
    """
    # The user cannot act on this warning; this module will be replaced. The filter has no scope,
    # since JAX warns whenever a kernel is lowered, long after this function has returned.
    warnings.filterwarnings(
        "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
    )
    pallas = _pallas()

    def named(*refs: Any) -> None:
        body(*refs)

    named.__name__ = name  # the name used in lowering; `name=` is for traces
    spec = lambda shape, index: pallas.BlockSpec(shape, index)
    return pallas.pallas_call(
        named,
        grid=grid,
        in_specs=[spec(*block) for block in blocks],
        out_specs=spec(*out[1:]),
        out_shape=out[0],
        compiler_params=_triton().CompilerParams(num_warps=warps, num_stages=stages),
        interpret=_INTERPRETED.get(),
        name=name,
    )(*inputs)


# --- in kernels -----------------------------------------------------------------------------


def program(axis: int) -> Array:
    """Return this program's index along an axis of the grid.

    Args:
      axis: index of the axis.
    """
    return _pallas().program_id(axis)


def span(start: Array | int, size: int) -> Any:
    """Return a slice of `size` places whose start is known only at run time.

    Args:
      start: the first place.
      size: number of places.
    """
    return _pallas().ds(start, size)


def load(ref: Any, mask: Array | None = None) -> Array:
    """Return the entries that a reference selects, with zeros where the mask is False.

    Args:
      ref: the reference.
      mask: bool array of the shape of the result; None loads everything.
    """
    return _triton().load(ref, mask=mask, other=None if mask is None else 0)


def store(ref: Any, value: Array, mask: Array | None = None) -> None:
    """Write the entries where the mask is True, or all without a mask.

    Args:
      ref: the reference.
      value: the entries.
      mask: bool array of the shape of value, or None.
    """
    _triton().store(ref, value, mask=mask)


def bit_and(words: Int32[Array, "..."], mask: int) -> Int32[Array, "..."]:
    """Return words & mask, hidden from LLVM's optimizer.

    LLVM would turn shifts of several masked fields at once into separate shifts and masks.

    Args:
      words: int32 words.
      mask: the bits of a uint32.
    """
    if _INTERPRETED.get():
        return words & jnp.int32(signed(mask))
    return _asm(f"and.b32 $0, $1, {mask:#x};", "=r,r", words)


def multiply_add(
    a: Float32[Array, "..."], b: Float32[Array, "..."], c: Float32[Array, "..."]
) -> Float32[Array, "..."]:
    """Return a b + c, rounded once; XLA prevents Triton from fusing the two operations.

    Args:
      a, b, c: float32 arrays that broadcast together.
    """
    if _INTERPRETED.get():
        return a * b + c
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    return _asm(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", *(jnp.broadcast_to(t, shape) for t in (a, b, c))
    )


def byte_sum(words: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """Return the sum of the four unsigned bytes of each word.

    Args:
      words: int32 words.
    """
    if _INTERPRETED.get():
        pairs = (words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)
        return (pairs + (pairs >> 16)) & 0xFFFF
    return _asm("dp4a.u32.u32 $0, $1, 0x01010101, 0;", "=r,r", words)


def bytes_twice(low: Int32[Array, "..."], high: Int32[Array, "..."], i: int) -> Int32[Array, "..."]:
    """Return words with byte i of `low` twice in the low half, and that of `high` in the high one.

    Args:
      low, high: int32 words.
      i: index of the byte, 0 to 3.
    """
    if _INTERPRETED.get():
        byte = lambda word: jax.lax.shift_right_logical(word, jnp.int32(8 * i)) & 0xFF
        return (byte(low) | byte(high) << 16) * 0x101
    return _asm(f"prmt.b32 $0, $1, $2, {0x4400 + 0x1111 * i:#x};", "=r,r,r", low, high)


def funnel(high: Int32[Array, "..."], low: Int32[Array, "..."], by: int) -> Int32[Array, "..."]:
    """Return the top 32 bits of the 64 bits high:low shifted left by 0 to 31.

    Args:
      high, low: int32 words.
      by: the shift.
    """
    if by == 0:
        return high
    if _INTERPRETED.get():
        return (high << by) | jax.lax.shift_right_logical(low, jnp.int32(32 - by))
    return _asm(f"shf.l.wrap.b32 $0, $1, $2, {by};", "=r,r,r", low, high)


def _asm(code: str, constraints: str, *args: Array) -> Array:
    out = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    (result,) = _triton().elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=1, result_shape_dtypes=[out]
    )
    return result


def signed(word: int) -> int:
    """Return the int32 with the bits of a uint32.

    Args:
      word: the uint32.

    >>> signed(0xFFFFFFFF)
    -1
    """
    return (word ^ 1 << 31) - (1 << 31)
