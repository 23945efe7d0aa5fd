"""Calibration: what every matmul's input was like, as cotangents of probes.

Second moments are x^T diag(a) x with a = 1, or a_t = |g_t|^2, the squared norm of the loss gradient
at output token t, or a_t = k / |x_t|^2; beside them stand the size of every channel, and if asked
for some of the rows.
One `jax.grad` collects every layer (`observe`), and batches are merged.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.calibration.observe import arrays_only, holders, planted, total, zeros
from jaxquant.calibration.statistics import Kept, Probe, Stats, Weighting
from jaxquant.core.arguments import check_arguments, described
from jaxquant.core.paths import matches
from jaxquant.core.sites import Site, sites
from jaxquant.core.standin import run
from jaxquant.durable.states import as_arrays, as_tree, mark
from jaxquant.durable.store import Finished


def calibrate(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    loss: Callable[[PyTree, PyTree], Array] | None = None,
    weighting: Weighting | None = None,
    gram: bool = True,
    output: Sequence[str] = (),
    sample: int = 0,
    progress: Callable[[int], None] | None = None,
    finished: Finished | None = None,
    save_every: int = 16,
    name: str = "calibration",
) -> Stats:
    """What the inputs of every weight that `fn` contracts are like: second moments, sizes, rows.

    Matrices that are looked up (experts, by the tokens that a router sent them) have statistics of
    their own tokens; slices of a weight (w[:, 128:]) add up to those of the whole. Of a weight that
    is multiplied over different axes, the first product says which input is meant.

    Memory beside `params`: twice what is kept (running sums and one batch's), 4 k^2 bytes per
    distinct input and layer for its second moment, plus one backward pass of `fn` (use
    `jax.checkpoint` inside `fn` to bound it). For bounded memory go block by block:
    `quantize_blocks`.

    Args:
      fn: fn(params, batch), or fn(params, *batch) where a batch is a tuple. Statistics come by
        the backward pass: what no gradient reaches (an argmax, a rounding after it) gives none.
      params: floating parameter tree.
      batches: inputs of fn, consumed once; each new shape compiles once.
      loss: loss(outputs, batch) -> scalar; required by weighting="gradient".
      weighting: "gradient" weights each token by the squared norm of the loss gradient at the
        matmul's output; "energy" by one over its mean square, so that a sink is one token of
        many; "uniform" does not. Of second moments and mean sizes: `low` and `high` are bounds.
        Default: "gradient" if a loss is given.
      gram: whether second moments are kept; methods that only scale or rotate need none.
      output: globs of paths ("layers/*kernel") for whose weights the second moments of the loss
        gradient at the output are collected too, 4 n^2 bytes more each (so not for a head over a
        vocabulary), for two-sided feedback; needs gradient weighting.
      sample: rows of every input to keep, those with the largest entries, and as many at random;
        for transforms that are searched for on activations (`Greedy`, a searched `Smooth`).
      progress: called with the number of batches done.
      finished: where the sums so far are kept, and gone on from: a mapping that lives on disk
        (`durable.store.Folder`) makes a long run resumable. Batches whose sums are kept are passed
        over. What is kept of other parameters, settings or another first batch is not taken; `fn`,
        `loss` and later batches are not looked at: with others, keep the sums as another `name`.
      save_every: batches between two copies to go on from, 1 or more; the last sums are kept too.
      name: what the sums are kept as.
    Returns:
      `Stats`.
    Raises:
      ValueError: no batches, or fewer than the kept sums are of; gradient weighting without a loss;
        a glob of `output` that matches nothing; a loss that is no scalar.
    Warns:
      naming the weights whose statistics are all zero, and of a stack (experts, say) the matrices
      whose are; the weights that are multiplied in two ways (w after w.T).
    Source:
      Frantar et al. 2022, arXiv:2210.17323 for H; the gradient weighting is the diagonal of the
      output-side factor of Kronecker curvature (Tseng et al. 2025, arXiv:2505.22988).

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> s = calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, [x])
    >>> bool(jnp.allclose(s.gram("w"), x.T @ x / 2))
    True
    """
    check_arguments(calibrate, locals())
    weighting = weighting or ("gradient" if loss is not None else "uniform")
    if weighting not in (known := get_args(Weighting)):
        raise ValueError(f"weighting must be one of {', '.join(known)}, got {weighting!r}")
    if weighting == "gradient" and loss is None:
        raise ValueError('weighting="gradient" needs loss=, a function (outputs, batch) -> scalar')
    if output and weighting != "gradient":
        raise ValueError('output= needs weighting="gradient", and a loss')
    if (sample := int(sample)) < 0:
        raise ValueError(f"sample is a number of rows, 0 or more, got {sample}")
    if save_every < 1:
        raise ValueError(f"save_every is a number of batches, 1 or more, got {save_every}")
    params, fn = arrays_only(params, fn)
    sums, plan, kept = None, None, _Kept(finished, name)
    for i, batch in enumerate(batches):
        if sums is None:
            found = sites(fn, params, *_args(batch))
            _check_globs(found, output)
            plan = _Plan.of(found, weighting, gram, tuple(output), sample)
            sums = kept.sums(plan, params, batch)
        if i >= kept.count:
            sums = jax.block_until_ready(_step(sums, params, batch, fn, loss, plan))
            if (i + 1) % save_every == 0:
                kept.keep(i + 1, sums)
        if progress is not None:
            progress(i + 1)
    if sums is None or plan is None:
        raise ValueError("calibration needs at least one batch, got none")
    kept.keep(i + 1, sums)
    if i + 1 < kept.count:
        raise ValueError(f"the sums kept as {name!r} are of {kept.count} batches, got {i + 1}")
    for text in _doubts(found, sums, plan.holder):
        warnings.warn(text, stacklevel=2)
    return Stats(found, sums, dict(plan.holder))


def _doubts(
    found: Mapping[str, Site], sums: Mapping[str, Probe], holder: Iterable[tuple[str, str]]
) -> Iterator[str]:
    """What feedback would not know of."""
    for path, site in found.items():
        if site.contracted and site.also:
            others = " and ".join(str(list(axes)) for axes in site.also)
            yield (
                f"{path} is multiplied in two ways: over its axes {list(site.contracted)} first, "
                f"over {others} elsewhere; its statistics are those of the first way only"
            )
    for path, probe in sums.items():
        unseen = np.asarray(jnp.sum(probe.magnitude, axis=-1) == 0)
        if not unseen.any():
            continue
        names = ", ".join(p for p, h in holder if h == path)
        if unseen.all() and np.all(probe.rows == 0):
            why = "no gradient reached the output of the matmul"
            yield f"the statistics of {names} are zero: {why}"
        elif unseen.all():
            yield f"the statistics of {names} are zero: the input was zero throughout"
        else:
            places = [str([*map(int, place)]) for place in np.argwhere(unseen)]
            some = ", ".join(places[:8]) + ", ..." * (len(places) > 8)
            yield (
                f"{names}: no input reached {len(places)} of {unseen.size} matrices, {some}; "
                f"feedback knows nothing of them"
            )


def _check_globs(found: Mapping[str, Site], globs: Sequence[str]) -> None:
    paths = [path for path, site in found.items() if site.contracted]
    for glob in globs:
        if not any(matches(path, glob) for path in paths):
            raise ValueError(
                f"output: {glob!r} matches no weight that the function multiplies by; these are "
                f"{', '.join(paths[:6]) or 'none'}{', ...' * (len(paths) > 6)}"
            )


def _args(batch: PyTree) -> tuple[PyTree, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which weights carry a probe. Hashed by value: equal plans share a compiled step."""

    held: tuple[tuple[str, Site], ...]
    holder: tuple[tuple[str, str], ...]
    weighting: Weighting
    gram: bool
    output: tuple[str, ...]  # globs of paths
    sample: int

    @staticmethod
    def of(
        found: dict[str, Site],
        weighting: Weighting,
        gram: bool,
        output: tuple[str, ...],
        sample: int,
    ) -> "_Plan":
        # Weighted by their own output gradients, grams of one input differ.
        holder = holders(found, shared=weighting != "gradient")
        held = tuple((p, found[p]) for p in dict.fromkeys(holder.values()))
        return _Plan(held, tuple(holder.items()), weighting, gram, output, sample)

    def kept(self, path: str) -> Kept:
        """What is kept at a weight."""
        output = any(matches(path, glob) for glob in self.output)
        alike = dict(self.held)[path].covered is not None
        return Kept(self.gram, output, self.weighting, self.sample, alike)

    def probes(self) -> dict[str, Probe]:
        """Zeros, by holder."""
        return {p: zeros(site, self.kept(p)) for p, site in self.held}

    def merged(self, a: dict[str, Probe], b: dict[str, Probe]) -> dict[str, Probe]:
        """Of two sets of batches."""
        return {p: self.kept(p).merged(a[p], b[p]) for p, _ in self.held}


class _Kept:
    """Sums as a store keeps them.

    Attributes:
      count: batches that the kept sums are of.
    """

    def __init__(self, finished: Finished | None, name: str) -> None:
        self.finished, self.name, self.count = finished, name, 0

    def sums(self, plan: _Plan, params: PyTree, batch: PyTree) -> dict[str, Probe]:
        """Those kept of this plan, these parameters and this first batch; or zeros."""
        if self.finished is None:
            return plan.probes()
        self.begun = mark(str(plan), (params, batch))
        kept = self.finished.get(self.name, {})
        if not kept or not np.array_equal(kept.get("begun", ()), self.begun):
            return plan.probes()
        self.count = int(kept["count"])
        return as_tree(kept, jax.eval_shape(plan.probes))

    def keep(self, count: int, sums: dict[str, Probe]) -> None:
        """The sums of so many batches, if that is more than is kept."""
        if self.finished is not None and count > self.count:
            beside = {"begun": self.begun, "count": np.int64(count)}
            self.finished[self.name] = as_arrays(sums) | beside
            self.count = count


@partial(jax.jit, static_argnames=("fn", "loss", "plan"), donate_argnames="sums")
def _step(
    sums: dict, params: PyTree, batch: PyTree, fn: Callable, loss: Callable | None, plan: _Plan
) -> dict:
    """The sums, this batch's merged into them."""

    def scalar(probes: dict) -> Array:
        out = run(fn, planted(params, plan.held, probes, plan.kept), *_args(batch))
        if loss is None:
            return total(out)
        value = jnp.asarray(loss(out, batch))
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"loss must return a floating scalar, got {described(value)}")
        return value

    # A probe's value is never read, so the running sums serve, and no zeros take memory.
    return plan.merged(sums, jax.grad(scalar)(sums))
