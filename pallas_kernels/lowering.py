"""Selects one of several implementations of a function when the program is lowered.

Only then are both deciding facts known: the platform, and whether the compiler will partition the
program over devices, which it cannot do with a kernel. `lax.platform_dependent` offers only the
first.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

_chosen = core.Primitive("jaxquant_kernel_or_reference")
_chosen.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class _Flat:
    """A function of pytrees, as a function of their leaves."""

    fn: Callable[..., Any]
    tree: Any

    def __call__(self, *leaves: Any) -> list[Any]:
        return jax.tree.leaves(self.fn(*jax.tree.unflatten(self.tree, leaves)))


def by_lowering(
    kernels: Mapping[str, Callable[..., Any]], reference: Callable[..., Any], *args: Any
) -> Any:
    """Return `kernels[platform](*args)` if lowered for one device, else `reference(*args)`.

    A program that `shard_map` splits over all axes of its mesh counts as a program for one device.

    Args:
      kernels: platform ("cpu", "tpu" or "cuda") -> function with the signature of `reference`.
      reference: function that runs on platforms without a kernel, and in programs that the compiler
        partitions.
      *args: pytrees of arrays.
    Returns:
      The result of the selected function, with the structure of that of `reference`.

    >>> import jax.numpy as jnp
    >>> kernels = {jax.default_backend(): jnp.positive}
    >>> float(by_lowering(kernels, jnp.negative, jnp.float32(2.0)))
    2.0
    """
    traced, shapes = jax.make_jaxpr(reference, return_shape=True)(*args)
    leaves, tree = jax.tree.flatten(args)
    # Functions are traced at lowering; jit caches the trace for later uses of the same function.
    flat = lambda fn: jax.jit(_Flat(fn, tree), inline=True)
    out = _chosen.bind(
        *leaves,
        branches=tuple((platform, flat(fn)) for platform, fn in kernels.items()),
        reference=flat(reference),
        out_avals=tuple(traced.out_avals),
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


@_chosen.def_abstract_eval
def _(*_: Any, out_avals: tuple, **__: Any) -> list[Any]:
    return list(out_avals)


@_chosen.def_impl
def _(*args: Any, branches: tuple, reference: Callable, out_avals: tuple) -> list[Any]:
    """Run eagerly under `jax.disable_jit`, choosing by the devices that the arrays are on."""
    split = any(len(a.sharding.device_set) > 1 for a in args if isinstance(a, jax.Array))
    chosen = reference if split else dict(branches).get(default_platform(), reference)
    return chosen.__wrapped__(*args)  # eager, operation by operation


def _lowered(
    platform: str, ctx: Any, *args: Any, branches: tuple, reference: Callable, out_avals: tuple
) -> Any:
    kernel = dict(branches).get(platform) if is_whole(ctx.module_context.axis_context) else None
    return mlir.lower_fun(kernel or reference, multiple_results=True)(ctx, *args)


def is_whole(axis_context: Any) -> bool:
    """Return whether the compiler leaves a program unpartitioned: one device, or all axes manual.

    Args:
      axis_context: the axis context of JAX's lowering: that of a program's devices, of a mesh, or
        of `pmap`.
    """
    devices = getattr(axis_context, "num_devices", None)
    if devices is not None:
        return devices == 1
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return True
    if not axis_context.manual_axes:
        return mesh.size == 1
    return axis_context.manual_axes | set(mesh.manual_axes) == set(mesh.axis_names)


for _platform in ("cpu", "tpu", "cuda"):
    mlir.register_lowering(_chosen, partial(_lowered, _platform), platform=_platform)
mlir.register_lowering(_chosen, partial(_lowered, ""))


def _batched(
    args: Any, dims: Any, *, branches: tuple, reference: Callable, out_avals: tuple
) -> tuple[list, list]:
    mapped = lambda fn: jax.vmap(fn, in_axes=tuple(dims))
    fns = {platform: mapped(fn) for platform, fn in branches}
    out = by_lowering(fns, mapped(reference), *args)
    return out, [0] * len(out)


batching.primitive_batchers[_chosen] = _batched


def choices(eqn: Any) -> list[Callable[..., Any]]:
    """Return the functions among which an equation of a jaxpr chooses when it is lowered.

    Args:
      eqn: an equation.
    Returns:
      The kernels of all platforms and the reference, of the operands of the equation; an empty list
      if it is no such choice.
    """
    if eqn.primitive is not _chosen:
        return []
    return [*(kernel for _, kernel in eqn.params["branches"]), eqn.params["reference"]]


def default_platform() -> str:
    """Return JAX's default backend under the name that the kernel tables use."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def devices_of(*trees: Any) -> int:
    """Return the number of devices of a program of these arrays: the most that any of them spans.

    Args:
      *trees: pytrees of arrays or of `jax.ShapeDtypeStruct`; leaves without a sharding are ignored.

    >>> import jax.numpy as jnp
    >>> devices_of({"x": jnp.ones(3)}, jax.ShapeDtypeStruct((2,), jnp.float32))
    1
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(trees)]
    counts = [len(s.device_set) for s in shardings if s is not None]
    return max([jax.sharding.get_abstract_mesh().size, 1, *counts])
