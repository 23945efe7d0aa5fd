"""Attention over a packed key-value cache that decodes only the visible tokens."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import checks, dispatch
from pallas_kernels.codecs.kv_layout import Past, decode_keys, decode_values, retired, turned

RUN = 256  # number of tokens that the reference decodes at a time


def kv_attention(
    q: Float[Array, "b t heads hd"],
    k: Float[Array, "b kv t hd"],
    v: Float[Array, "b kv t hd"],
    past: Past,
    layer: Int32[Array, ""] | int,
    start: Int32[Array, ""],
    frequencies: Float[Array, " half"] | None,
) -> Float[Array, "b t heads hd"]:
    """Return the causal attention of new tokens to a packed cache and to each other.

    The softmax is in float32. A kernel runs where a platform has one for this few queries;
    otherwise `reference` runs, which decodes `RUN` tokens at a time. Reverse-mode differentiation
    is not supported.

    Args:
      q: [b, t, heads, hd], queries at positions start ... start + t - 1, with RoPE applied.
      k, v: [b, kv, t, hd], the new tokens' own keys (with RoPE applied) and values, unquantized.
      past: the cache of all layers, holding the tokens before `start`.
      layer: index of the layer, int32 scalar.
      start: position of the first query, int32 scalar.
      frequencies: [hd / 2], RoPE frequencies in radians per position of each pair of channels, if
        cached keys were quantized before RoPE; None if they were quantized after it.
    Returns:
      [b, t, heads, hd] in the dtype of q.
    Raises:
      ValueError: shapes or dtypes do not match each other.
    """
    _check(q, k, v, past)
    if frequencies is None:
        frequencies = jnp.zeros((0,), jnp.float32)
    scalars = [jnp.asarray(n, jnp.int32) for n in (layer, start)]
    arrays = (q, k, v, *scalars, frequencies, *past)
    return dispatch.function("kv_attention", reference, *arrays).astype(q.dtype)


def reference(
    q: Array,
    k: Array,
    v: Array,
    layer: Array,
    start: Array,
    frequencies: Array,
    *arrays: Array,
) -> Float[Array, "b t heads hd"]:
    """Return the attention in jnp, the definition of the op.

    An online softmax runs over the new tokens, then the unquantized part of the cache, then the
    codes.

    Args:
      q, k, v, layer, start: as in `kv_attention`.
      frequencies: as in `kv_attention`, but of length 0 instead of None.
      *arrays: the fields of `Past`.
    Returns:
      float32 [b, t, heads, hd].
    """
    past = Past(*arrays)
    b, t, heads, hd = q.shape
    kv = k.shape[1]
    rows = q.astype(jnp.float32).reshape(b, t, kv, heads // kv, hd)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, hd) * hd**-0.5
    causal = jnp.tril(jnp.ones((t, t), bool))
    sums = _Sums.nothing(rows)
    sums = sums.add(_scores(rows, k), v, jnp.tile(causal, (heads // kv, 1)))
    sink, ring = _exact(past, start)
    at = lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)
    if past.sinks:
        sums = sums.add(_scores(rows, at(past.sink_k)), at(past.sink_v), sink)
    sums = sums.add(_scores(rows, at(past.ring_k)), at(past.ring_v), ring)
    sums = _coded(past, layer, retired(start, past.window, past.group), frequencies, rows, sums)
    mixed = (sums.mixed / sums.total).reshape(b, kv, heads // kv, t, hd)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, heads, hd)


class _Sums(NamedTuple):
    """State of an online softmax: each row's largest score, and the sums relative to it."""

    most: Float[Array, "b kv r 1"]
    total: Float[Array, "b kv r 1"]
    mixed: Float[Array, "b kv r hd"]

    @classmethod
    def nothing(cls, rows: Array) -> "_Sums":
        none = jnp.zeros((*rows.shape[:3], 1), jnp.float32)
        return cls(none - jnp.inf, none, jnp.zeros_like(rows))

    def add(self, scores: Array, values: Array, visible: Array) -> "_Sums":
        scores = jnp.where(visible, scores, -jnp.inf)
        # Unused slots may hold NaN, which a weight of zero would not remove.
        used = jnp.any(jnp.atleast_2d(visible), axis=0)[:, None]
        values = jnp.where(used, values.astype(jnp.float32), 0.0)
        most = jnp.maximum(self.most, jnp.max(scores, axis=-1, keepdims=True))
        weights, before = jnp.exp(scores - most), jnp.exp(self.most - most)
        total = self.total * before + jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bkrs,bksd->bkrd", weights, values)
        return _Sums(most, total, self.mixed * before + mixed)


def _scores(rows: Array, keys: Array) -> Array:
    return jnp.einsum("bkrd,bksd->bkrs", rows, keys.astype(jnp.float32))


def _exact(past: Past, start: Array) -> tuple[Array, Array]:
    """Return masks of the sink and ring slots that hold a visible token."""
    size = past.ring_k.shape[3]
    position = start - 1 - (start - 1 - jnp.arange(size)) % size
    first = jnp.maximum(retired(start, past.window, past.group), past.sinks)
    return jnp.arange(past.sinks) < start, first <= position


def _coded(
    past: Past, layer: Array, count: Array, frequencies: Array, rows: Array, sums: _Sums
) -> _Sums:
    """Return `sums` extended by the first `count` tokens except sinks, decoded run by run."""
    run = min(max(RUN // past.group, 1) * past.group, past.slots)

    def one(i: Array, sums: _Sums) -> _Sums:
        first = jnp.minimum(i * run, past.slots - run)  # the last run may overlap the previous one
        cut = functools.partial(_cut, past, layer, first, run)
        keys = decode_keys(*map(cut, past[4:7], (3, 3, 3)), past.key_bits)
        values = decode_values(*map(cut, past[7:], (3, 4, 4)), past.value_bits)
        tokens = first + jnp.arange(run)
        visible = (tokens >= jnp.maximum(i * run, past.sinks)) & (tokens < count)
        scores = _turned_scores(rows, keys, first, past.group, frequencies)
        return sums.add(scores, values, visible)

    return jax.lax.fori_loop(0, (count + run - 1) // run, one, sums)


def _cut(past: Past, layer: Array, first: Array, run: int, a: Array, axis: int) -> Array:
    """Return the entries of the `run` tokens from `first` on; `axis` holds the S tokens.

    Runs consist of whole groups.
    """
    per = a.shape[axis] * past.group // past.slots  # entries per group
    starts, sizes = [layer, *[jnp.int32(0)] * 4], [1, *a.shape[1:]]
    starts[axis], sizes[axis] = first // past.group * per, run // past.group * per
    return jax.lax.dynamic_slice(a, starts, sizes)[0]


def _turned_scores(
    rows: Array, keys: Array, first: Array, group: int, frequencies: Array
) -> Float[Array, "b kv r s"]:
    """Return the scores of keys at positions first, first + 1, ..., with RoPE applied if required.

    Each query is rotated back by the first position of a group, and keys by their offsets within
    the group, so that the same few angles serve all groups.
    """
    if frequencies.size == 0:
        return _scores(rows, keys)
    *batch, run, hd = keys.shape
    begin = first + jnp.arange(0, run, group)
    back = turned(rows[:, :, :, None], -begin[:, None] * frequencies)
    keys = turned(keys.reshape(*batch, -1, group, hd), jnp.arange(group)[:, None] * frequencies)
    scores = jnp.einsum("bkrgd,bkgsd->bkrgs", back, keys)
    return scores.reshape(*scores.shape[:3], run)


def _check(q: Array, k: Array, v: Array, past: Past) -> None:
    for name, a, axes in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("past.ring_k", past.ring_k, 5)):
        if a.ndim != axes or a.dtype.name not in checks.FLOATS:
            raise ValueError(
                f"{name} must have {axes} axes, of {', '.join(checks.FLOATS)}, got {a.dtype} "
                f"{list(a.shape)}"
            )
    b, t, heads, hd = q.shape
    _, held, kv, _, width = past.ring_k.shape
    if (held, width) != (b, hd) or heads % kv:
        raise ValueError(
            f"the cache holds {held} sequences and {kv} heads of {width} channels, "
            f"but q is {list(q.shape)}: make the cache with init_cache for this "
            "config and batch"
        )
    if k.shape != (b, kv, t, hd) or v.shape != k.shape:
        raise ValueError(
            f"k and v must both be [{b}, {kv}, {t}, {hd}], got {list(k.shape)} and {list(v.shape)}"
        )
