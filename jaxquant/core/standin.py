"""Stand-ins: values that take a weight's place in a parameter tree, and what they have in common.

A stand-in is a `quax.ArrayValue`. Primitives that only move the axes of a weight are handled here
for all stand-ins, by renumbering axes. How a stand-in behaves in a matmul is defined in its own
module.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
import wadler_lindig
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, PyTree

from jaxquant.core import jax_private
from jaxquant.core.outside import NotAnArray, tell_linen
from pallas_kernels.context import Setting

_notes = Setting[list | None]("notes", None)


def note(rule: str, why: str = "") -> None:
    """Report to `explain`, if it is listening, which rule handles the current primitive.

    Args:
      rule: name of the rule.
      why: the reason.
    """
    heard = _notes.get()
    if heard is not None:
        heard.append((rule, why))


@contextlib.contextmanager
def listening() -> Iterator[list]:
    """Collect the notes of the rules that run inside, as a list of (rule, why)."""
    heard: list = []
    with _notes.set(heard):
        yield heard


class _Run(NamedTuple):
    """State of one `run`: the quax values among its arguments, and the results of `once`."""

    arguments: list[Any]
    done: dict[Any, tuple]


_running = Setting[_Run | None]("running", None)


def arguments() -> list[Any]:
    """Return the quax values among the arguments of the running function."""
    running = _running.get()
    return [] if running is None else running.arguments


def once(key: Any, x: Any, compute: Callable[[], Any]) -> Any:
    """Return compute(), or its earlier result for this key and this very x within the same `run`.

    XLA would merge repeated computations only if they used the same arrays; two weights hold two
    arrays, even if these are equal.

    Args:
      key: identifies the computation; None always computes.
      x: the input, compared by identity.
      compute: the computation.
    """
    running = _running.get()
    if running is None or key is None:
        return compute()
    seen = running.done
    trace = jax_private.current_trace()  # one loop body cannot use values of another
    place = (key, id(x), id(trace))
    if place not in seen:
        seen[place] = compute(), x, trace  # kept alive, so that their ids stay unique
    return seen[place][0]


class Pick(NamedTuple):
    """A selection along leading stored axes: a slice, a look-up, or dropping axes of size 1.

    Attributes:
      take: applies the selection to any array with these leading axes.
      axes: for every axis of the result, its stored axis after `take`.
      source: for every axis of the result, the axis of the stand-in it comes from; None for new
        axes.
      names: (axis, text) pairs: axes of the stand-in that are sliced, and which slice it is.
      indices: the indices of a look-up, else None.
      looked_up: axes of the stand-in along which matrices are looked up.
      fills: whether an index out of range gives NaN, rather than the nearest entry.
    """

    take: Callable[[jax.Array], jax.Array]
    axes: tuple[int, ...]
    source: tuple[int | None, ...]
    names: tuple[tuple[int, str], ...] = ()
    indices: Any = None
    looked_up: tuple[int, ...] = ()
    fills: bool = False


class StandIn(NotAnArray, quax.ArrayValue):
    """A weight seen through `order`: its axis i is axis `order[i]` of the stored array.

    `order` counts from the end and may be longer or shorter than the number of axes: `lax.scan` and
    `vmap` strip leading axes from the stored arrays, and stacking adds some, without updating the
    metadata. The last `ndim` entries apply; leading axes without an entry are in place.
    """

    if TYPE_CHECKING:  # may be a field or a property

        @property
        def order(self) -> tuple[int, ...]: ...
    else:
        order: eqx.AbstractVar[tuple[int, ...]]

    def __check_init__(self) -> None:  # Equinox calls it after every construction
        tell_linen()

    @abc.abstractmethod
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape in the stored order of axes."""

    @abc.abstractmethod
    def reordered(self, order: tuple[int, ...]) -> "StandIn":
        """Return the same stored arrays seen through another order.

        Args:
          order: the new order, as described for the class.
        """

    @abc.abstractmethod
    def cast(self, dtype: DTypeLike) -> "StandIn":
        """Return the same value with another dtype to decode to."""

    @abc.abstractmethod
    def at_leading(self, fn: Callable[[jax.Array], jax.Array]) -> "StandIn":
        """Apply a function to every stored array.

        Args:
          fn: a function that changes leading axes only.
        """

    @abc.abstractmethod
    def leading(self) -> int:
        """Return the number of leading stored axes that are batch axes of every stored array."""

    def picked(self, pick: Pick) -> "StandIn | None":
        """Select matrices of a stack; return None if there is no rule for the selection."""
        ndim = len(pick.axes)
        return self.at_leading(pick.take).reordered(tuple(a - ndim for a in pick.axes))

    def narrowed(self, cuts: Mapping[int, Any]) -> "StandIn | None":
        """Cut along axes that are not leading; return None if there is no rule for it.

        Args:
          cuts: the cut for each stored axis, a function of an array and the axis to cut along.
        """
        return None

    def separate(self) -> "StandIn":
        """Return the same value with all leading axes in every stored array, as scan needs it."""
        return self

    def local(self) -> "StandIn":
        """Return the same value with the shape of its part on one device, inside `shard_map`."""
        return self

    def axes(self) -> tuple[int, ...]:
        """Return the stored axis, counted from the front, of every axis."""
        ndim = len(self.stored_shape())
        added = range(ndim - len(self.order))  # leading axes that the metadata does not know of
        kept = self.order[len(self.order) - ndim :] if len(self.order) > ndim else self.order
        return (*added, *(ndim + a for a in kept))

    def view_shape(self) -> tuple[int, ...]:
        """Return the shape that the user's function sees."""
        stored = self.stored_shape()
        return tuple(stored[a] for a in self.axes())

    @property
    def __jax_array__(self) -> Callable[..., NoReturn]:
        """What JAX asks of a value that is not an array.

        quax and Equinox take any value that has it for an array, so inside a run it is absent.
        """
        if _running.get() is not None:
            raise AttributeError("__jax_array__")
        return self.refuse

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype}{list(self.shape)})"

    def __pdoc__(self, **_: Any) -> wadler_lindig.AbstractDoc:
        """Return what Equinox prints for it as a part of a module."""
        return wadler_lindig.TextDoc(repr(self))


def is_array(x: Any) -> bool:
    """Return whether x has a dtype: an array of any library, a stand-in, or the shape of either."""
    return hasattr(x, "dtype")


def is_standin(x: Any) -> bool:
    """Return whether x is a stand-in; used as `is_leaf` in tree functions."""
    return isinstance(x, StandIn)


def dispatching(
    fn: Callable[..., PyTree],
    within: Callable[[], AbstractContextManager] = nullcontext,
    entering: Callable[[tuple], tuple] = lambda args: args,
    leaving: Callable[[PyTree], PyTree] = lambda out: out,
) -> Callable[..., PyTree]:
    """Return `fn` with the quax values among its arguments dispatching on primitives.

    Trees are flattened before quax's trace and rebuilt inside it: Flax NNX asks for the current
    trace whenever it rebuilds a `Variable`, and between those two points there is none.

    Args:
      fn: a function of trees of arrays and stand-ins.
      within: makes the context that the function is traced in.
      entering: changes the arguments (args, kwargs) first.
      leaving: changes the result.

    Returns:
      A function of the same arguments.
    """
    is_value = lambda x: isinstance(x, quax.Value)

    def call(*args: Any, **kwargs: Any) -> PyTree:
        leaves, tree = jax.tree.flatten(entering((args, kwargs)), is_leaf=is_value)
        if jax.sharding.get_abstract_mesh().manual_axes:
            leaves = [leaf.local() if is_standin(leaf) else leaf for leaf in leaves]
        trees = []

        def flat(leaves: list[Any]) -> list[Any]:
            a, k = jax.tree.unflatten(tree, leaves)
            out, out_tree = jax.tree.flatten(fn(*a, **k), is_leaf=is_value)
            trees.append(out_tree)
            return out

        # `explain` passes wrappers, which hold the stand-ins in `inner`.
        values = [getattr(leaf, "inner", leaf) for leaf in leaves if is_value(leaf)]
        with within(), _running.set(_Run(values, {})):
            out = quax.quaxify(flat)(leaves)
        return leaving(jax.tree.unflatten(trees[0], out))

    return call


def run(fn: Callable[..., PyTree], *args: Any, **kwargs: Any) -> PyTree:
    """Call fn(*args, **kwargs) with `dispatching`."""
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
if jax_private.pvary_p is not None:  # for `shard_map`, whose arrays are already marked as varying
    quax.register(jax_private.pvary_p)(_unchanged)


# --- primitives that call functions: stand-ins pass through ---------------------------------


@quax.register(jax_private.jit_p, precedence=1)
def _(*args: StandIn | ArrayLike, jaxpr: Any, **_: Any) -> Any:
    """Inline a jitted function that receives a stand-in.

    quax caches by the identity of the inner jaxpr. Inlining needs no cache, and lets `sites` see
    that matmuls inside two calls read the same input.
    """
    return quax.quaxify(jax_private.as_function(jaxpr))(*args)


@quax.register(jax_private.remat_p)
def _(*args: StandIn | ArrayLike, jaxpr: Any, policy: Any, prevent_cse: Any, **_: Any) -> Any:
    """Apply `jax.checkpoint` to the same body, with the stand-ins' arrays among its inputs."""
    body = quax.quaxify(jax_private.as_function(jaxpr))
    return jax.checkpoint(lambda *a: body(*a), policy=policy, prevent_cse=prevent_cse)(*args)


@quax.register(jax.lax.scan_p, precedence=1)
def _(*args: StandIn | ArrayLike, **params: PyTree) -> Any:
    """Apply quax's rule, after making dense what scan would slice along a packed axis."""
    return jax_private.scan(args, params, lambda w: _scannable(w) if is_standin(w) else w)


def _scannable(w: StandIn) -> Any:
    first_is_batch = w.leading() > 0 and w.axes()[0] == 0
    return w.separate() if first_is_batch else w.materialise()
