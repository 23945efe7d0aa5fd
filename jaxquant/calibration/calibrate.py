"""Calibration: statistics of the inputs of every matmul, collected in backward passes.

The second moments are x^T diag(a) x with token weights a_t = 1, a_t = |g_t|^2 (the squared norm of
the loss gradient at output token t) or a_t = k / |x_t|^2. The mean magnitude and the bounds of
every channel are kept too, and on request some of the rows.

Probes attached to the weights receive the statistics as cotangents, so one `jax.grad` collects
those of all layers (`observe`). Batches are merged.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.calibration.observation import arrays_only, total
from jaxquant.calibration.probing import Probing, check_globs
from jaxquant.calibration.statistics import Probe, Stats, Weighting
from jaxquant.core.arguments import check_arguments, described
from jaxquant.core.hosts import on_host, whole
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
    """Collect statistics of the inputs of every weight that `fn` uses in a matmul.

    They are the mean magnitude and the bounds of every channel, second moments unless `gram` is
    False (with `output`, those of loss gradients too), and, with `sample`, some rows. Matrices that
    are selected by indexing (experts) get statistics of the tokens routed to them. Slices of a
    weight (w[:, 128:]) contribute to the statistics of the whole weight. If `fn` contracts a weight
    over different axes in different places, the statistics are those of its first use.

    Besides `params`, calibration needs memory for two copies of the statistics (the running sums
    and those of one batch) and for one backward pass of `fn`; `jax.checkpoint` inside `fn` reduces
    the latter. A second moment of k channels takes 4 k^2 bytes; weights that share an input share
    one, and every layer of a stack has its own. To reduce memory further, go block by block with
    `jaxquant.ptq.quantize_blocks`.

    Args:
      fn: fn(params, batch), or fn(params, *batch) if batches are tuples. Statistics come from the
        backward pass, so there are none for matmuls that no gradient reaches (those followed by an
        argmax, or by rounding).
      params: parameter tree of floating-point arrays.
      batches: inputs of fn; iterated over once. Each new shape is compiled once.
      loss: loss(outputs, batch) -> scalar; required by weighting="gradient".
      weighting: weights of the tokens in second moments and mean magnitudes; the bounds of each
        channel (`low` and `high` of `Probe`) are not weighted. "gradient" uses the squared norm of
        the loss gradient at the matmul's output. "energy" uses one over the mean square of the
        token's input, so that an attention sink counts as one token of many. "uniform" weights all
        tokens equally. Default: "gradient" if a loss is given, else "uniform".
      gram: whether to keep second moments of the inputs (default True); methods that only scale or
        rotate do not need them.
      output: path globs, such as ["layers/*kernel"], of the weights for which the second moment of
        the loss gradient at the output is also kept; `TwoSided` rounding needs it. It takes another
        4 n^2 bytes for n output channels, too much for an output head with a large vocabulary, and
        requires gradient weighting.
      sample: number of rows of each kind to keep from every input: those with the largest entries,
        and random ones (default 0: none). Transforms that search on activations need them
        (`Greedy`, and `Smooth` when its strength is searched for).
      progress: called with the number of batches done.
      finished: mapping in which the running sums are stored and from which they are resumed; one
        that lives on disk (`jaxquant.durable.store.Folder`) makes a long run resumable. Batches
        already in the stored sums are skipped. Stored sums are ignored if the parameters, the
        settings or the first batch differ. Changes to `fn`, `loss` or later batches are not
        detected: pass a different `name` after such a change.
      save_every: number of batches between stored copies, 1 or more; the final sums are stored too.
      name: name under which the sums are stored.

    Returns:
      `Stats`.

    Raises:
      ValueError: there are no batches, or fewer than the stored sums contain; gradient weighting
        without a loss; a glob in `output` that matches nothing; a loss that is not a scalar.

    Warns:
      UserWarning: lists weights, and matrices of a stack (such as experts), whose statistics are
      all zero, and weights that are used both as w and as w.T.

    Source:
      Frantar et al. 2022, arXiv:2210.17323, for the second moment of the inputs. With gradient
      weighting it is the input-side factor of a Kronecker-factored Fisher matrix whose output side
      is the identity (Tseng et al. 2025, arXiv:2505.22988).

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
        raise ValueError('output= needs weighting="gradient" and loss=')
    if (sample := int(sample)) < 0:
        raise ValueError(f"sample must be a number of rows, 0 or more, got {sample}")
    if save_every < 1:
        raise ValueError(f"save_every must be a number of batches, 1 or more, got {save_every}")
    params, fn = arrays_only(params, fn)
    sums, plan, kept = None, None, _Kept(finished, name)
    for i, batch in enumerate(batches):
        if sums is None:
            found = sites(fn, params, *_args(batch))
            check_globs(found, output)
            plan = Probing.of(found, weighting, gram, tuple(output), sample)
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
        raise ValueError(
            f"the statistics kept as {name!r} cover {kept.count} batches, but batches "
            f"has only {i + 1}: pass the batches of that run again"
        )
    for text in _doubts(found, sums, plan.holder):
        warnings.warn(text, stacklevel=2)
    return Stats(found, sums, dict(plan.holder))


def _doubts(
    found: Mapping[str, Site], sums: Mapping[str, Probe], holder: Iterable[tuple[str, str]]
) -> Iterator[str]:
    """Yield warnings about what the statistics do not cover."""
    for path, site in found.items():
        if site.contracted and site.also:
            others = " and ".join(str(list(axes)) for axes in site.also)
            yield (
                f"{path} is multiplied in two ways: over its axes {list(site.contracted)} first, "
                f"over {others} elsewhere; its statistics are those of the first way only"
            )
    for path, probe in sums.items():
        unseen = on_host(jnp.sum(probe.magnitude, axis=-1) == 0)
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
                f"{names}: no input reached {len(places)} of {unseen.size} matrices, "
                f"{some}, so these have no statistics"
            )


def _args(batch: PyTree) -> tuple[PyTree, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


class _Kept:
    """Running sums in a store.

    Attributes:
      count: number of batches in the stored sums.
    """

    def __init__(self, finished: Finished | None, name: str) -> None:
        self.finished, self.name, self.count = finished, name, 0

    def sums(self, plan: Probing, params: PyTree, batch: PyTree) -> dict[str, Probe]:
        """Return the sums stored for this plan, parameters and first batch; otherwise zeros."""
        if self.finished is None:
            return plan.probes()
        self.begun = mark(str(plan), whole((params, batch)))
        kept = self.finished.get(self.name, {})
        if not kept or not np.array_equal(kept.get("begun", ()), self.begun):
            return plan.probes()
        self.count = int(kept["count"])
        return as_tree(kept, jax.eval_shape(plan.probes))

    def keep(self, count: int, sums: dict[str, Probe]) -> None:
        """Store the sums of `count` batches, if that is more than what is stored."""
        if self.finished is not None and count > self.count:
            beside = {"begun": self.begun, "count": np.int64(count)}
            self.finished[self.name] = as_arrays(sums) | beside
            self.count = count


@partial(jax.jit, static_argnames=("fn", "loss", "plan"), donate_argnames="sums")
def _step(
    sums: dict, params: PyTree, batch: PyTree, fn: Callable, loss: Callable | None, plan: Probing
) -> dict:
    """Merge the statistics of one batch into the sums."""

    def scalar(probes: dict) -> Array:
        out = run(fn, plan.planted(params, probes), *_args(batch))
        if loss is None:
            return total(out)
        value = jnp.asarray(loss(out, batch))
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"loss must return a floating scalar, got {described(value)}")
        return value

    # A probe's value is never read, so the running sums can take the place of zeros.
    return plan.merged(sums, jax.grad(scalar)(sums))
