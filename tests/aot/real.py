"""Products as a user asks for them: `jax.jit(jq.quantized(fn))` at shapes of real models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.core.sites import Site
from jaxquant.rounding import Nearest

# Hidden and inner widths of public models, those of SmolLM2, Qwen, Gemma, Llama, Falcon and gpt-oss
# among them. Many are no multiple of 512, one is none of 128.
WIDTHS = (576, 896, 2048, 2304, 2560, 2880, 3072, 4096, 4544, 5120, 5376, 7168, 8192)


def _plain(name: str, format: Any) -> jq.Method:
    """Of nothing but a format: shapes are all that is asked of it."""
    return jq.Method(name, Nearest(), format)


def _vpu(k: int, group: int) -> jq.Method:
    return _plain("trellis", jq.formats.Trellis((2,), L=16, code="vpu"))


def _blocks(k: int, group: int) -> jq.Method:
    """A trellis with a scale for every group of rows."""
    return _plain("trellis", jq.formats.Trellis((2,) * (k // group), L=16, code="vpu"))


# Name -> the method, of k and the rows of a group.
FORMATS = {
    **{
        f"{bits} bits": lambda k, group, bits=bits: jq.rtn(bits, group, symmetric=True)
        for bits in (2, 3, 4, 8)
    },
    "4 bits, zero points": lambda k, group: jq.rtn(4, group),
    "2 bits, a scale a column": lambda k, group: jq.rtn(2, -1, symmetric=True),
    "4 bits, a scale a column": lambda k, group: jq.rtn(4, -1, symmetric=True),
    "ternary": lambda k, group: jq.ternary(group),
    "ternary, one scale": lambda k, group: _plain(
        "ternary", jq.formats.Ternary(group_size="tensor")
    ),
    "NF4": lambda k, group: jq.normal_float(4, group),
    "trellis": _vpu,
    "trellis, a scale a group": _blocks,
    "E8P": lambda k, group: _plain("e8p", jq.formats.E8P(2)),
    "float planes": lambda k, group: _plain("planes", jq.formats.FloatPlanes(bits=4)),
}


def group_of(k: int) -> int:
    """The largest usual size of a group that divides k."""
    return next(size for size in (128, 64, 32, 16) if k % size == 0)


def product(backward: bool = False, kernels: str = "auto", **statics: Any) -> tuple[Any, tuple]:
    """A product with a quantized weight: the function, and the shapes of its arguments.

    Args:
      backward: the derivative by x instead.
      kernels: as of `jq.quantized`.
      statics: of `parts`.
    """
    fn, weight, x = parts(**statics)
    run = jq.quantized(fn, kernels=kernels)
    if backward:
        return jax.grad(lambda x, weight: jnp.sum(run(weight, x) ** 2)), (x, weight)
    return run, (weight, x)


def served(**statics: Any) -> bool:
    """Whether `jq.explain` promises a TPU's kernel for a product."""
    fn, weight, x = parts(**statics)
    return "tpu kernel" in str(jq.explain(fn, weight, x, platform="tpu"))


def parts(
    k: int, n: int, m: int, format: str, *, group: int | None = None, activations: str = "float",
    layers: int = 0, experts: int = 0, dtype: str = "bfloat16",
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The product of x [m, k] and a weight [k, n] as a function, the weight's shapes and x's.

    Args:
      format: one of `FORMATS`.
      group: rows that share scales; by default the largest usual one.
      activations: that the weight asks for.
      layers: of a stack of weights, square, over which the product is scanned; 0: no stack.
      experts: of a stack of weights, each with an x of its own; 0: no stack.
      dtype: of x.
    """
    method = FORMATS[format](k, group or group_of(k))
    weight = jax.eval_shape(
        partial(_quantized, method=method, activations=activations, count=layers or experts),
        jax.ShapeDtypeStruct((k, n), jnp.bfloat16 if method.format.exact else jnp.float32),
    )
    x = jax.ShapeDtypeStruct((experts, m, k) if experts else (m, k), dtype)
    one = lambda weight, x: x @ weight
    if experts:
        return jax.vmap(one), weight, x
    if layers:
        through = lambda x, w: (one(w, x).astype(x.dtype), None)
        return lambda weight, x: jax.lax.scan(through, x, weight)[0], weight, x
    return one, weight, x


def _quantized(w: Any, *, method: jq.Method, activations: str, count: int) -> Any:
    params = {"w": jnp.stack([w] * count) if count else w}
    axes = (1,) if count else (0,)
    found = {"w": Site("w", params["w"].shape, contracted=axes, batch=(0,) if count else ())}
    w = jq.quantize(params, method, found)["w"]
    return w if activations == "float" else jq.ptq.with_activations({"w": w}, activations)["w"]
