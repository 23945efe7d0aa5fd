"""Diagnosis and remedies for failures of quantization-aware training.

Codes may oscillate, scales drift, and outputs grow heavy tails. Diagnosis is pure: `codes_of` a
tree before and after a step tells which codes changed. There are three remedies: dampening pulls
weights to the middle of their bins, holding freezes codes that oscillate, and kurtosis
regularization (`estimators.kurtosis`) keeps outputs from growing outliers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.protocols import LevelFormat
from jaxquant.core.tensor import QTensor
from jaxquant.estimators.latent_format import Latent, batched
from jaxquant.estimators.weight_estimators import spread
from jaxquant.training.latent import is_latent, latent_format


def codes_of(params: PyTree) -> dict[str, Int[Array, "... k n"]]:
    """Return the code of every latent weight in an integer or table format, by path.

    The code of a table is the index of the level in ascending order. Float8 has too many levels and
    is left out.

    Args:
      params: tree with latent weights.
    Returns:
      The codes, int8 [*batch, k, n].

    >>> import jaxquant as jq
    >>> codes_of(jq.latent({"w": jnp.ones((64, 1))}, jq.lsq(4, init="range")))["w"][0, 0].item()
    7
    """
    return {path: _codes(w) for path, w in _latents(params).items()}


def _latents(params: PyTree) -> dict[str, QTensor]:
    """Return the latent weights whose codes are ordered levels, by path."""
    known = lambda format: isinstance(format, LevelFormat) and format.countable
    return {p: w for p, w in path_leaves(params) if is_latent(w) and known(w.format.format)}


def _grid(latent: Latent, data: dict[str, Array]) -> PyTree:
    packed = latent.packed(data)
    format = _levels(latent)
    return spread(format.stored_grid(packed), format, data["codes"].shape)


def _levels(latent: Latent) -> LevelFormat:
    if not isinstance(latent.format, LevelFormat):
        raise ValueError(
            f"expected a latent weight in a format with levels (a LevelFormat), got {latent.format}"
        )
    return latent.format


def _codes(w: QTensor) -> Array:
    format = _levels(latent_format(w))

    def one(data: dict[str, Array]) -> Array:
        return format.place(format.round(data["codes"], _grid(latent_format(w), data))[0])

    return batched(one, w.leading())(w.data)


def times_steps(updates: PyTree, params: PyTree) -> PyTree:
    """Multiply updates of latent weights by the mean quantization step of their matrix.

    This applies to integers and tables. The step of each weight's own group is not used: a group
    with an outlier has a step many times as large as others, and its weights, which matter no more,
    would move that much more.

    Args:
      updates: tree of updates, like `params`.
      params: tree with latent weights.
    Returns:
      The updates.

    >>> import jaxquant as jq
    >>> p = jq.latent({"w": jnp.eye(64)}, jq.lsq(4, init="range"))
    >>> round(float(times_steps(p, p)["w"].data["codes"][0, 0]), 3)  # one seventh
    0.143
    """
    latents, new = _latents(params), {}
    for path, of in path_leaves(updates):
        if path in latents and of.data.get("codes") is not None:
            w = latents[path]
            mean = lambda data, w=w: jnp.mean(w.format.step(data), keepdims=True)
            step = batched(mean, w.leading())(w.data)
            new[path] = dataclasses.replace(of, data={**of.data, "codes": of.data["codes"] * step})
    return replace_leaves(updates, new)


def flips(before: dict[str, Array], after: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """Return the share of codes that changed between two calls of `codes_of`, by path.

    Args:
      before, after: results of `codes_of`.
    Returns:
      The shares, by path.

    >>> flips({"w": jnp.array([0, 1])}, {"w": jnp.array([0, 2])})["w"].item()
    0.5
    """
    return {path: jnp.mean(codes != after[path]) for path, codes in before.items()}


def drift(before: PyTree, after: PyTree) -> dict[str, Float[Array, ""]]:
    """Return the mean of |log(scale after / scale before)| of learned scales, by path.

    Args:
      before, after: trees with latent weights.
    Returns:
      The means, by path.

    >>> import jaxquant as jq
    >>> p = jq.latent({"w": jnp.eye(64)}, jq.lsq(4))
    >>> drift(p, p)["w"].item()
    0.0
    """
    old, new = dict(path_leaves(before)), dict(path_leaves(after))
    learned = [p for p, w in old.items() if is_latent(w) and "scale" in w.data]
    size = lambda a, b: jnp.mean(jnp.abs(jnp.log(jnp.abs(b) / jnp.abs(a))))
    return {p: size(old[p].data["scale"], new[p].data["scale"]) for p in learned}


# --- oscillation ---------------------------------------------------------------------------------


def dampening(params: PyTree) -> Float[Array, ""]:
    """Return the mean squared rounding error of latent weights, clipped to their range.

    It is a term of the loss, to be multiplied by a factor; the paper's grows as a cosine from 0 to
    0.1 over the last three quarters of training. Its gradient reaches the weights only.

    Args:
      params: tree with latent weights.
    Returns:
      The mean.
    Source:
      Nagel et al. 2022, arXiv:2203.11086, equation 5; there it is a sum, in units of weights.

    >>> import jaxquant as jq
    >>> p = jq.latent({"w": jnp.eye(64)}, jq.lsq(4, init="range"))
    >>> jax.grad(dampening)(p)["w"].data["scale"].max().item()
    0.0
    """
    total, count = jnp.zeros(()), 0
    for w in _latents(params).values():
        one = lambda data, w=w: _distance(w.format, data)
        total += jnp.sum(batched(one, w.leading())(w.data))
        count += w.data["codes"].size
    return total / max(1, count)


def _distance(latent: Latent, data: dict[str, Array]) -> Float[Array, ""]:
    fixed = jax.lax.stop_gradient(data)
    grid, w, format = _grid(latent, fixed), data["codes"].astype(jnp.float32), _levels(latent)
    value = format.round(fixed["codes"], grid)[1]
    low, high = (grid.scale * (end - format.zero_of(grid)) for end in format.ends)
    return jnp.sum((jnp.clip(w, low, high) - value) ** 2)


MOMENTUM = 0.001  # weight of a new step in the running means of `hold`


class Oscillation(NamedTuple):
    """Oscillation state of the codes of one weight.

    Attributes:
      code: the current code.
      direction: sign of its last change; 0 if there was none yet.
      frequency: exponential mean over steps of whether a change reversed the one before.
      mean: exponential mean of the code.
      frozen: whether the code is frozen for good.
    """

    code: Int[Array, "... k n"]
    direction: Int[Array, "... k n"]
    frequency: Float[Array, "... k n"]
    mean: Float[Array, "... k n"]
    frozen: Array


def oscillations(params: PyTree) -> dict[str, Oscillation]:
    """Return the state of `hold` before training.

    Args:
      params: tree with latent weights.
    Returns:
      The state, by path.
    """

    def one(code: Array) -> Oscillation:
        zero = jnp.zeros(code.shape, jnp.int8)
        empty = jnp.zeros(code.shape, jnp.float32)
        return Oscillation(code, zero, empty, code.astype(jnp.float32), zero.astype(bool))

    return {path: one(code) for path, code in codes_of(params).items()}


def hold(
    state: dict[str, Oscillation],
    params: PyTree,
    threshold: float | Array,
    momentum: float = MOMENTUM,
) -> tuple[dict[str, Oscillation], PyTree]:
    """Update the oscillation state after a step, and freeze the codes that oscillate too often.

    A change of a code against the direction of its last change counts as an oscillation. Once the
    running mean of these passes the threshold, the code is frozen for good at its rounded mean: its
    latent weight is put in the middle of the bin after every step, whatever the optimizer does.

    Args:
      state: the state, from `oscillations` or the last call.
      params: tree with latent weights after the step.
      threshold: largest frequency of oscillation. The paper's falls as a cosine from 0.1 to 0.01.
        Choose it above 2 to 3 times the momentum.
      momentum: weight of a new step in the running means.
    Returns:
      The new state, and the tree with frozen codes restored.
    Raises:
      ValueError: a single change would pass the threshold.
    Source:
      Nagel et al. 2022, arXiv:2203.11086, algorithm 1.
    """
    if not isinstance(threshold, jax.core.Tracer) and threshold <= momentum:
        raise ValueError(
            f"threshold must be above the momentum, {momentum}, and should be more "
            "than twice that, or a single change of a code freezes it, got "
            f"{threshold}"
        )
    latents, new, states = _latents(params), {}, {}
    for path, before in state.items():
        w = latents[path]
        states[path] = _after(before, _codes(w), threshold, momentum)
        held = lambda data, kept, mean, w=w: _held(w.format, data, kept, mean)
        codes = batched(held, w.leading())(w.data, states[path].frozen, states[path].mean)
        new[path] = dataclasses.replace(w, data={**w.data, "codes": codes})
    return states, replace_leaves(params, new)


def _after(
    before: Oscillation, code: Array, threshold: float | Array, momentum: float
) -> Oscillation:
    code = jnp.where(before.frozen, before.code, code)
    change = jnp.sign(code.astype(jnp.int32) - before.code).astype(jnp.int8)
    undone = (change != 0) & (change == -before.direction)
    frequency = momentum * undone + (1 - momentum) * before.frequency
    mean = momentum * code + (1 - momentum) * before.mean
    mean = jnp.where(before.frozen, before.mean, mean)
    frozen = before.frozen | (frequency > threshold)
    direction = jnp.where(change == 0, before.direction, change)
    code = jnp.where(frozen, jnp.round(mean).astype(code.dtype), code)
    return Oscillation(code, direction, frequency, mean, frozen)


def _held(latent: Latent, data: dict[str, Array], frozen: Array, mean: Array) -> Array:
    """Return the weights, with frozen ones in the middle of their bins."""
    grid, w = _grid(latent, data), data["codes"]
    value = _levels(latent).value_at(jnp.round(mean), grid)
    return jnp.where(frozen, value.astype(w.dtype), w)


# --- gradients of scales -------------------------------------------------------------------------


class Disorder(NamedTuple):
    """State of the gradients of one weight's scales.

    Attributes:
      sign: signs of the last gradient.
      turns: running mean of whether the sign changed.
    """

    sign: Int[Array, "..."]
    turns: Float[Array, "..."]


def disorder(params: PyTree) -> dict[str, Disorder]:
    """Return the state of `turned` before training.

    Args:
      params: tree with latent weights.
    Returns:
      The state of weights with learned scales, by path.
    """
    learned = {p: w for p, w in _latents(params).items() if "scale" in w.data}
    zero = lambda a: Disorder(jnp.zeros(a.shape, jnp.int8), jnp.zeros(a.shape, jnp.float32))
    return {path: zero(w.data["scale"]) for path, w in learned.items()}


def turned(
    state: dict[str, Disorder], slope: PyTree, momentum: float = 0.05
) -> dict[str, Disorder]:
    """Update, after a gradient, the running share of steps in which each scale's gradient changed
    sign.

    The share is 0 if gradients agree from step to step and 1/2 for noise; it is larger if two terms
    of a loss pull a scale to and fro. Scales with a large share can be frozen for a while
    (`frozen_scales`), which steadies the weights.

    Args:
      state: the state, from `disorder` or the last call.
      slope: the gradient, a tree like the parameters.
      momentum: weight of a new step in the running mean.
    Returns:
      The new state.
    Source:
      The idea is that of GAQAT (Jiang et al. 2024, arXiv:2412.05551), there for the gradients of
      two losses. We could not read how it counts and unfreezes, so momentum and threshold are ours.
    """
    slopes = dict(path_leaves(slope))

    def one(before: Disorder, g: Array) -> Disorder:
        sign = jnp.sign(g).astype(jnp.int8)
        turn = (sign * before.sign) < 0
        return Disorder(sign, momentum * turn + (1 - momentum) * before.turns)

    return {path: one(before, slopes[path].data["scale"]) for path, before in state.items()}


def frozen_scales(state: dict[str, Disorder], slope: PyTree, threshold: float) -> PyTree:
    """Return the gradient with zeros for scales whose share of sign changes passes the threshold.

    Args:
      state: the state, from `turned`.
      slope: the gradient.
      threshold: largest share of sign changes.
    Returns:
      The gradient.
    """
    slopes, new = dict(path_leaves(slope)), {}
    for path, seen in state.items():
        w = slopes[path]
        kept = jnp.where(seen.turns > threshold, 0.0, w.data["scale"])
        new[path] = dataclasses.replace(w, data={**w.data, "scale": kept})
    return replace_leaves(slope, new)
