"""Optimizer state in host memory: a jitted step fetches it leaf by leaf, layer by layer.

A group is what is updated at once: all small leaves, or one large leaf. A group's tree is the whole
tree with `optax.MaskedNode` in place of the leaves of other groups, so that label trees and masks
made for the whole tree still fit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import PyTree

from jaxquant.adapters.leafwise import abstract, draws, reached, treats_rows_alone
from jaxquant.core.arguments import check_arguments

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
LANES = 128  # of a TPU: its tiles have as many columns
_leaves = jax.tree.leaves


def paged(
    optimizer: optax.GradientTransformation, *, least: int = 100_000, piece_bytes: int = 1 << 26
) -> optax.GradientTransformationExtraArgs:
    """Keep the state of an optimizer in pinned host memory.

    The state has the structure, dtypes and shardings that it has without `paged`, and the updates
    are the same: bit for bit, unless XLA rewrites their arithmetic in one program only (a / c as a
    * (1 / c), say). What lies in host memory has one more axis in front, of length 1: JAX pairs
    donated arguments with results by shape, and would put parameters where their moments were. Its
    last two axes are swapped if only that makes the last a multiple of 128, as for LoRA's A: a TPU
    holds the array in this order anyway.

    `update` belongs inside a jitted step. It fetches the state of one leaf, updates it, returns it,
    and only then fetches the next. A leaf of three or more axes, such as layers stacked by
    `nn.scan`, is walked along its first axis. So the device holds the state of some layers at a
    time (`piece_bytes`), once as it was and once as it becomes. All of the state crosses to the
    device and back in every step.

    Donate the state to the step, or host memory holds it twice. Results stay in host memory without
    `out_shardings`, those of a jitted `init` too. `jax.eval_shape` does not show memory kinds, so
    restore a checkpoint to the shardings of the arrays that `init` returns.

    The optimizer must treat every leaf on its own, as adam, adamw, lion, sgd, `adam8bit` and their
    masked forms do. What looks across leaves goes before it:
    `optax.chain(optax.clip_by_global_norm(0.3), paged(optax.adamw(1e-4)))`. An optimizer that looks
    across the layers of a leaf, such as adafactor, is correct, but gets the whole leaf at once.

    Args:
      optimizer: any Optax optimizer that treats every leaf on its own.
      least: number of elements from which on a leaf's state is kept in host memory; at least 1. The
        state of smaller leaves, and numbers such as step counts, stay on the device.
      piece_bytes: number of bytes of the state of a leaf of three or more axes that are fetched at
        once, at least 1. Default: 64 MiB. As many layers as fit, and at least one, are updated at a
        time. Leaves of one or two axes are fetched whole. If the first axis of a leaf is sharded
        over devices, pass at least the size of its state, so that it is not cut.

    Returns:
      The optimizer. Its `init` creates the state of one leaf at a time.

    Raises:
      ValueError: at `init`, a part of the state belongs to several leaves; at `update`, before
        anything is computed, the optimizer looks across leaves, or the state is another's.

    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, whose paging is CUDA's: that moves state
    only when the device's memory is full.

    >>> import functools
    >>> optimizer = paged(optax.adamw(1e-3), least=4096)
    >>> params = {"w": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
    >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
    ... def step(params, state, x):
    ...     loss = lambda p: jnp.mean((x @ p["w"] + p["bias"]) ** 2)
    ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> state = optimizer.init(params)
    >>> for x in jnp.ones((3, 8, 64)):
    ...     params, state = step(params, state, x)
    >>> {name: jax.typeof(m).memory_space.name for name, m in state[0].mu.items()}
    {'bias': 'Device', 'w': 'Host'}
    """
    check_arguments(paged, locals())
    if least < 1 or piece_bytes < 1:
        raise ValueError(
            f"least and piece_bytes must be 1 or more, got {least} and {piece_bytes}: least=1 "
            "pages every leaf, piece_bytes=1 updates one layer at a time"
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(params)
        plan = _plan(inner.init, leaves, tree, least, piece_bytes)
        state: list = [None] * plan.places
        for group in plan.groups:
            made = _made(inner.init, tree, group, [leaves[i] for i in group.members])
            for place, a in zip(group.places, made, strict=True):
                state[place] = a if state[place] is None else state[place]
        return jax.tree.unflatten(jax.tree.structure(plan.state), state)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple:
        tree: Any = jax.tree.structure(updates)
        leaves = _leaves(updates)
        values = leaves if params is None else tree.flatten_up_to(params)
        plan = _plan(inner.init, values, tree, least, piece_bytes)
        plan.check(state)
        call = lambda u, s, p: inner.update(u, s, None if params is None else p, **extra)
        _check_apart(call, plan, updates, plan.state, tree.unflatten(values))
        old, new_state, new = _leaves(state), _leaves(state), list(leaves)
        last: list = []
        for group in plan.groups:
            g, p = ([a[i] for i in group.members] for a in (leaves, values))
            step = _step(call, tree, group)
            u, part, last = _paged_step(step, group, g, p, [old[n] for n in group.places], last)
            for i, a in zip(group.members, u, strict=True):
                new[i] = a
            for place, own, a in zip(group.places, group.own, part, strict=True):
                new_state[place] = a if own or group is plan.groups[0] else new_state[place]
        return tree.unflatten(new), jax.tree.unflatten(jax.tree.structure(state), new_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Group(NamedTuple):
    """Leaves that are updated at once.

    Attributes:
      members: their numbers among the leaves of the tree.
      tree: structure of the state of a tree that has only them.
      state: shapes of the leaves of that state on the device.
      places: numbers of these leaves among those of the whole state.
      own: which of those belong to the members; the others, such as counts, are shared.
      host: which of those lie in host memory.
      rows: how much of the first axis is updated at a time; 0 for all of it.
    """

    members: tuple[int, ...]
    tree: Any
    state: tuple[Any, ...]
    places: tuple[int, ...]
    own: tuple[bool, ...]
    host: tuple[bool, ...]
    rows: int


class _Plan(NamedTuple):
    """The groups, small leaves first; shapes of the whole state on the device, and their number."""

    groups: list[_Group]
    state: Any
    places: int

    def check(self, state: PyTree) -> None:
        """Raise ValueError unless this is the state of the plan."""
        host = {n for g in self.groups for n, h in zip(g.places, g.host, strict=True) if h}
        whole = enumerate(_leaves(self.state))
        here = [_shape_stored(a.shape) if n in host else a.shape for n, a in whole]
        structures: list[Any] = [jax.tree.structure(a) for a in (state, self.state)]
        if structures[0] != structures[1] or here != [jnp.shape(a) for a in _leaves(state)]:
            raise ValueError(
                f"the state must be what init of this optimizer returns, of shapes {here}, got "
                f"{[jnp.shape(a) for a in _leaves(state)]}: call init, or restore such a state"
            )


def _plan(init: Callable, leaves: Sequence, tree: Any, least: int, piece_bytes: int) -> _Plan:
    leaves = [jax.tree.map(abstract, a) for a in leaves]
    state = jax.eval_shape(init, tree.unflatten(leaves))
    paths = jax.tree.leaves_with_path(state)
    places = {path: place for place, (path, _) in enumerate(paths)}
    shared = {p for p, _ in jax.tree.leaves_with_path(jax.eval_shape(init, _only(tree, {})))}
    large = [i for i, a in enumerate(leaves) if getattr(a, "size", 0) >= least]
    small = [i for i in range(len(leaves)) if i not in set(large)]

    def group(members: Sequence[int], paging: bool) -> _Group:
        part = lambda *a: init(_only(tree, dict(zip(members, a, strict=True))))
        found, structure = jax.tree.flatten_with_path(
            jax.eval_shape(part, *(leaves[i] for i in members))
        )
        own = tuple(path not in shared for path, _ in found)
        host = tuple(paging and o and a.ndim > 0 for o, (_, a) in zip(own, found, strict=True))
        at = tuple(places.get(path, -1) for path, _ in found)
        rows = _rows(part, leaves[members[0]], own, piece_bytes) if paging else 0
        state = tuple(abstract(a) for _, a in found)
        return _Group(tuple(members), structure, state, at, own, host, rows)

    groups = [group(small, False), *(group([i], True) for i in large)]
    owned = sorted(n for g in groups for n, own in zip(g.places, g.own, strict=True) if own)
    if owned != sorted(places[path] for path in places if path not in shared):
        raise ValueError(
            "paged needs an optimizer whose state belongs to one leaf of the parameters each, or "
            f"to none; got the state {state}, of which parts belong to several leaves"
        )
    return _Plan(groups, state, len(paths))


def _rows(init: Callable, leaf: Any, own: Sequence[bool], piece_bytes: int) -> int:
    """Return how much of the first axis to update at a time; 0 if the state has no such axis."""
    if leaf.ndim < 3:
        return 0

    def state(rows: int) -> list:
        made = _leaves(jax.eval_shape(init, _cut(leaf, rows)))
        same = len(made) == len(own)  # not, if an optimizer treats small leaves differently
        return [abstract(a) for a, o in zip(made, own, strict=True) if o] if same else []

    length, whole = leaf.shape[0], state(leaf.shape[0])
    row_bytes = sum(a.size * a.dtype.itemsize for a in whole) // length
    fit = [n for n in range(1, length + 1) if length % n == 0 and n * row_bytes <= piece_bytes]
    rows = max(fit, default=1)
    has_rows = all(a.shape[:1] == (length,) for a in whole)
    alike = has_rows and [_cut(a, rows) for a in whole] == state(rows)
    return rows if alike and rows < length else 0


def _made(init: Callable, tree: Any, group: _Group, leaves: list) -> list:
    """Return the state of a group, and wait for it: the next one's is not to be beside it."""

    def made(*leaves: PyTree) -> list:
        state = _leaves(init(_only(tree, dict(zip(group.members, leaves, strict=True)))))
        return [_stored(a) if h else a for h, a in zip(group.host, state, strict=True)]

    def walked(leaf: PyTree) -> list:
        pieces = leaf.reshape(-1, group.rows, *leaf.shape[1:])
        state = lax.scan(lambda _, a: (None, made(a)), None, pieces)[1]
        rows = lambda h, a: a.reshape(1, -1, *a.shape[3:]) if h else a[0]
        return [rows(h, a) for h, a in zip(group.host, state, strict=True)]

    walks = group.rows and _may_walk(made, group, leaves, [True])
    return jax.block_until_ready(jax.jit(walked)(*leaves) if walks else made(*leaves))


def _step(call: Callable, tree: Any, group: _Group) -> Callable:
    """Return the update of a group as a function of lists: gradients, parameters and state."""

    def step(g: list, p: list, state: list) -> tuple[list, list]:
        g, p = (_only(tree, dict(zip(group.members, a, strict=True))) for a in (g, p))
        u, s = call(g, group.tree.unflatten(state), p)
        return _leaves(u), _leaves(s)

    return step


def _paged_step(step: Callable, group: _Group, g: list, p: list, state: list, last: list) -> tuple:
    """Fetch, update and return a group's state; also return what the next group has to wait for."""
    if not any(group.host):
        return *step(g, p, state), last
    # Without this XLA fetches all leaves first: nothing else orders them.
    state, _ = lax.optimization_barrier((state, last))
    flat = lambda g, p, *state: step([g], [p], list(state))
    if group.rows and _may_walk(flat, group, [*g, *p, *group.state], [True, True, *group.host]):
        u, state = _walk(step, group, g[0], p[0], state)
    else:
        parts = zip(group.host, state, group.state, strict=True)
        state = [_fetched(a, like.shape) if h else a for h, a, like in parts]
        u, state = step(g, p, state)
        state = [_stored(a) if h else a for h, a in zip(group.host, state, strict=True)]
    return u, state, [a for h, a in zip(group.host, state, strict=True) if h]


def _walk(step: Callable, group: _Group, g: Any, p: Any, state: list) -> tuple[list, list]:
    """Update a leaf piece by piece, in place: slices cross, and no second buffer is needed."""
    host = [a for h, a in zip(group.host, state, strict=True) if h]
    shapes = [a.shape for h, a in zip(group.host, group.state, strict=True) if h]
    turn = (lambda a: a.mT) if _turned(g.shape) else (lambda a: a)
    g, p = turn(g), turn(p)  # so that the loop has one order for all

    def piece(i: Any, g: Any, host: list) -> tuple[Any, list]:
        cut = lambda a: lax.dynamic_slice_in_dim(a, i * group.rows, group.rows)
        rows = lambda a: lax.dynamic_slice_in_dim(a, i * group.rows, group.rows, axis=1)
        parts = iter([_fetched(rows(a), s) for a, s in zip(host, shapes, strict=True)])
        part = [next(parts) if h else a for h, a in zip(group.host, state, strict=True)]
        (u,), s = step([turn(cut(g))], [turn(cut(p))], part)
        return turn(u), [_stored(a) for h, a in zip(group.host, s, strict=True) if h]

    dtype = jax.eval_shape(piece, 0, g, host)[0].dtype
    in_place = dtype == g.dtype  # the update of a piece then replaces its gradient

    def body(i: Any, carry: tuple[Any, list]) -> tuple[Any, list]:
        u, host = carry
        new, parts = piece(i, u if in_place else g, host)
        put = lambda a, b, axis: lax.dynamic_update_slice_in_dim(a, b, i * group.rows, axis)
        return put(u, new, 0), [put(a, b, 1) for a, b in zip(host, parts, strict=True)]

    start = g if in_place else jnp.zeros(g.shape, dtype)
    u, host = lax.fori_loop(0, g.shape[0] // group.rows, body, (start, host))
    found = iter(host)
    return [turn(u)], [next(found) if h else a for h, a in zip(group.host, state, strict=True)]


def _check_apart(call: Callable, plan: _Plan, *trees: PyTree) -> None:
    """Raise ValueError unless every group's results depend on that group's leaves alone."""
    leaf, place = [0] * len(_leaves(trees[0])), [0] * plan.places
    for bit, group in enumerate(plan.groups):
        for i in group.members:
            leaf[i] = 1 << bit
        for n, own in zip(group.places, group.own, strict=True):
            place[n] = 1 << bit if own else place[n]
    jaxpr = jax.make_jaxpr(call)(*jax.tree.map(abstract, trees)).jaxpr
    found = reached(jaxpr, [*leaf, *place, *leaf])
    wrong = [n for n, (a, b) in enumerate(zip(found, [*leaf, *place], strict=True)) if a & ~b]
    if wrong or draws(jaxpr):
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(trees[:2])]
        why = f"{paths[wrong[0]]} depends on other leaves" if wrong else "it draws random numbers"
        raise ValueError(
            f"paged needs an optimizer that treats every leaf on its own, but {why}; put what "
            "looks across leaves before it, as in optax.chain(optax.clip_by_global_norm(1.0), "
            "paged(optax.adamw(1e-4)))"
        )


def _only(tree: Any, leaves: dict[int, Any]) -> PyTree:
    """Return the tree with these leaves by number; the others are masked."""
    return tree.unflatten([leaves.get(i, optax.MaskedNode()) for i in range(tree.num_leaves)])


def _cut(a: Any, rows: int) -> jax.ShapeDtypeStruct:
    return abstract(a).update(shape=(rows, *a.shape[1:]))


def _stored(a: Any) -> Any:
    """Move an array to host memory, with one more axis, and turned if that saves a TPU a copy."""
    return jax.device_put((a.mT if _turned(a.shape) else a)[None], HOST)


def _fetched(a: Any, shape: Sequence[int]) -> Any:
    """Move an array from host memory, where it is stored as one of this shape, or rows of one."""
    a = jax.device_put(a, DEVICE)[0]
    return a.mT if _turned(shape) else a


def _shape_stored(shape: Sequence[int]) -> tuple[int, ...]:
    return (1, *shape[:-2], *(reversed(shape[-2:]) if _turned(shape) else shape[-2:]))


def _turned(shape: Sequence[int]) -> bool:
    """Whether the last two axes change places in host memory.

    A TPU keeps [8192, 64] in the order of [64, 8192], whose tiles need no padding, but loops do not
    know that: each would copy the whole array to its own order first, and back.
    """
    return len(shape) > 1 and shape[-1] % LANES != 0 and shape[-2] % LANES == 0


def _may_walk(f: Callable, group: _Group, whole: Sequence, cut: Sequence[bool]) -> bool:
    """Whether f can be computed piece by piece; `cut` says which arguments are in pieces."""
    whole = [abstract(a) for a in whole]
    pieces = [_cut(a, group.rows) if c else a for c, a in zip(cut, whole, strict=True)]
    return treats_rows_alone(f, whole, pieces)
