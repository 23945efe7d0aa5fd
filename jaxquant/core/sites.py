"""Sites: how a function uses each of its weights, found by abstract tracing."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxquant.core import indexing, jax_private
from jaxquant.core.arguments import check_arguments
from jaxquant.core.contraction import Contraction, group_axis
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.standin import Pick, StandIn, is_array, is_standin, run


@dataclasses.dataclass(frozen=True)
class Site:
    """How one weight is used. Axes are counted from the front.

    Attributes:
      path: path of the weight in the parameter tree.
      shape: shape of the weight.
      contracted: axes that its (first) matmul sums over; () if it is in no matmul.
      batch: axes that are scanned, mapped (`vmap`) or paired with axes of the input in the matmul,
        and leading axes along which matrices are looked up or sliced (the experts chosen by a
        router).
      experts: the batch axes among whose matrices a router divides the rows of an input
        (`jax.lax.ragged_dot`).
      gathered: axis along which it is looked up, or None.
      input: identifier of the input arrays of its matmuls, in order of use; weights with equal
        identifiers read the same arrays. "" if it is in no matmul.
      otherwise: whether a primitive without a rule uses it (a reshape, a convolution, ...).
      also: the axes that its other matmuls sum over (w.T after w); calibration ignores these
        matmuls.
      covered: if all its matmuls read one input and some use only a part of it, the fraction of its
        outputs that they use in total; else None.
    """

    path: str
    shape: tuple[int, ...]
    contracted: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    gathered: int | None = None
    input: str = ""
    otherwise: bool = False
    also: tuple[tuple[int, ...], ...] = ()
    covered: float | None = None

    @property
    def output(self) -> tuple[int, ...]:
        """Axes that are neither contracted nor batch axes."""
        used = {*self.contracted, *self.batch}
        return tuple(a for a in range(len(self.shape)) if a not in used)

    @property
    def turn(self) -> int:
        """Position of the first input of a contracted weight, in order of use."""
        return int(self.input.split("[")[0].removeprefix("input"))


def sites(fn: Callable[..., PyTree], params: PyTree, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """Find how `fn(params, *args)` uses each floating-point leaf of `params` of rank 2 or more.

    The function is only traced: nothing is computed. Leaves that are not arrays (a flag, an
    activation function in the tree) are passed on unchanged.

    Args:
      fn: the function to trace.
      params: parameter tree; arrays or `jax.ShapeDtypeStruct`.
      *args, **kwargs: the other arguments of fn; arrays or `jax.ShapeDtypeStruct`.

    Returns:
      A dict that maps the path of each floating-point leaf of rank 2 or more to its `Site`.

    >>> import jax.numpy as jnp
    >>> s = sites(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, jnp.ones((2, 3)))
    >>> s["w"].contracted, s["w"].output
    ((0,), (1,))
    """
    check_arguments(sites, locals())
    log = _Log([], [], {})
    leaves = {p: w for p, w in path_leaves(params) if is_weight(w)}
    tracked = replace_leaves(
        params,
        {
            p: _Tracked(array=_abstract(w), path=p, leaf=tuple(range(-len(w.shape), 0)), log=log)
            for p, w in leaves.items()
        },
    )
    with jax_private.watching_vmap(_log_vmap):
        eqx.filter_eval_shape(lambda p, a, k: run(fn, p, *a, **k), tracked, args, kwargs)
    uses = lambda path: [u for u in log.uses if u.path == path]
    return {p: _summary(p, w, uses(p), log.mapped.get(p, set())) for p, w in leaves.items()}


def is_weight(leaf: PyTree) -> bool:
    """Return whether a leaf can be quantized: floating-point, rank >= 2, not yet a stand-in."""
    return (
        not is_standin(leaf)
        and is_array(leaf)
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and len(leaf.shape) >= 2
    )


def _abstract(w: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(w.shape, w.dtype)


@dataclasses.dataclass(frozen=True)
class _Use:
    """One use of a weight. Axes are those of the leaf, counted from its end.

    Attributes:
      kind: "dot", "gather" or "other".
      axes: the axes contracted or looked up.
      batch: axes paired with axes of the input, or looked up earlier.
      input: identifier of the array it multiplies.
      sizes: sizes of the axes that were still present.
      parts: axes that were sliced or looked up earlier, each with a text that identifies the part.
      experts: the axis of a stack whose matrices multiply a group of rows each.
    """

    path: str
    kind: str
    axes: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    input: str = ""
    sizes: dict[int, int] = dataclasses.field(default_factory=dict)
    parts: tuple[tuple[int, str], ...] = ()
    experts: tuple[int, ...] = ()

    def input_of(self, axes: set[int]) -> str:
        """Return `input`, extended by the parts taken along these axes."""
        return self.input + "".join(f"@{a}:{name}" for a, name in self.parts if a in axes)


@dataclasses.dataclass(frozen=True, eq=False)
class _Log:
    """The uses, in order. Holds on to the inputs, so that their identities stay unique."""

    uses: list
    inputs: list
    mapped: dict[str, set[int]]  # axes of each leaf that `jax.vmap` maps over

    def input_id(self, x: Any) -> str:
        for i, seen in enumerate(self.inputs):
            if seen is x:
                return f"input{i}"
        self.inputs.append(x)
        return f"input{len(self.inputs) - 1}"


class _Tracked(StandIn):
    """A dense weight that tracks which axes of the leaf its own axes are.

    Unlike other stand-ins it is stored in the order in which it is seen, so that any axis can come
    first and be scanned.
    """

    array: Any
    path: str = eqx.field(static=True)
    leaf: tuple[int | None, ...] = eqx.field(static=True)  # from the end; None: an added axis
    log: _Log = eqx.field(static=True)
    # Axes of the leaf along which matrices were looked up, and `parts` as in `_Use`.
    looked_up: tuple[int, ...] = eqx.field(static=True, default=())
    parts: tuple[tuple[int, str], ...] = eqx.field(static=True, default=())

    @property
    def order(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(-self.array.ndim, 0))

    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.array.shape, self.array.dtype)

    def materialise(self) -> Array:
        if not self.looked_up:  # otherwise the look-up is already recorded
            self.log.uses.append(_Use(self.path, "other"))
        return self.array

    def reordered(self, order: tuple[int, ...]) -> "_Tracked":
        array = jnp.transpose(self.array, order)
        return dataclasses.replace(self, array=array, leaf=self.leaf_axes(order))

    def cast(self, dtype: DTypeLike) -> "_Tracked":
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def at_leading(self, fn: Callable[[Array], Array]) -> "_Tracked":
        return dataclasses.replace(self, array=fn(self.array))

    def leading(self) -> int:
        return len(self.array.shape)

    def picked(self, pick: Pick) -> "_Tracked | None":
        """Follow the pick if it only drops leading axes, or if it leaves a matrix."""
        dropped = set(range(self.ndim)) - set(pick.source)
        first = pick.indices is None and dropped == set(range(len(dropped)))
        left = self.leaf_axes(a for a in range(self.ndim) if a not in {*dropped, *pick.looked_up})
        if dropped and not first and len({*left} - {*self.looked_up, None}) < 2:
            return None
        return dataclasses.replace(
            self,
            array=jnp.transpose(pick.take(self.array), pick.axes),
            leaf=self.leaf_axes(pick.source),
            looked_up=(*self.looked_up, *self.own(pick.looked_up)),
            parts=(*self.parts, *self._parts(pick)),
        )

    def _parts(self, pick: Pick) -> list[tuple[int, str]]:
        if pick.indices is not None:
            name = self.log.input_id(pick.indices)
            return [(axis, name) for axis in self.own(pick.looked_up)]
        return [(own, name) for axis, name in pick.names for own in self.own((axis,))]

    def leaf_axes(self, axes: Iterable[int | None]) -> tuple[int | None, ...]:
        """Map axes of this value to axes of the leaf, from its end; None for added axes."""
        kept = self.leaf[len(self.leaf) - self.array.ndim :]  # scan and vmap strip leading axes
        return tuple(None if a is None else kept[a] for a in axes)

    def own(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Return `leaf_axes` without the added axes."""
        return tuple(a for a in self.leaf_axes(axes) if a is not None)


def _log_vmap(w: Any, axis: int) -> None:
    if isinstance(w, _Tracked):
        w.log.mapped.setdefault(w.path, set()).update(w.own((axis,)))


def _log_dot(w: _Tracked, x: Any, c: Contraction) -> None:
    axes, batch = (w.own(a for _, a in pairs) for pairs in (c.contract, c.batch))
    named = zip(w.leaf_axes(range(w.ndim)), w.shape, strict=True)
    sizes = {a: size for a, size in named if a is not None}
    if w.looked_up and not set(sizes) - {*axes, *batch, *w.looked_up}:
        return  # vectors were looked up, not matrices
    axes = tuple(a for a in axes if a not in w.looked_up)
    input_id = w.log.input_id(x) + str([a for a, _ in c.contract])
    w.log.uses.append(_Use(w.path, "dot", axes, (*batch, *w.looked_up), input_id, sizes, w.parts))


@quax.register(jax.lax.dot_general_p)
def _(x: Any, w: _Tracked, **params: PyTree) -> Any:
    x = x.materialise() if is_standin(x) else x
    _log_dot(w, x, Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=False))
    return jax.lax.dot_general_p.bind(x, w.array, **params)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: _Tracked, x: Any, **params: PyTree) -> Any:
    if isinstance(x, _Tracked) and w.looked_up and not x.looked_up:  # rows of a table meet a weight
        c = Contraction.of(params["dimension_numbers"], w.ndim, x.ndim, weight_left=False)
        _log_dot(x, w, c)
        return jax.lax.dot_general_p.bind(w.materialise(), x.array, **params)
    x = x.materialise() if is_standin(x) else x
    _log_dot(w, x, Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=True))
    return jax.lax.dot_general_p.bind(w.array, x, **params)


@quax.register(jax_private.ragged_dot_general_p)
def _(x: Any, w: _Tracked, sizes: Any, **params: PyTree) -> Any:
    x = x.materialise() if is_standin(x) else x
    numbers = params["ragged_dot_dimension_numbers"]
    axis = group_axis(numbers, x.ndim, w.ndim)
    if axis is None:
        return jax_private.ragged_dot_general_p.bind(x, w.materialise(), sizes, **params)
    (over,), (k,) = numbers.dot_dimension_numbers[0]
    present = dict(zip(w.own(range(w.ndim)), w.shape, strict=True))
    use = _Use(w.path, "dot", w.own((k,)), (*w.own((axis,)), *w.looked_up),
               f"{w.log.input_id(x)}{[over]}", present, w.parts, w.own((axis,)))  # fmt: skip
    w.log.uses.append(use)
    return jax_private.ragged_dot_general_p.bind(x, w.array, sizes, **params)


@quax.register(jax.lax.gather_p)
def _(w: _Tracked, ids: Any, **params: PyTree) -> Any:
    cut = tuple(i for i, d in enumerate(w.shape) if params["slice_sizes"][i] != d)
    found = indexing.looked_up(w, ids, params)
    single = len(cut) == 1 or found is not None
    w.log.uses.append(_Use(w.path, "gather" if single else "other", w.own(cut)))
    return found if found is not None else jax.lax.gather_p.bind(w.array, ids, **params)


def _summary(path: str, w: jax.Array, uses: list[_Use], mapped: set[int]) -> Site:
    shape = tuple(w.shape)
    front = lambda axes: tuple(sorted(len(shape) + a for a in axes))
    dots = [u for u in uses if u.kind == "dot"]
    gathers = [u for u in uses if u.kind == "gather" and len(u.axes) == 1]
    found = Site(
        path,
        shape,
        gathered=len(shape) + gathers[0].axes[0] if gathers else None,
        otherwise=any(u.kind == "other" for u in uses),
    )
    if not dots:
        return found
    first = dots[0]
    alike = [u for u in dots if set(u.axes) == set(first.axes)]
    batch = _batch(alike, shape, mapped)
    return dataclasses.replace(
        found,
        contracted=front(first.axes),
        batch=front(batch),
        experts=front({axis for u in alike for axis in u.experts} & batch),
        input=" ".join(u.input_of({*u.axes, *batch}) for u in dots),
        also=tuple(dict.fromkeys(front(u.axes) for u in dots if u not in alike)),
        covered=_covered(alike, {*range(-len(shape), 0)} - batch - {*first.axes}, shape),
    )


def _batch(dots: list[_Use], shape: tuple[int, ...], mapped: set[int]) -> set[int]:
    """Return the batch axes of a weight, from all matmuls that sum over the same axes."""
    every = set(range(-len(shape), 0))
    batch: set[int] = set()
    for i, use in enumerate(dots):
        # Axes that the matmul does not see were dropped earlier, by scan, vmap or indexing.
        new = {*use.batch, *(every - set(use.sizes))}
        for axes in (new, mapped - {*use.axes}):
            if (i == 0 and axes is new) or every - batch - axes - {*use.axes}:
                batch |= axes
    for axis in sorted(every - batch):  # sliced leading axes count too, if a matrix is left
        before = set(range(-len(shape), axis))
        sliced = any(u.sizes.get(axis, shape[axis]) != shape[axis] for u in dots)
        left = every - batch - {axis, *dots[0].axes}
        if axis not in dots[0].axes and sliced and before <= batch and left:
            batch.add(axis)
    return batch


def _covered(dots: list[_Use], output: set[int], shape: tuple[int, ...]) -> float | None:
    """Return `Site.covered`."""
    share = lambda u, axes: math.prod(u.sizes.get(a, shape[a]) / shape[a] for a in axes)
    partial = any(share(u, {*output, *u.axes}) != 1 for u in dots)
    alike = len({u.input_of({*u.axes}) for u in dots}) == 1
    return sum(share(u, output) for u in dots) if partial and alike else None
