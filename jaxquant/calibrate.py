"""Calibration: second moments of every matmul's input, as cotangents of probes.

`dot(x, w, probe)` has a backward rule whose cotangent for the probe is x^T diag(a) x, with
a = 1, or a_t = |g_t|^2, the squared norm of the loss gradient at output token t. So one
`jax.grad` collects every layer, those inside `lax.scan` included; batches add up.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float

from jaxquant.contraction import Contraction
from jaxquant.paths import matches, path_leaves, replace_leaves
from jaxquant.sites import Site, sites
from jaxquant.standin import StandIn, is_standin, run

Weighting = Literal["uniform", "gradient"]


class Probe(NamedTuple):
    """What a matmul's backward rule hands back: sum of a x x^T, how many rows x had, and, where
    it is asked for, the sum of g g^T."""

    gram: Float[Array, "*batch k k"]
    rows: Float[Array, "*batch"]
    output: Float[Array, "*batch n n"] | None


@dataclasses.dataclass(frozen=True)
class Stats:
    """What calibration saw.

    Attributes:
      sites: how each weight is used, by path.
      sums: sums of a x x^T, float32 [*batch, k, k], and of rows, by the path that holds them.
      holder: path of a weight -> path that holds its gram (weights that share an input and a
        weighting share one).
    """

    sites: dict[str, Site]
    sums: dict[str, Probe]
    holder: dict[str, str]

    def gram(self, path: str) -> Float[Array, "... k k"]:
        """Mean of a x x^T at this weight.

        Raises:
          ValueError: the weight is in no matmul that calibration saw.
        """
        self.check(path)
        probe = self.sums[self.holder[path]]
        return probe.gram / jnp.maximum(probe.rows, 1)[..., None, None]

    def output_gram(self, path: str) -> Float[Array, "... n n"]:
        """Mean of g g^T, g the gradient at this weight's output.

        Raises:
          ValueError: calibration was not asked for it.
        """
        self.check(path, output=True)
        probe = self.sums[self.holder[path]]
        return jnp.asarray(probe.output) / jnp.maximum(probe.rows, 1)[..., None, None]

    def check(self, path: str, output: bool = False) -> None:
        """Raise ValueError unless there is a gram (and an output-side one) for this weight."""
        if path not in self.holder:
            raise ValueError(f"no statistics for {path!r}: calibration saw it in no matmul")
        if output and self.sums[self.holder[path]].output is None:
            raise ValueError(
                f"no output-side statistics for {path!r}: pass output=[{path!r}] to calibrate"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all grams."""
        return sum(a.nbytes for a in jax.tree.leaves(self.sums))


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Array] | None = None,
    weighting: Weighting | None = None,
    output: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
    save: Callable[[int, dict[str, Probe]], None] | None = None,
    resume: tuple[int, dict[str, Probe]] | None = None,
) -> Stats:
    """Second moments of the inputs of every weight that `fn` contracts.

    Memory beside `params`: twice the grams (a running sum and one batch's), 4 k^2 bytes per
    distinct input and layer, plus one backward pass of `fn` (use `jax.checkpoint` inside `fn`
    to bound it). For bounded memory go block by block: `quantize_blocks`.

    Args:
      fn: fn(params, batch), or fn(params, *batch) where a batch is a tuple. Statistics come by
        the backward pass: what no gradient reaches (an argmax, a rounding after it) gives none.
      params: floating parameter tree.
      batches: inputs of fn, consumed once; each new shape compiles once.
      loss: loss(outputs, batch) -> scalar; required by weighting="gradient".
      weighting: "gradient" weights each token by the squared norm of the loss gradient at the
        matmul's output; "uniform" does not. Default: "gradient" if a loss is given.
      output: globs of paths ("layers/*kernel") for whose weights the second moments of the loss
        gradient at the output are collected too, 4 n^2 bytes more each (so not for a head over a
        vocabulary), for two-sided feedback; needs gradient weighting.
      progress: called with the number of batches done.
      save: called with the number of batches done and the sums so far, which it must copy.
      resume: what `save` was given; these batches are passed over, and the sums go on from there.
    Returns:
      `Stats`.
    Raises:
      ValueError: no batches, or gradient weighting without a loss.
    Warns:
      naming the weights whose statistics are all zero.
    Source:
      Frantar et al. 2022, arXiv:2210.17323 for H; the gradient weighting is the diagonal of the
      output-side factor of Kronecker curvature (Tseng et al. 2025, arXiv:2505.22988).

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> s = calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, [x])
    >>> bool(jnp.allclose(s.gram("w"), x.T @ x / 2))
    True
    """
    weighting = weighting or ("gradient" if loss is not None else "uniform")
    if weighting not in ("gradient", "uniform"):
        raise ValueError(f'weighting must be "gradient" or "uniform", got {weighting!r}')
    if weighting == "gradient" and loss is None:
        raise ValueError('weighting="gradient" needs loss=, a function (outputs, batch) -> scalar')
    if output and weighting != "gradient":
        raise ValueError('output= needs weighting="gradient", and a loss')
    params, fn = _arrays_only(params, fn)
    sums, plan = None, None
    for i, batch in enumerate(batches):
        if sums is None:
            found = sites(fn, params, *_args(batch))
            plan = _Plan.of(found, weighting, tuple(output))
            sums = plan.probes() if resume is None else jax.tree.map(jnp.asarray, resume[1])
        if resume is None or i >= resume[0]:
            sums = jax.block_until_ready(_step(sums, params, batch, fn, loss, plan))
            if save is not None:
                save(i + 1, sums)
        if progress is not None:
            progress(i + 1)
    if sums is None or plan is None:
        raise ValueError("calibration needs at least one batch, got none")
    empty = [p for p, probe in sums.items() if not bool(jnp.any(probe.gram))]
    if empty:
        warnings.warn(
            f"the statistics of {', '.join(empty)} are zero: no gradient reached the output of "
            f"the matmul, or its input was zero throughout",
            stacklevel=2,
        )
    return Stats(found, sums, dict(plan.holder))


def _arrays_only(params: Any, fn: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """The arrays of a tree that holds other things too (an Equinox module), and fn of them."""
    arrays, rest = eqx.partition(params, lambda leaf: hasattr(leaf, "dtype"))
    if not jax.tree.leaves(rest):
        return params, fn  # the very function, so that a step compiled for it serves again
    return arrays, lambda p, *args: fn(eqx.combine(p, rest), *args)


def _args(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which weights carry a probe. Hashed by value: equal plans share a compiled step."""

    holders: tuple[tuple[str, Site], ...]
    holder: tuple[tuple[str, str], ...]
    weighted: bool
    output: tuple[str, ...]  # globs of paths

    @staticmethod
    def of(found: dict[str, Site], weighting: Weighting, output: tuple[str, ...]) -> "_Plan":
        holder: dict[str, str] = {}
        first: dict[Any, str] = {}
        for path, site in found.items():
            if site.contracted:
                # Weighted by their own output gradients, grams of one input differ.
                key = (site.input, len(site.batch)) if weighting == "uniform" else path
                holder[path] = first.setdefault(key, path)
        holders = tuple((p, found[p]) for p in dict.fromkeys(holder.values()))
        return _Plan(holders, tuple(holder.items()), weighting == "gradient", output)

    def probes(self) -> dict[str, Probe]:
        """Zeros, by holder."""
        wanted = lambda path: any(matches(path, glob) for glob in self.output)
        return {p: _zero_probe(site, wanted(p)) for p, site in self.holders}

    def observe(self, params: Any, probes: dict[str, Probe]) -> Any:
        """params with `Observed` stand-ins at the weights that hold a gram."""
        leaves = dict(path_leaves(params))
        new = {}
        for path, site in self.holders:
            keep = [a for a in range(len(site.shape)) if a not in site.batch]
            order = (*site.batch, *keep)
            array = jnp.transpose(leaves[path], order)
            inverse = tuple(order.index(a) - len(order) for a in range(len(order)))
            new[path] = Observed(
                array=array,
                probe=probes[path],
                order=inverse,
                core=len(keep),
                contracted=tuple(order.index(a) - len(order) for a in site.contracted),
                weighted=self.weighted,
            )
        return replace_leaves(params, new)


def _zero_probe(site: Site, output: bool) -> Probe:
    size = lambda axes: math.prod(site.shape[a] for a in axes)
    k, n = size(site.contracted), size(site.output)
    batch = tuple(site.shape[a] for a in site.batch)
    zeros = lambda *shape: jnp.zeros((*batch, *shape))
    return Probe(zeros(k, k), zeros(), zeros(n, n) if output else None)


@partial(jax.jit, static_argnames=("fn", "loss", "plan"), donate_argnames="sums")
def _step(
    sums: dict, params: Any, batch: Any, fn: Callable, loss: Callable | None, plan: _Plan
) -> dict:
    """sums plus this batch's grams."""

    def scalar(probes: dict) -> Array:
        out = run(fn, plan.observe(params, probes), *_args(batch))
        if loss is not None:
            return loss(out, batch)
        floating = [y for y in jax.tree.leaves(out) if jnp.issubdtype(y.dtype, jnp.inexact)]
        return sum((jnp.sum(y, dtype=jnp.float32) for y in floating), jnp.float32(0))

    # A probe's value is never read, so the running sums serve, and no zeros take memory.
    return jax.tree.map(jnp.add, sums, jax.grad(scalar)(sums))


class Observed(StandIn):
    """A dense weight with a probe, stored [*batch, ...]; its matmul fills the probe."""

    array: Array
    probe: Probe
    order: tuple[int, ...] = eqx.field(static=True)
    core: int = eqx.field(static=True)  # axes that are not batch axes
    # Stored axes, from the end, that the gram is over.
    contracted: tuple[int, ...] = eqx.field(static=True)
    weighted: bool = eqx.field(static=True)

    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def aval(self) -> Any:
        return jax.core.ShapedArray(self.view_shape(), self.array.dtype)

    def materialise(self) -> Array:
        return jnp.transpose(self.array, self.axes())

    def reordered(self, order: tuple[int, ...]) -> "Observed":
        return dataclasses.replace(self, order=order)

    def cast(self, dtype: Any) -> "Observed":
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def at_leading(self, fn: Any) -> "Observed":
        array, probe = jax.tree.map(fn, (self.array, self.probe))
        return dataclasses.replace(self, array=array, probe=probe)

    def leading(self) -> int:
        return self.array.ndim - self.core


@quax.register(jax.lax.dot_general_p)
def _(x: Any, w: Observed, **params: Any) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=False)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: Observed, x: Any, **params: Any) -> Array:
    x = x.materialise() if is_standin(x) else x
    return _observe(x, w, params, weight_left=True)


def _observe(x: Array, w: Observed, params: dict[str, Any], *, weight_left: bool) -> Array:
    """The plain dot, with the rule that fills the probe in the backward pass."""
    axes, leading = w.axes(), w.leading()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=weight_left)
    inner = {a for a in c.contracted(axes) if a >= leading}

    def dot(x: Array, dense: Array) -> Array:
        operands = (dense, x) if weight_left else (x, dense)
        return jax.lax.dot_general_p.bind(*operands, **params)

    def gram(x: Array, g: Array) -> Probe:
        rows, paired = c.rows(x, axes, leading, inner)
        missing = [i for i, has in enumerate(paired) if not has]
        rows = jnp.expand_dims(rows, missing).astype(jnp.float32)
        left = rows * c.energy(g, axes, leading)[..., None] if w.weighted else rows
        # Exact: a GPU's default would round the rows to ten bits, and H would be no moment.
        second = partial(jnp.einsum, "...tk,...tl->...kl", precision="highest")
        product = second(left, rows)
        count = jnp.full(w.probe.rows.shape, rows.shape[-2], jnp.float32)
        whole = lambda a, like: jnp.broadcast_to(a, like.shape)
        output = None
        if w.probe.output is not None:
            y = c.output_rows(g, axes, leading)
            output = whole(second(y, y), w.probe.output)
        return Probe(whole(product, w.probe.gram), count, output)

    ndim = len(w.stored_shape())
    if {a - ndim for a in inner} != set(w.contracted):  # the other way round: not this gram's
        return dot(x, w.materialise())
    return _observed_dot(dot, gram, x, w.materialise(), w.probe)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed_dot(dot: Callable, gram: Callable, x: Array, w: Array, probe: Probe) -> Array:
    return dot(x, w)


def _forward(dot: Callable, gram: Callable, x: Array, w: Array, probe: Probe) -> Any:
    return dot(x, w), (x, w)


def _backward(dot: Callable, gram: Callable, residuals: Any, g: Array) -> Any:
    x, w = residuals
    _, pull = jax.vjp(dot, x, w)
    return *pull(g), gram(x, g)


_observed_dot.defvjp(_forward, _backward)
