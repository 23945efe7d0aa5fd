"""What a function becomes on a platform, here or not; which GPU, JAX must be told from 0.12 on."""

import inspect

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import lowering


def lowered_text(fn, *args, platform):
    """The lowered text of fn(*args); on "cuda" for an H100."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    lower = lambda: jax.jit(fn).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    if platform != "cuda":
        return lower()
    more = {"platform": "gpu"} if "platform" in inspect.signature(AbstractDevice).parameters else {}
    gpu = AbstractDevice("NVIDIA H100", None, **more)
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    ):
        return lower()


def equations(jaxpr):
    """The equations of a jaxpr and of all inside it, kernels too, of every platform."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in getattr(jaxpr, "eqns", ()):
        yield eqn
        if eqn.primitive is lowering._chosen:  # whose kernels are traced when they are lowered
            for _, kernel in eqn.params["branches"]:
                yield from equations(jax.make_jaxpr(kernel)(*(v.aval for v in eqn.invars)))
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "jaxpr"))
        for part in inner:
            yield from equations(part)
