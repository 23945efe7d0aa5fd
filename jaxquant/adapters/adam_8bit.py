"""Adam whose moments are stored in 8 bits: codes of the dynamic map and a scale for every block."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree, UInt8

from jaxquant.core.arguments import check_arguments
from jaxquant.formats.normal_float import dynamic_map


class Moment(NamedTuple):
    """A moment of one parameter in 8 bits.

    Attributes:
      codes: of the parameter's shape; indices into a dynamic map.
      scale: the largest magnitude of every block.
    """

    codes: UInt8[Array, "..."]
    scale: Float[Array, "..."]


class Adam8bitState(NamedTuple):
    """State of `adam8bit`.

    Attributes:
      count: number of updates so far.
      m: moving averages of gradients, each a `Moment` or a float32 array.
      v: moving averages of their squares: float32 arrays, or `Moment`s, which hold the roots of
        these if `root` is True.
    """

    count: Array  # type: ignore[assignment]
    m: PyTree
    v: PyTree


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    block: int = 256,
    least: int = 4096,
    root: bool = True,
) -> optax.GradientTransformation:
    """Return AdamW with moments in 8 bits: 2.03 bytes of state for a parameter, instead of 8.

    Each step decodes the moments m and v, averages them in float32, updates by these unrounded
    values, and encodes them. Codes point into the dynamic map, signed for m and unsigned for v,
    times the largest magnitude of their block.

    Blocks are consecutive elements, counted along the last axis first. If that axis is not a
    multiple of `block`, they go on to other rows, but not along the first of three or more axes:
    layers that are stacked share none, and `paged` can walk over them. The first axis of two is
    kept apart only if the last is a multiple of `block`.

    The smallest value of the unsigned map other than 0 is 3.25e-7 times the largest, and v spans
    the square of the range of m. So with
    `root=False` the v of a parameter rounds to 0 where gradients are 2500 times smaller than the
    largest of the block, while its m does not: updates are then up to 1 / sqrt(1 - b2) times too
    large. With `root=True` the codes are of the root of v, which has the range of m.

    Args:
      learning_rate: a number, or an Optax schedule of the number of updates so far.
      b1: decay of the moving average of gradients, in [0, 1).
      b2: decay of that of their squares, in [0, 1).
      eps: added to the root of v; 0 or more.
      weight_decay: times the learning rate, the share of a parameter that each step takes away; as
        in `optax.adamw`. If it is not 0, updates need the parameters.
      block: number of elements that share a scale, at least 1; 2048 in the paper, 256 in its code.
      least: parameters with fewer elements keep float32 moments; with 0, all have 8-bit moments.
        The paper keeps 32-bit moments for embeddings: train those with `optax.adamw`, under another
        label of `jaxquant.training.optimizer`.
      root: whether the root of v is stored instead of v. bitsandbytes stores v.

    Returns:
      The optimizer. Its updates have the dtypes of the gradients.

    Raises:
      ValueError: an argument is out of its range, or parameters are missing.

    Source: Dettmers et al. 2022, arXiv:2110.02861; the maps as in its code. The root of v is not in
    it. Its code also keeps a negative m from becoming 0, which this does not.

    >>> params = {"w": jnp.ones((64, 64))}
    >>> optimizer = adam8bit(1e-3)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update(params, state)
    >>> float(updates["w"][0, 0]), state.m["w"].codes.dtype, state.m["w"].scale.shape
    (-0.00099999..., dtype('uint8'), (16,))
    """
    check_arguments(adam8bit, locals())
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps >= 0 and block >= 1 and least >= 0):
        raise ValueError(
            "b1 and b2 must be in [0, 1), eps and least 0 or more, block 1 or more; got "
            f"b1={b1}, b2={b2}, eps={eps}, least={least}, block={block}"
        )
    power = 2 if root else 1

    def init(params: PyTree) -> Adam8bitState:
        zero = lambda signed: jax.tree.map(lambda p: _zero(p, signed, block, least), params)
        return Adam8bitState(jnp.zeros([], jnp.int32), zero(True), zero(False))

    def update(updates: PyTree, state: Adam8bitState, params: PyTree = None) -> tuple:
        if params is None and weight_decay:
            raise ValueError("weight decay needs the parameters: update(updates, state, params)")
        count = optax.safe_increment(state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        unbias = lambda decay: 1 - jnp.float32(decay) ** count

        def one(g: Array, m: Any, v: Any, p: Array) -> tuple:
            f = g.astype(jnp.float32)
            new_m: Any = b1 * decoded(m, True, block) + (1 - b1) * f
            old_v = decoded(v, False, block)
            new_v: Any = b2 * (old_v**power if isinstance(v, Moment) else old_v) + (1 - b2) * f * f
            step = (new_m / unbias(b1)) / (jnp.sqrt(new_v / unbias(b2)) + eps)
            step = step + weight_decay * p.astype(jnp.float32) if weight_decay else step
            if isinstance(m, Moment):
                new_m = encoded(new_m, True, block)
                new_v = encoded(jnp.sqrt(new_v) if root else new_v, False, block)
            return (-rate * step).astype(g.dtype), new_m, new_v

        tree: Any = jax.tree.structure(updates)
        leaves = tree.flatten_up_to(updates)
        of = lambda a: leaves if a is None else tree.flatten_up_to(a)
        found = [one(*a) for a in zip(leaves, of(state.m), of(state.v), of(params), strict=True)]
        new, m, v = (tree.unflatten([a[n] for a in found]) for n in range(3))
        return new, Adam8bitState(count, m, v)

    return optax.GradientTransformation(init, update)


def encoded(a: Float[Array, "..."], signed: bool, block: int) -> Moment:
    """Encode an array by the nearest values of the dynamic map, times the scale of each block.

    Args:
      a: the array; float32, of 0 or more if it is not signed.
      signed: whether to use the signed map.
      block: number of consecutive elements that share a scale, at least 1.
    Returns:
      Codes and scales. Those of a block of zeros decode to zeros.

    >>> encoded(jnp.array([0.0, 0.5, 2.0, -2.0]), True, block=4)
    Moment(codes=Array([127, 201, 255,   0], dtype=uint8), scale=Array([2.], dtype=float32))
    """
    parts = _blocks(a, block)
    scale = jnp.max(jnp.abs(parts), axis=-1, keepdims=True)
    parts = parts / jnp.where(scale > 0, scale, 1)
    between = jnp.asarray(_tables(signed)[1])
    codes = jnp.zeros(parts.shape, jnp.int32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):  # bisection: five times as fast as searchsorted
        codes = jnp.where(parts > between[codes + step - 1], codes + step, codes)
    return Moment(_whole(codes.astype(jnp.uint8), a.shape), scale[..., 0])


def decoded(moment: PyTree, signed: bool, block: int) -> Float[Array, "..."]:
    """Decode what `encoded` returns; return arrays as they are.

    Args:
      moment: a `Moment`, or a float32 array.
      signed: whether its codes are of the signed map.
      block: number of consecutive elements that share a scale.
    Returns:
      The values in float32.

    >>> moment = encoded(jnp.array([0.0, 0.5, 2.0, -2.0]), True, block=4)
    >>> decoded(moment, True, block=4).round(3).tolist()
    [0.0, 0.495..., 2.0, -1.98...]
    """
    if not isinstance(moment, Moment):
        return moment
    values = jnp.asarray(_tables(signed)[0])[_blocks(moment.codes, block).astype(jnp.int32)]
    return _whole(values * moment.scale[..., None], moment.codes.shape)


@lru_cache
def unsigned_map() -> tuple[float, ...]:
    """Return the 256 values of the unsigned 8-bit dynamic map, ascending.

    For i = 0 ... 6, the map holds the midpoints of 2^(i + 1) equal parts of [0.1, 1], times
    10^(i - 6); and 0 and 1. The signed one is `normal_float.dynamic_map`.

    Returns:
      The values.

    Source: Dettmers et al. 2022, arXiv:2110.02861, as in its code.

    >>> m = unsigned_map()
    >>> len(m), m[0], round(m[1] * 1e7, 2), m[-1]
    (256, 0.0, 3.25, 1.0)
    """
    edges = [np.linspace(0.1, 1.0, (2 << i) + 1) for i in range(7)]
    values = [(e[:-1] + e[1:]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)]
    return tuple(sorted([0.0, *np.concatenate(values).tolist(), 1.0]))


@lru_cache
def _tables(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a map, and what lies halfway between neighbours."""
    values = np.array(dynamic_map() if signed else unsigned_map())
    return values.astype(np.float32), ((values[1:] + values[:-1]) / 2).astype(np.float32)


def _zero(p: Array, signed: bool, block: int, least: int) -> PyTree:
    if p.size < max(least, 1):
        return jnp.zeros_like(p, jnp.float32)
    blocks = jax.eval_shape(lambda: _blocks(jnp.zeros(p.shape), block)).shape[:-1]
    code = np.searchsorted(_tables(signed)[0], 0)
    return Moment(jnp.full_like(p, code, jnp.uint8), jnp.zeros(blocks, jnp.float32))


def _lead(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Return the axes that blocks do not cross."""
    if shape and shape[-1] % block == 0:
        return shape[:-1]
    return shape[:1] if len(shape) > 2 else ()


def _blocks(a: Array, block: int) -> Array:
    """Return blocks of consecutive elements; the last of each row is filled up with zeros."""
    rows = a.reshape(*_lead(a.shape, block), -1)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % block)]
    return jnp.pad(rows, padding).reshape(*rows.shape[:-1], -1, block)


def _whole(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Return an array of a shape from its blocks: the inverse of `_blocks`."""
    lead = blocks.shape[:-2]
    each = math.prod(shape) // max(1, math.prod(lead))
    return blocks.reshape(*lead, -1)[..., :each].reshape(shape)
