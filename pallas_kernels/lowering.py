"""One of several implementations of a function, chosen when the program is lowered.

Only then are both facts known that decide: the platform, and whether the compiler is to split the
program over devices, which it cannot do with a kernel. `lax.platform_dependent` knows the first.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

_chosen = core.Primitive("jaxquant_kernel_or_reference")
_chosen.multiple_results = True


class _Branch:
    """A function that has been traced; JAX would take a bare jaxpr apart on its own."""

    def __init__(self, jaxpr: core.ClosedJaxpr) -> None:
        self.jaxpr, self.run = jaxpr.jaxpr, core.jaxpr_as_fun(jaxpr)
        self.out_avals = list(jaxpr.out_avals)


def by_lowering(
    kernels: Mapping[str, Callable[..., Any]], reference: Callable[..., Any], *args: Any
) -> Any:
    """`kernels[platform](*args)` in programs that are lowered for one device, else the reference.

    A program that `shard_map` splits over all axes of its mesh counts as one for one device.

    Args:
      kernels: by platform ("cpu", "tpu", "cuda"), functions with the signature of `reference`.
      reference: what platforms without a kernel and the compiler's partitioner get.
      *args: pytrees of arrays.
    Returns:
      What `reference` returns.

    >>> import jax.numpy as jnp
    >>> kernels = {jax.default_backend(): jnp.positive}
    >>> float(by_lowering(kernels, jnp.negative, jnp.float32(2.0)))
    2.0
    """
    traced, shapes = jax.make_jaxpr(reference, return_shape=True)(*args)
    branches = []
    for platform, kernel in kernels.items():
        branches.append((platform, _Branch(jax.make_jaxpr(kernel)(*args))))
    leaves = jax.tree.leaves(args)
    out = _chosen.bind(*leaves, branches=tuple(branches), reference=_Branch(traced))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


@_chosen.def_abstract_eval
def _(*_: Any, branches: tuple, reference: Any) -> list[Any]:
    return reference.out_avals


@_chosen.def_impl
def _(*args: Any, branches: tuple, reference: Any) -> list[Any]:
    """Outside of jit (`jax.disable_jit`): arrays say where they lie."""
    split = any(len(a.sharding.device_set) > 1 for a in args if isinstance(a, jax.Array))
    chosen = reference if split else dict(branches).get(default_platform(), reference)
    return chosen.run(*args)


def _lowered(platform: str, ctx: Any, *args: Any, branches: tuple, reference: Any) -> Any:
    kernel = dict(branches).get(platform) if is_whole(ctx.module_context.axis_context) else None
    return mlir.lower_fun((kernel or reference).run, multiple_results=True)(ctx, *args)


def is_whole(axis_context: Any) -> bool:
    """Whether the compiler leaves a program as it is: one device, or all axes split by hand.

    Args:
      axis_context: of JAX's lowering: of a program's devices, of a mesh, or of `pmap`.
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


def _batched(args: Any, dims: Any, *, branches: tuple, reference: Any) -> tuple[list, list]:
    mapped = lambda branch: jax.vmap(branch.run, in_axes=tuple(dims))
    fns = {platform: mapped(branch) for platform, branch in branches}
    out = by_lowering(fns, mapped(reference), *args)
    return out, [0] * len(out)


batching.primitive_batchers[_chosen] = _batched


def default_platform() -> str:
    """The name by which kernels know JAX's default backend."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def devices_of(*trees: Any) -> int:
    """Devices of a program of these arrays, as far as can be told: the most that one lies on.

    >>> import jax.numpy as jnp
    >>> devices_of({"x": jnp.ones(3)}, jax.ShapeDtypeStruct((2,), jnp.float32))
    1
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(trees)]
    counts = [len(s.device_set) for s in shardings if s is not None]
    return max([jax.sharding.get_abstract_mesh().size, 1, *counts])
