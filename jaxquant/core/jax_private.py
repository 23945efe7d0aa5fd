"""All uses of private names of JAX and quax, so that only this file depends on their versions.

`jax.extend` has no trace context, no `vmap` handlers, no `remat_p`, `reshard_p` and
`ragged_dot_general_p`, and no number of a host before its devices are used.
quax has no rules for `custom_vjp`, and its rules for `scan` and `jit` have to be called by name.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import quax
from jax._src import core as jax_core
from jax._src import distributed, source_info_util
from jax._src.ad_checkpoint import remat_p
from jax._src.interpreters import batching
from jax._src.lax.lax import ragged_dot_general_p
from jax._src.pjit import reshard_p
from jax.extend import core as jex_core
from jaxtyping import PyTree
from quax._compat import jit_p
from quax._trace import _dense, _QuaxTrace, _QuaxTracer

__all__ = ["jit_p", "ragged_dot_general_p", "remat_p", "reshard_p"]

# Marks arrays as varying over a mesh axis inside `shard_map`; absent from older versions of JAX.
pvary_p: Any = vars(jax_core).get("pvary_p")


def current_trace() -> Any:
    """Return the trace that primitives are currently bound by."""
    return jax_core.trace_ctx.trace


def process_id() -> int:
    """Return the number of this host; unlike `jax.process_index`, it waits for no other host."""
    return distributed.global_state.process_id or 0


def as_function(jaxpr: Any) -> Callable[..., PyTree]:
    """Turn a jaxpr, closed or open without constants, into a function of its inputs."""
    closed = jaxpr if isinstance(jaxpr, jex_core.ClosedJaxpr) else jex_core.ClosedJaxpr(jaxpr, ())
    return jex_core.jaxpr_as_fun(closed)


def quax_value(x: Any) -> Any:
    """Return what a tracer of quax stands for; anything else is returned as it is."""
    return x.value if isinstance(x, _QuaxTracer) else x


def scan(args: tuple, params: dict[str, Any], each: Callable[[PyTree], Any]) -> Any:
    """Apply quax's rule for `lax.scan`, with `each` applied to the values scanned over."""
    consts, carry, xs = quax._compat.unpack_scan_args(args, params)
    return quax._primitives.scan_quax(*consts, *carry, *map(each, xs), **params)


@contextlib.contextmanager
def watching_vmap(tell: Callable[[quax.Value, int], None]) -> Iterator[None]:
    """Within the context, report each quax value that enters a `jax.vmap`.

    The primitives do not show this: vmap(in_axes=(0, None)) of a matmul is a matmul with one more
    free axis.

    Args:
      tell: called with the value and the axis that is mapped over.
    """
    handlers = vars(batching).get("to_elt_handlers")
    if handlers is None:  # another version of JAX: report nothing
        yield
        return

    def entered(to_elt: Any, _: Any, x: Any, axis: Any) -> Any:
        if not isinstance(axis, int):
            return x
        value, at = x, axis % x.ndim
        while isinstance(value, batching.BatchTracer):
            at += at >= value.batch_dim if value.batch_dim is not None else 0
            value = value.val
        if isinstance(value, _QuaxTracer):
            tell(value.value, at)
        return batching.BatchTracer(to_elt.args[0], x, axis % x.ndim, source_info_util.current())

    kinds = (_QuaxTracer, batching.BatchTracer)
    handlers.update(dict.fromkeys(kinds, entered))
    try:
        yield
    finally:
        for kind in kinds:
            handlers.pop(kind, None)


def _custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, **params):  # type: ignore[no-untyped-def]
    """Handle `jax.custom_vjp`, which quax's trace lacks (0.4.6).

    Without it any `jax.custom_vjp` in the user's function is an error, with or without weights.
    Operands are made dense (a stand-in is materialized, and reports it), and the call goes to the
    outer trace with its own derivative rule.
    """
    values = [self.to_value(t) for t in tracers]
    with jax_core.set_current_trace(self.parent_trace):
        dense = tuple(type(v).materialise(v) for v in values)
    params = dict(params, subfuns=(fun, fwd, bwd))
    avals = tuple(jax.typeof(x) for x in dense)
    out = primitive.bind_with_trace(self.parent_trace, dense, avals, params)
    return [_QuaxTracer(self, _dense(x)) for x in out]


if "process_custom_vjp_call" not in vars(_QuaxTrace):
    _QuaxTrace.process_custom_vjp_call = _custom_vjp_call
