"""Stand-ins: values that take a weight's place in a parameter tree, and what all of them share.

A stand-in is a `quax.ArrayValue`; primitives that only move a weight's axes are answered here,
once, by renaming axes. What a stand-in does in a matmul is its own file's business.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax._src import core as jax_core
from jax._src.ad_checkpoint import remat_p  # jax.extend does not export it
from jax.extend import core as jex_core
from jaxtyping import ArrayLike
from quax._compat import jit_p
from quax._trace import _dense, _QuaxTrace, _QuaxTracer

_notes: ContextVar[list | None] = ContextVar("jaxquant_notes", default=None)


def note(rule: str, why: str = "") -> None:
    """Tell a listening `explain` which rule is serving the primitive at hand."""
    heard = _notes.get()
    if heard is not None:
        heard.append((rule, why))


@contextlib.contextmanager
def listening() -> Iterator[list]:
    """Collect the notes of the rules that run inside."""
    heard: list = []
    token = _notes.set(heard)
    try:
        yield heard
    finally:
        _notes.reset(token)


class _Run(NamedTuple):
    """One `run`: the quax values among its arguments, and what `once` has computed."""

    arguments: list[Any]
    done: dict[Any, tuple]


_running: ContextVar[_Run | None] = ContextVar("jaxquant_running", default=None)


def arguments() -> list[Any]:
    """The quax values among the arguments of the function that runs."""
    running = _running.get()
    return [] if running is None else running.arguments


def once(key: Any, x: Any, compute: Callable[[], Any]) -> Any:
    """compute(), or what it gave before for this key and this very x within one `run`.

    XLA would find the repetition itself if the arrays involved were the same; those of two
    weights are two arrays, though equal.
    """
    running = _running.get()
    if running is None or key is None:
        return compute()
    seen = running.done
    trace = jax_core.trace_ctx.trace  # what one loop body computed is nothing to the next
    place = (key, id(x), id(trace))
    if place not in seen:
        seen[place] = compute(), x, trace  # kept alive, so that their ids stay their own
    return seen[place][0]


class StandIn(quax.ArrayValue):
    """A weight seen through `order`: its axis i is axis `order[i]` of what is stored.

    `order` counts from the end and may be longer or shorter than the value has axes: `lax.scan`
    and `vmap` strip leading axes from the stored arrays, stacking adds some, and neither tells
    the metadata. The last `ndim` entries count; leading axes without an entry are in place.
    """

    if TYPE_CHECKING:  # a field or a property, as the class likes

        @property
        def order(self) -> tuple[int, ...]: ...
    else:
        order: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the stored order of axes."""

    @abc.abstractmethod
    def reordered(self, order: tuple[int, ...]) -> "StandIn":
        """The same stored arrays seen through another order."""

    @abc.abstractmethod
    def cast(self, dtype: Any) -> "StandIn":
        """The same value, with another dtype for what it decodes to."""

    @abc.abstractmethod
    def at_leading(self, fn: Callable[[jax.Array], jax.Array]) -> "StandIn":
        """Apply `fn`, which touches leading axes only, to every stored array."""

    @abc.abstractmethod
    def leading(self) -> int:
        """How many leading stored axes are plain batch axes of every stored array."""

    def axes(self) -> tuple[int, ...]:
        """Stored axis, counted from the front, of every axis."""
        ndim = len(self.stored_shape())
        added = range(ndim - len(self.order))  # leading axes the metadata was not told of
        kept = self.order[len(self.order) - ndim :] if len(self.order) > ndim else self.order
        return (*added, *(ndim + a for a in kept))

    def view_shape(self) -> tuple[int, ...]:
        """Shape as the user's function sees it."""
        stored = self.stored_shape()
        return tuple(stored[a] for a in self.axes())


def is_standin(x: Any) -> bool:
    """Whether x is a stand-in; the `is_leaf` of every tree function here."""
    return isinstance(x, StandIn)


def run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs) with every quax value among the arguments dispatching on primitives.

    Trees are taken apart before, and put together inside, quax's trace: Flax NNX asks for the
    current trace whenever a `Variable` is rebuilt, and between the two there is none.
    """
    is_value = lambda x: isinstance(x, quax.Value)
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_value)
    trees = []

    def flat(leaves: list[Any]) -> list[Any]:
        a, k = jax.tree.unflatten(tree, leaves)
        out, out_tree = jax.tree.flatten(fn(*a, **k), is_leaf=is_value)
        trees.append(out_tree)
        return out

    # `explain` gives doubles of stand-ins, which hold them.
    values = [getattr(leaf, "inner", leaf) for leaf in leaves if is_value(leaf)]
    token = _running.set(_Run(values, {}))
    try:
        out = quax.quaxify(flat)(leaves)
    finally:
        _running.reset(token)
    return jax.tree.unflatten(trees[0], out)


@quax.register(jax.lax.transpose_p)
def _(w: StandIn, *, permutation: tuple[int, ...], **_: Any) -> StandIn:
    axes, ndim = w.axes(), len(permutation)
    return w.reordered(tuple(axes[p] - ndim for p in permutation))


@quax.register(jax.lax.convert_element_type_p)
def _(w: StandIn, *, new_dtype: Any, **_: Any) -> Any:
    if jnp.issubdtype(new_dtype, jnp.floating):
        return w.cast(new_dtype)
    return jax.lax.convert_element_type(w.materialise(), new_dtype)


def _unchanged(w: StandIn, **_: Any) -> StandIn:
    return w


quax.register(jax.lax.copy_p)(_unchanged)
quax.register(jax.lax.stop_gradient_p)(_unchanged)


@quax.register(jax.lax.squeeze_p)
def _(w: StandIn, *, dimensions: tuple[int, ...], **params: Any) -> Any:
    """Dropping leading batch axes keeps the stand-in: `w[i]` is slice, then squeeze."""
    dropped = sorted(dimensions)
    if dropped == list(range(len(dropped))) and _leading_identity(w, len(dropped)):
        return w.at_leading(lambda a: jax.lax.squeeze(a, dropped))
    return jax.lax.squeeze_p.bind(w.materialise(), dimensions=dimensions, **params)


@quax.register(jax.lax.slice_p)
def _(w: StandIn, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    shape = w.view_shape()
    steps = strides or (1,) * len(shape)
    cuts = [slice(*cut) for cut in zip(start_indices, limit_indices, steps, strict=True)]
    partial = [i for i, c in enumerate(cuts) if c != slice(0, shape[i], 1)]
    count = max(partial, default=-1) + 1
    if _leading_identity(w, count):
        return w.at_leading(lambda a: a[tuple(cuts[:count])])
    return jax.lax.slice_p.bind(
        w.materialise(), start_indices=start_indices, limit_indices=limit_indices, strides=strides
    )


@quax.register(jax.lax.dynamic_slice_p)
def _(w: StandIn, *starts: ArrayLike, slice_sizes: tuple[int, ...]) -> Any:
    shape = w.view_shape()
    cut = max((i + 1 for i, s in enumerate(slice_sizes) if s != shape[i]), default=0)
    if not _leading_identity(w, cut):
        return jax.lax.dynamic_slice_p.bind(w.materialise(), *starts, slice_sizes=slice_sizes)

    def cut_out(a: jax.Array) -> jax.Array:
        rest = a.ndim - cut
        zero = jnp.zeros((), jnp.asarray(starts[0]).dtype) if starts else 0
        return jax.lax.dynamic_slice(
            a, (*starts[:cut], *(zero,) * rest), (*slice_sizes[:cut], *a.shape[cut:])
        )

    return w.at_leading(cut_out)


def _leading_identity(w: StandIn, count: int) -> bool:
    """Whether the first `count` axes are stored leading batch axes, in place."""
    return count <= w.leading() and w.axes()[:count] == tuple(range(count))


# --- primitives that call functions: stand-ins pass through ---------------------------------


@quax.register(jit_p, precedence=1)
def _(*args: StandIn | ArrayLike, jaxpr: Any, **_: Any) -> Any:
    """A jitted function that receives a stand-in is inlined.

    quax keeps a cache by the identity of the inner jaxpr; inlining needs none, and lets `sites`
    see that two matmuls inside two calls read one input.
    """
    return quax.quaxify(jex_core.jaxpr_as_fun(jaxpr))(*args)


@quax.register(remat_p)
def _(*args: StandIn | ArrayLike, jaxpr: Any, policy: Any, prevent_cse: Any, **_: Any) -> Any:
    """`jax.checkpoint` of the same body, the stand-ins' arrays among its inputs."""
    closed = jaxpr if hasattr(jaxpr, "consts") else jex_core.ClosedJaxpr(jaxpr, ())
    body = quax.quaxify(jex_core.jaxpr_as_fun(closed))
    return jax.checkpoint(lambda *a: body(*a), policy=policy, prevent_cse=prevent_cse)(*args)


@quax.register(jax.lax.scan_p, precedence=1)
def _(*args: StandIn | ArrayLike, **params: Any) -> Any:
    """quax's own rule, after materialising what scan would slice along a packed axis."""
    consts, carry, xs = quax._compat.unpack_scan_args(args, params)
    safe = [w.materialise() if is_standin(w) and not _leading_identity(w, 1) else w for w in xs]
    return quax._primitives.scan_quax(*consts, *carry, *safe, **params)


def _custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, **params):  # type: ignore[no-untyped-def]
    """What quax's trace lacks (0.4.6): without it any `jax.custom_vjp` in the user's function,
    weights or not, is an error. Operands are made dense (a stand-in is materialised, and says
    so) and the call goes to the outer trace, its own derivative rule intact.
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
