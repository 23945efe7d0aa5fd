"""Sites: how a function uses each of its weights, read off an abstract trace."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax

from jaxquant.contraction import Contraction
from jaxquant.paths import path_leaves, replace_leaves
from jaxquant.standin import StandIn, is_standin, run


@dataclasses.dataclass(frozen=True)
class Site:
    """How one weight is used.

    Attributes:
      path: of the weight in the parameter tree.
      shape: of the weight.
      contracted: its axes summed over by its (first) matmul; () if it is in none.
      batch: its axes that are batch axes: scanned, mapped, or paired in the matmul.
      gathered: axis along which it is looked up, or None.
      input: identifier of the input arrays of its matmuls, in order: weights that read the very
        same ones share it. "" if none.
      otherwise: whether some primitive without a rule uses it (a reshape, a convolution, ...).
    """

    path: str
    shape: tuple[int, ...]
    contracted: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    gathered: int | None = None
    input: str = ""
    otherwise: bool = False

    @property
    def output(self) -> tuple[int, ...]:
        """Axes that are neither contracted nor batch."""
        used = {*self.contracted, *self.batch}
        return tuple(a for a in range(len(self.shape)) if a not in used)

    @property
    def turn(self) -> int:
        """Of a contracted weight: which input, in the order of use, is its first."""
        return int(self.input.split("[")[0].removeprefix("input"))


def sites(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """How `fn(params, *args)` uses each floating leaf of rank >= 2 of `params`, by path.

    Abstract: nothing is computed; arrays and `jax.ShapeDtypeStruct` serve alike, and what is
    neither (a flag, an activation function in the tree) is passed on as it is.

    >>> import jax.numpy as jnp
    >>> s = sites(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, jnp.ones((2, 3)))
    >>> s["w"].contracted, s["w"].output
    ((0,), (1,))
    """
    log = _Log([], [])
    leaves = {p: w for p, w in path_leaves(params) if is_weight(w)}
    tracked = replace_leaves(
        params,
        {
            p: _Tracked(array=_abstract(w), path=p, leaf=tuple(range(-len(w.shape), 0)), log=log)
            for p, w in leaves.items()
        },
    )
    eqx.filter_eval_shape(lambda p, a, k: run(fn, p, *a, **k), tracked, args, kwargs)
    return {p: _summary(p, w, [u for u in log.uses if u.path == p]) for p, w in leaves.items()}


def is_weight(leaf: Any) -> bool:
    """Whether a leaf may be quantized: floating, rank 2 or more, not yet a stand-in."""
    return (
        not is_standin(leaf)
        and hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and len(leaf.shape) >= 2
    )


def _abstract(w: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(w.shape, w.dtype)


@dataclasses.dataclass(frozen=True)
class _Use:
    path: str
    kind: str  # "dot" | "gather" | "other"
    axes: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    input: str = ""
    visible: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Log:
    """Uses, in order. Inputs are kept alive so that their identities stay unique."""

    uses: list
    inputs: list

    def input_id(self, x: Any) -> str:
        for i, seen in enumerate(self.inputs):
            if seen is x:
                return f"input{i}"
        self.inputs.append(x)
        return f"input{len(self.inputs) - 1}"


class _Tracked(StandIn):
    """A dense weight that remembers which axes of the leaf (from its end) its own are.

    It is stored as it is seen, unlike the others: any of its axes may come first, to be scanned.
    """

    array: Any
    path: str = eqx.field(static=True)
    leaf: tuple[int, ...] = eqx.field(static=True)
    log: _Log = eqx.field(static=True)

    @property
    def order(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(-self.array.ndim, 0))

    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def aval(self) -> Any:
        return jax.core.ShapedArray(self.array.shape, self.array.dtype)

    def materialise(self) -> Any:
        self.log.uses.append(_Use(self.path, "other"))
        return self.array

    def reordered(self, order: tuple[int, ...]) -> "_Tracked":
        array = jnp.transpose(self.array, order)
        return dataclasses.replace(self, array=array, leaf=self.leaf_axes(order))

    def cast(self, dtype: Any) -> "_Tracked":
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def at_leading(self, fn: Any) -> "_Tracked":
        return dataclasses.replace(self, array=fn(self.array))

    def leading(self) -> int:
        return len(self.array.shape)

    def leaf_axes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Axes of this value as axes of the leaf, counted from its end."""
        kept = self.leaf[len(self.leaf) - self.array.ndim :]  # scan and vmap strip leading axes
        return tuple(kept[a] for a in axes)


def _log_dot(w: _Tracked, x: Any, c: Contraction) -> None:
    axes = w.leaf_axes(tuple(a for _, a in c.contract))
    batch = w.leaf_axes(tuple(a for _, a in c.batch))
    input_id = w.log.input_id(x) + str([a for a, _ in c.contract])
    visible = w.leaf_axes(tuple(range(w.ndim)))
    w.log.uses.append(_Use(w.path, "dot", axes, batch, input_id, visible))


@quax.register(jax.lax.dot_general_p)
def _(x: Any, w: _Tracked, **params: Any) -> Any:
    x = x.materialise() if is_standin(x) else x
    _log_dot(w, x, Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=False))
    return jax.lax.dot_general_p.bind(x, w.array, **params)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: _Tracked, x: Any, **params: Any) -> Any:
    x = x.materialise() if is_standin(x) else x
    _log_dot(w, x, Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=True))
    return jax.lax.dot_general_p.bind(w.array, x, **params)


@quax.register(jax.lax.gather_p)
def _(w: _Tracked, ids: Any, **params: Any) -> Any:
    cut = tuple(i for i, d in enumerate(w.shape) if params["slice_sizes"][i] != d)
    w.log.uses.append(_Use(w.path, "gather", w.leaf_axes(cut)))
    return jax.lax.gather_p.bind(w.array, ids, **params)


def _summary(path: str, w: Any, uses: list[_Use]) -> Site:
    ndim = len(w.shape)
    front = lambda axes: tuple(sorted(ndim + a for a in axes))
    dots = [u for u in uses if u.kind == "dot"]
    gathers = [u for u in uses if u.kind == "gather" and len(u.axes) == 1]
    found = Site(
        path,
        tuple(w.shape),
        gathered=ndim + gathers[0].axes[0] if gathers else None,
        otherwise=any(u.kind == "other" for u in uses),
    )
    if not dots:
        return found
    first = dots[0]
    # Axes the matmul never saw were sliced away before it: by scan, vmap, or indexing.
    sliced = set(range(-ndim, 0)) - set(first.visible)
    return dataclasses.replace(
        found,
        contracted=front(first.axes),
        batch=front({*first.batch, *sliced}),
        input=" ".join(u.input for u in dots),
    )
