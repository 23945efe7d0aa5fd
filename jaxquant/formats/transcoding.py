"""Transcoding of entropy-coded weights for inference: each stream is decoded once to words."""

import dataclasses
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.tensor import QTensor
from jaxquant.formats import DualScale, EntropyCoded
from pallas_kernels import dual_scale, streams
from pallas_kernels.codecs import entropy_stream
from pallas_kernels.streams import Stream

FORMATS = tuple(DualScale(bits) for bits in (4, 8))


def transcoded(params: PyTree, *, threads: int | None = None) -> PyTree:
    """Return a tree with its entropy-coded weights as words of 4 or 8 bits, for fast products.

    The values do not change. Each weight becomes integers of a few bits, a step for each input
    channel and a width for each output channel (`DualScale`). Integers that do not fit are stored
    separately, and the word size that takes fewer bytes is chosen. An entropy-coded weight is
    decoded anew in every matmul, whereas a transcoded one is multiplied like other packed weights.
    Everything else in the tree, such as transforms and activation formats, stays as it is, and so
    do weights with more than 65,536 input channels.

    Args:
      params: tree of concrete arrays and `QTensor` leaves, from `quantize` or from a checkpoint.
      threads: number of matrices to decode at a time; None for the number of processors.
    Returns:
      A tree of the same structure above its leaves.
    Raises:
      ValueError: a stream is damaged (the message names the weight), or arrays are traced by `jit`.

    >>> import jaxquant as jq
    >>> method = jq.Method("coded", jq.rtn().rounder, jq.formats.EntropyCoded(2, states=1, lanes=4))
    >>> q = {"w": jq.quantize_array(jax.random.normal(jax.random.key(0), (64, 32)), method)}
    >>> t = transcoded(q)
    >>> t["w"].format, bool((t["w"].dequantize() == q["w"].dequantize()).all())
    (DualScale(bits=4), True)
    """
    threads = threads or os.cpu_count() or 1
    new: dict[str, QTensor] = {}
    for batch in _batches(params, threads):
        found = streams.read([s for _, w in batch for s in _streams(w)], threads)
        for path, w in batch:
            count = len(_streams(w))
            mine, found = found[:count], found[count:]
            _check(path, w, mine)
            new[path] = _transcoded(w, [one for one, _ in mine])
    return replace_leaves(params, new)


def _batches(params: PyTree, threads: int) -> Iterator[list[tuple[str, QTensor]]]:
    """Yield the entropy-coded weights in order, in batches of about `threads` matrices."""
    batch: list[tuple[str, QTensor]] = []
    for path, w in path_leaves(params):
        if not isinstance(w, QTensor) or not isinstance(w.format, EntropyCoded):
            continue
        if w.stored_rows > dual_scale.MOST_ROWS:
            continue
        words = w.data["codes"]
        if isinstance(words, jax.core.Tracer) or not isinstance(words, jax.Array | np.ndarray):
            raise ValueError(
                f"{path}: expected concrete arrays, got {type(words).__name__}; transcoding reads "
                f"values, so call it outside of jit, on a tree from quantize or a checkpoint"
            )
        batch.append((path, w))
        if sum(len(_streams(w)) for _, w in batch) >= threads:
            yield batch
            batch = []
    if batch:
        yield batch


def _streams(w: QTensor) -> list[Stream]:
    """Return the stream of each matrix of a stack."""
    words, f = w.data["codes"], w.format
    if not isinstance(f, EntropyCoded):
        raise ValueError(f"expected an entropy-coded weight, got one in {f}")
    stack = np.asarray(words).reshape(-1, *words.shape[-2:])
    size = w.stored_rows, words.shape[-1]
    return [Stream(one.reshape(-1), *size, f.lanes, f.states, f.chain) for one in stack]


def _check(path: str, w: QTensor, found: list[tuple[entropy_stream.Coded, bool]]) -> None:
    batch = w.data["codes"].shape[: w.leading()]
    for index, (_, whole) in zip(np.ndindex(*batch), found, strict=True):
        if not whole:
            name = f"{path}[{', '.join(map(str, index))}]" if index else path
            raise ValueError(
                f"{name}: the entropy-coded stream is damaged; quantize again, or copy the "
                f"checkpoint anew"
            )


def _transcoded(w: QTensor, matrices: list[entropy_stream.Coded]) -> QTensor:
    values = np.stack([one.values for one in matrices])
    format = min(FORMATS, key=lambda f: f.bytes_of(values))
    parts = []
    for one in matrices:
        step, width = map(np.asarray, _scales(one.base, one.steps, one.widths))
        parts.append(format.pack(np.asarray(one.values), step, width))
    longest = max(len(part["escapes"]) for part in parts)
    for part in parts:
        part["escapes"] = np.pad(part["escapes"], (0, longest - len(part["escapes"])))
    batch = w.data["codes"].shape[: w.leading()]

    def stacked(*arrays: PyTree) -> Array:
        return jnp.asarray(np.stack(arrays).reshape(*batch, *arrays[0].shape))

    data = jax.tree.map(stacked, *parts)
    return dataclasses.replace(w, format=format, data=data)


_scales = jax.jit(entropy_stream.scales)
