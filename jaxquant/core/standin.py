"""Stand-ins: values that take a weight's place in a parameter tree, and what all of them share.

A stand-in is a `quax.ArrayValue`; primitives that only move a weight's axes are answered here,
once, by renaming axes. What a stand-in does in a matmul is its own file's business.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, PyTree

from jaxquant.core import jax_private
from pallas_kernels.context import Setting

_notes = Setting[list | None]("notes", None)


def note(rule: str, why: str = "") -> None:
    """Tell a listening `explain` which rule is serving the primitive at hand."""
    heard = _notes.get()
    if heard is not None:
        heard.append((rule, why))


@contextlib.contextmanager
def listening() -> Iterator[list]:
    """Collect the notes of the rules that run inside."""
    heard: list = []
    with _notes.set(heard):
        yield heard


class _Run(NamedTuple):
    """One `run`: the quax values among its arguments, and what `once` has computed."""

    arguments: list[Any]
    done: dict[Any, tuple]


_running = Setting[_Run | None]("running", None)


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
    trace = jax_private.current_trace()  # what one loop body computed is nothing to the next
    place = (key, id(x), id(trace))
    if place not in seen:
        seen[place] = compute(), x, trace  # kept alive, so that their ids stay their own
    return seen[place][0]


class Pick(NamedTuple):
    """A choice along leading stored axes: a slice, a look-up, the dropping of axes of size 1.

    Attributes:
      take: makes it, of any array that has these leading axes.
      axes: of every axis of the result, its stored axis after `take`.
      source: of every axis of the result, the axis of the stand-in that it comes from; None: new.
      names: axes of the stand-in along which it is a slice, and which.
      indices: what it looks up, if it is a look-up, or None.
      looked_up: axes of the stand-in along which it does.
      fills: whether it gives NaN where an index is out of range, and not the nearest.
    """

    take: Callable[[jax.Array], jax.Array]
    axes: tuple[int, ...]
    source: tuple[int | None, ...]
    names: tuple[tuple[int, str], ...] = ()
    indices: Any = None
    looked_up: tuple[int, ...] = ()
    fills: bool = False


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
    def cast(self, dtype: DTypeLike) -> "StandIn":
        """The same value, with another dtype for what it decodes to."""

    @abc.abstractmethod
    def at_leading(self, fn: Callable[[jax.Array], jax.Array]) -> "StandIn":
        """Apply `fn`, which touches leading axes only, to every stored array."""

    @abc.abstractmethod
    def leading(self) -> int:
        """How many leading stored axes are plain batch axes of every stored array."""

    def picked(self, pick: Pick) -> "StandIn | None":
        """Some of the matrices of a stack; None: there is no rule for it."""
        ndim = len(pick.axes)
        return self.at_leading(pick.take).reordered(tuple(a - ndim for a in pick.axes))

    def narrowed(self, cuts: Mapping[int, Any]) -> "StandIn | None":
        """Cuts along axes that are not leading, by stored axis; None: there is no rule for it.

        A cut takes an array and the axis of it that it is made along.
        """
        return None

    def separate(self) -> "StandIn":
        """The same, with all leading axes in every stored array: what a scan takes apart."""
        return self

    def local(self) -> "StandIn":
        """The same, its shape that of the part that is on one device, inside `shard_map`."""
        return self

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


def is_array(x: Any) -> bool:
    """Whether x has a dtype: an array of any library, a stand-in, or the shape of either."""
    return hasattr(x, "dtype")


def is_standin(x: Any) -> bool:
    """Whether x is a stand-in; the `is_leaf` of every tree function here."""
    return isinstance(x, StandIn)


def dispatching(
    fn: Callable[..., PyTree], within: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[..., PyTree]:
    """`fn` with every quax value among its arguments dispatching on primitives.

    Trees are taken apart before, and put together inside, quax's trace: Flax NNX asks for the
    current trace whenever a `Variable` is rebuilt, and between the two there is none.

    Args:
      fn: a function of trees of arrays and stand-ins.
      within: makes the context that it is traced in.
    """
    is_value = lambda x: isinstance(x, quax.Value)

    def call(*args: Any, **kwargs: Any) -> PyTree:
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_value)
        if jax.sharding.get_abstract_mesh().manual_axes:
            leaves = [leaf.local() if is_standin(leaf) else leaf for leaf in leaves]
        trees = []

        def flat(leaves: list[Any]) -> list[Any]:
            a, k = jax.tree.unflatten(tree, leaves)
            out, out_tree = jax.tree.flatten(fn(*a, **k), is_leaf=is_value)
            trees.append(out_tree)
            return out

        # `explain` gives doubles of stand-ins, which hold them.
        values = [getattr(leaf, "inner", leaf) for leaf in leaves if is_value(leaf)]
        with within(), _running.set(_Run(values, {})):
            out = quax.quaxify(flat)(leaves)
        return jax.tree.unflatten(trees[0], out)

    return call


def run(fn: Callable[..., PyTree], *args: Any, **kwargs: Any) -> PyTree:
    """fn(*args, **kwargs), `dispatching`."""
    return dispatching(fn)(*args, **kwargs)


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
if jax_private.pvary_p is not None:  # inside `shard_map`; its arrays vary as they are split
    quax.register(jax_private.pvary_p)(_unchanged)


# --- primitives that call functions: stand-ins pass through ---------------------------------


@quax.register(jax_private.jit_p, precedence=1)
def _(*args: StandIn | ArrayLike, jaxpr: Any, **_: Any) -> Any:
    """A jitted function that receives a stand-in is inlined.

    quax keeps a cache by the identity of the inner jaxpr; inlining needs none, and lets `sites`
    see that two matmuls inside two calls read one input.
    """
    return quax.quaxify(jax_private.as_function(jaxpr))(*args)


@quax.register(jax_private.remat_p)
def _(*args: StandIn | ArrayLike, jaxpr: Any, policy: Any, prevent_cse: Any, **_: Any) -> Any:
    """`jax.checkpoint` of the same body, the stand-ins' arrays among its inputs."""
    body = quax.quaxify(jax_private.as_function(jaxpr))
    return jax.checkpoint(lambda *a: body(*a), policy=policy, prevent_cse=prevent_cse)(*args)


@quax.register(jax.lax.scan_p, precedence=1)
def _(*args: StandIn | ArrayLike, **params: PyTree) -> Any:
    """quax's own rule, after materialising what scan would slice along a packed axis."""
    return jax_private.scan(args, params, lambda w: _scannable(w) if is_standin(w) else w)


def _scannable(w: StandIn) -> Any:
    first_is_batch = w.leading() > 0 and w.axes()[0] == 0
    return w.separate() if first_is_batch else w.materialise()
