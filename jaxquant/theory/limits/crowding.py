"""How the margin of an attention score must grow with the number of keys.

For scores s of N keys and a target i, the attention to it is exactly

    p_i = sigmoid(M_i - ln(N - 1)),   M_i = s_i - ln mean_{j != i} e^(s_j),

so a share p needs the margin ln(N - 1) + ln(p / (1 - p)). The margin is measured from the logarithm
of a mean of exponentials, which contains the variance of the other scores already. A head keeps its
attention on a target if its margin grows as fast as ln(N - 1), with a slope of 1 or more, and
dilutes it otherwise. The largest of N scores grows with N by itself, even if all are noise, so its
margin proves no focus; margins of fixed targets (the first key, the query's own, the previous one)
have no such trend.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import expit

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit

TARGETS = ("largest", "first", "own", "previous")
TOLERANCE = 1e-4  # of an attention, for scores in float32
FEWEST = 16  # queries of an octave that counts
SINK = 0.5  # share of queries whose largest score is that of the first key, in a sink head


class Margins(NamedTuple):
    """Margins of the queries of heads.

    Attributes:
      margin: M of each query and target (in the order of `TARGETS`), [..., t, 4].
      probability: attention to it, by a softmax over the whole row, [..., t, 4].
      largest: key of the largest score, [..., t].
      keys: number N of keys that the query sees, [..., t].
    """

    margin: Float[Array, "*heads t 4"]
    probability: Float[Array, "*heads t 4"]
    largest: Int[Array, "*heads t"]
    keys: Int[Array, "*heads t"]


@dataclasses.dataclass(frozen=True)
class Crowding:
    """Margins of heads against the number of keys.

    Attributes:
      error: the largest |p - sigmoid(M - ln(N - 1))|.
      log_keys: mean of ln(N - 1) over the queries of each octave of N, [octaves].
      margin: median margin, [layers, heads, octaves, 4], targets in the order of `TARGETS`.
      probability: median attention, likewise.
      slope: least-squares slope of the median margin on ln(N - 1), [layers, heads, 4]; NaN for a
        target that is out of sight in some octave.
      sink: share of queries whose largest score is that of the first key, [layers, heads].
    """

    error: float
    log_keys: Float[np.ndarray, "n"]
    margin: Float[np.ndarray, "layers heads n 4"]
    probability: Float[np.ndarray, "layers heads n 4"]
    slope: Float[np.ndarray, "layers heads 4"]
    sink: Float[np.ndarray, "layers heads"]

    @property
    def diluting(self) -> float | None:
        """Share of the heads that are no sinks whose largest margin grows slower than ln(N - 1).

        None if all heads are sinks.
        """
        slopes = self.slope[self.sink <= SINK][:, 0]
        return float(np.mean(slopes < 1)) if slopes.size else None

    def limits(self) -> tuple[Limit, ...]:
        """Return the identity, and the share of heads that dilute, as rows of a suite."""
        identity = (
            "The attention to a key is the logistic function of m - ln(n - 1), where m is the "
            "margin of its score over those of the other n - 1 keys; measured is the largest "
            "difference."
        )
        heads = (
            "Share of the attention heads that dilute their attention as the text grows: the "
            "margin of their largest score grows slower than ln(n - 1) with the number n of keys. "
            "Heads that mostly attend to the first token (sinks) are left out."
        )
        medians = np.nanmedian(np.where(np.isfinite(self.slope), self.slope, np.nan), (0, 1))
        note = ", ".join(f"{n} {s:.2f}" for n, s in zip(TARGETS, medians, strict=True))
        note = (
            f"Median growth of the margin over that of ln(n - 1), by the key attended to: {note}. "
            f"{np.mean(self.sink > SINK):.0%} of the heads are sinks."
        )
        holds = self.error <= TOLERANCE
        return (
            Limit("attention identity", identity, "theorem", self.error, TOLERANCE, holds),
            Limit("attention dilutes", heads, "description", self.diluting, None, None, note=note),
        )


def needed_margin(keys: float, probability: float) -> float:
    """Return the margin that attention needs: ln(N - 1) + ln(p / (1 - p)).

    Args:
      keys: number N of keys, 2 or more.
      probability: attention p to one of them, above 0 and below 1.
    Returns:
      The margin over the logarithm of the mean exponential of the other scores.
    Raises:
      ValueError: a number is out of range.

    >>> round(needed_margin(1024, 0.5), 3), round(needed_margin(131072, 0.5), 3)
    (6.93, 11.783)
    """
    check_arguments(needed_margin, locals())
    if not 2 <= keys < math.inf or not 0 < probability < 1:
        raise ValueError(
            f"expected 2 keys or more and 0 < probability < 1, got {keys} and {probability}"
        )
    return math.log(keys - 1) + math.log(probability) - math.log1p(-probability)


def largest_probability(keys: float, half_range: float) -> float:
    """Return the most attention that a key can have if all scores lie within [-B, B].

    The bound is 1 / (1 + (N - 1) e^(-2 B)), so attention of 1/2 needs N <= 1 + e^(2 B).

    Args:
      keys: number N of keys, 1 or more.
      half_range: B, 0 or more.
    Returns:
      The largest attention.
    Raises:
      ValueError: a number is out of range.
    Source:
      arXiv:2410.01104.

    >>> largest_probability(5, 0.0)
    0.2
    """
    check_arguments(largest_probability, locals())
    if not 1 <= keys < math.inf or not 0 <= half_range < math.inf:
        raise ValueError(
            f"expected 1 key or more and a half range of 0 or more, got {keys} and {half_range}"
        )
    return 1 / (1 + (keys - 1) * math.exp(-2 * half_range))


def head_margins(scores: Float[Array, "t t"]) -> Margins:
    """Return the margins of the queries of one head; runs under `jit` and `vmap`.

    The margins are computed over the keys up to the query's own, and the attention by a softmax
    over all keys, so that the two disagree if the causal mask is missing.

    Args:
      scores: [t, t], query by key, scaled, with -inf where a query must not look.
    Returns:
      Margins of all queries. Those of a query that sees one key are infinite or NaN.
    """
    t = scores.shape[-1]
    query = jnp.arange(t)
    seen = (query[None] <= query[:, None]) & (scores != -jnp.inf)
    s = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
    largest = jnp.argmax(s, -1)
    is_largest = largest[:, None] == query[None]
    total = jax.nn.logsumexp(s, -1)
    others = jax.nn.logsumexp(jnp.where(is_largest, -jnp.inf, s), -1)
    target = jnp.stack([largest, 0 * query, query, jnp.maximum(query - 1, 0)], -1)
    at = jnp.take_along_axis(s, target, -1)
    # Without the largest term a sum does not cancel: what is taken away is at most a half.
    share = jnp.minimum(jnp.exp(at - total[:, None]), 0.5)
    rest = jnp.where(
        target == largest[:, None], others[:, None], total[:, None] + jnp.log1p(-share)
    )
    keys = seen.sum(-1)
    attention = jax.nn.softmax(scores.astype(jnp.float32), -1)
    return Margins(
        at - rest + jnp.log(keys - 1.0)[:, None],
        jnp.take_along_axis(attention, target, -1),
        largest,
        keys,
    )


def crowding(margins: Margins, first: int = 63) -> Crowding:
    """Summarize the margins of all heads by octaves of the number of keys.

    Args:
      margins: of `head_margins`, with leading axes [layers, heads].
      first: queries before this position are left out; 1 or more.
    Returns:
      Medians, slopes and the error of the identity.
    Raises:
      ValueError: shapes do not match, a margin is NaN, or the queries span fewer than two octaves
        of 16 queries or more.

    >>> scores = jnp.where(jnp.tri(200) > 0, 0.0, -jnp.inf)
    >>> one = jax.tree.map(lambda x: x[None, None], head_margins(scores))
    >>> bool(abs(crowding(one).slope[0, 0, 2]) < 1e-5)  # of equal scores all margins are 0
    True
    """
    check_arguments(crowding, locals())
    m, p, top, keys = (np.asarray(x, np.float64) for x in margins)
    if m.ndim != 4 or p.shape != m.shape or top.shape != m.shape[:3] or keys.shape != top.shape:
        raise ValueError(
            "expected margins and probabilities [layers, heads, t, 4], and keys [layers, heads, "
            f"t], got shapes {[list(x.shape) for x in (m, p, top, keys)]}"
        )
    if first < 1:
        raise ValueError(f"first must be 1 or more, got {first}")
    m, p, top, keys = m[:, :, first:], p[:, :, first:], top[:, :, first:], keys[:, :, first:]
    if keys.size == 0 or (keys != keys[0, 0]).any() or keys.min() < 2:
        raise ValueError(
            f"expected queries from position {first} on that see two keys or more, as many in "
            f"every head, got {keys.shape[2]} queries of shape {list(keys.shape[:2])}"
        )
    logs = np.log(keys[0, 0] - 1)
    if np.isnan(m).any() or np.isnan(p).any():
        raise ValueError("margins must not be NaN: a score is NaN or infinite")
    octave = np.floor(np.log2(keys[0, 0])).astype(int)
    groups = [octave == one for one in np.unique(octave) if (octave == one).sum() >= FEWEST]
    if len(groups) < 2:
        raise ValueError(
            f"expected queries in two octaves of the number of keys, {FEWEST} in each, got "
            f"{len(groups)}: take a longer text"
        )
    median = lambda x: np.stack([np.median(x[:, :, g], 2) for g in groups], 2)
    centers, medians = np.array([logs[g].mean() for g in groups]), median(m)
    apart = centers - centers.mean()
    with np.errstate(invalid="ignore"):  # a target that is out of sight has the margin -inf
        slope = np.einsum("n,lhnk->lhk", apart, medians) / (apart**2).sum()
    return Crowding(
        error=float(np.abs(p - expit(m - logs[:, None])).max()),
        log_keys=centers,
        margin=medians,
        probability=median(p),
        slope=np.where(np.isfinite(slope), slope, np.nan),
        sink=np.mean(top == 0, 2),
    )
