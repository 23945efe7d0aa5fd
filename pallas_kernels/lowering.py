"""One of several implementations of a function, chosen when the program is lowered.

Only then are both facts known that decide: the platform, and whether the compiler is to split the
program over devices, which it cannot do with a kernel. `lax.platform_dependent` knows the first.
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
    """A function of trees as one of their leaves."""

    fn: Callable[..., Any]
    tree: Any

    def __call__(self, *leaves: Any) -> list[Any]:
        return jax.tree.leaves(self.fn(*jax.tree.unflatten(self.tree, leaves)))


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
    leaves, tree = jax.tree.flatten(args)
    # Traced when lowered; jit keeps what it has traced, for whoever binds the same functions again.
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
    """Outside of jit (`jax.disable_jit`): arrays say where they lie."""
    split = any(len(a.sharding.device_set) > 1 for a in args if isinstance(a, jax.Array))
    chosen = reference if split else dict(branches).get(default_platform(), reference)
    return chosen.__wrapped__(*args)  # as one does outside of jit, operation by operation


def _lowered(
    platform: str, ctx: Any, *args: Any, branches: tuple, reference: Callable, out_avals: tuple
) -> Any:
    kernel = dict(branches).get(platform) if is_whole(ctx.module_context.axis_context) else None
    return mlir.lower_fun(kernel or reference, multiple_results=True)(ctx, *args)


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


def _batched(
    args: Any, dims: Any, *, branches: tuple, reference: Callable, out_avals: tuple
) -> tuple[list, list]:
    mapped = lambda fn: jax.vmap(fn, in_axes=tuple(dims))
    fns = {platform: mapped(fn) for platform, fn in branches}
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
