"""`quantized` runs a function on stand-ins; `explain` says, per weight, how each was served."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import quax
from jaxtyping import Array, PyTree

from jaxquant.core import products  # noqa: F401  its rules are registered by the import
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.standin import StandIn, dispatching, is_standin, listening
from pallas_kernels import dispatch as table
from pallas_kernels.lowering import devices_of


def quantized(fn: Callable[..., PyTree], *, kernels: str = "auto") -> Callable[..., PyTree]:
    """`fn` that understands stand-ins (`QTensor`) in its arguments.

    Runs by multiple dispatch on JAX primitives (quax): every matmul or look-up that meets a
    `QTensor` is served from its packed codes; a primitive without a rule dequantizes it (see
    `explain`). Compose with `jax.jit`, `jax.grad`, `jax.vmap` outside or inside, and with
    `jax.shard_map` outside, the weights split along their outputs, or along their inputs where
    every device has whole groups and words. Reverse mode outside, any
    mode inside. Kernels serve programs for one device, whatever else the machine has, and inside
    `shard_map(..., check_vma=False)`. The compiler cannot partition a kernel, so references serve
    the programs that it splits over several devices.

    Args:
      fn: any function of parameter trees and arrays: Flax, Equinox, plain JAX.
      kernels: "auto" serves each product by the kernel of the platform that the program is lowered
        for, where it has one; "reference" by plain JAX; "cpu", "tpu" or "cuda" by that backend's
        kernels alone, a product they do not serve being a ValueError.
    Returns:
      A function of the same arguments.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> w = jq.quantize_array(jnp.eye(4), jq.rtn(bits=8, group_size=-1))
    >>> y = jax.jit(jq.quantized(lambda p, x: x @ p["w"]))({"w": w}, jnp.ones((2, 4)))
    >>> y.shape
    (2, 4)
    """
    check_arguments(quantized, locals())
    return functools.wraps(fn)(dispatching(fn, lambda: table.using(kernels)))


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight: the primitive, the rule that serves it, and why."""

    path: str
    primitive: str
    rule: str
    why: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every use of every quantized weight, in the order of the trace."""

    uses: tuple[Use, ...]

    @property
    def materialised(self) -> tuple[str, ...]:
        """Paths of weights that some primitive made dense."""
        return tuple(dict.fromkeys(u.path for u in self.uses if u.rule == "materialised"))

    def __str__(self) -> str:
        rows = [("weight", "primitive", "served by", "why")]
        rows += [(u.path, u.primitive, u.rule, u.why) for u in self.uses]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join(line.rstrip() for line in lines)


def explain(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    platform: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """How each quantized weight of `params` is served in `fn(params, *args)`.

    Abstract: nothing is computed; what is no array (a flag, say) is passed on as it is.

    Args:
      fn: the user's function, as given to `quantized`.
      params: tree with `QTensor` leaves (or their shapes, from `jax.eval_shape`).
      *args, **kwargs: the other arguments; arrays or `jax.ShapeDtypeStruct`. If one of them or of
        the weights lies on several devices, the program is one that the compiler splits.
      platform: "cpu", "tpu" or "cuda", whose kernels are meant, or "rocm", for which there are
        none; default: this machine's.
    """
    check_arguments(explain, locals())
    if platform not in (None, *table.BACKENDS, "rocm"):
        raise ValueError(f"platform must be cpu, tpu, cuda or rocm, got {platform!r}")
    log = _Log([])
    spied = replace_leaves(
        params, {p: _Spy(w, p, log) for p, w in path_leaves(params) if is_standin(w)}
    )
    with table.describing(platform, devices_of(params, args, kwargs)):
        eqx.filter_eval_shape(lambda p, a, k: quantized(fn)(p, *a, **k), spied, args, kwargs)
    return Explanation(tuple(dict.fromkeys(log.uses)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Log:
    """Hashes by identity, so that every explanation traces afresh."""

    uses: list


class _Spy(quax.ArrayValue):
    """A stand-in's double: passes every primitive on, and writes down who answered."""

    inner: Any
    path: str = eqx.field(static=True)
    log: _Log = eqx.field(static=True)

    def aval(self) -> jax.core.ShapedArray:
        return self.inner.aval()

    def materialise(self) -> Array:
        self.log.uses.append(Use(self.path, "custom_vjp_call", "materialised", "custom_vjp"))
        return self.inner.dequantize()

    @staticmethod
    def default(primitive: Any, values: Any, params: dict[str, Any]) -> Any:
        spies = [v for v in values if isinstance(v, _Spy)]
        inner = [v.inner if isinstance(v, _Spy) else v for v in values]
        with listening() as heard:
            out = quax.quaxify(lambda *a: primitive.bind(*a, **params))(*inner)
        spy = spies[0]
        spy.log.uses.extend(Use(spy.path, str(primitive), rule, why) for rule, why in heard)
        rewrap = lambda x: _Spy(x, spy.path, spy.log) if isinstance(x, StandIn) else x
        return [rewrap(x) for x in out] if primitive.multiple_results else rewrap(out)
