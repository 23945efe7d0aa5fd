"""Location of the large entries of an activation matrix: in channels, in tokens, or single entries.

There are three kinds, with thresholds that Gaussian activations never reach:

- "channel" (normal outliers; SmoothQuant, AWQ): the same few channels are large for nearly all
  tokens. The mean |x| of such a channel is at least 10 times that of the median channel, and |x| is
  above 3 medians in at least 4 of 5 tokens. A single giant entry can cause such a mean, but not
  such a share.
- "token" (token-specific outliers): an entry of at least 50 medians that is at least 5 times the
  mean of its own channel, which at most one token in five can be, by Markov's inequality. For
  comparison, the product of two Gaussians, as in a gated MLP, reaches some 33 medians in a million
  entries.
- "massive": an entry above 100 and above 1000 medians. In a hidden state these are the massive
  activations of Sun et al. 2024, arXiv:2402.17762, section 2.2; in the input of a down projection,
  where they originate, the massive outliers of Lin et al. 2024 (DuQuant), arXiv:2406.01721.

If more than half of the entries are 0, as after a ReLU, the median is that of the others.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.observed import Seen

CHANNEL = 10.0  # mean |x| of a channel over that of the median channel
OUTLYING, PERSISTENT = 3.0, 0.8  # medians of |x|; share of the tokens that are above
TOKEN, ALONE = 50.0, 5.0  # medians of |x|; means of the entry's own channel
MASSIVE, ABSOLUTE = 1000.0, 100.0  # medians of |x|; |x|


class Extremes(NamedTuple):
    """Summary of a matrix x [t, k], all float32; indices are exact up to 2^24.

    Attributes:
      rows: number of rows t.
      median: median of |x|.
      rest: max |x| without the first token.
      value, token, channel: value and position of the largest entries by |x|.
      mean, peak: mean and maximum of |x| in every channel.
      at: token of the maximum of every channel.
      share: share of the tokens with |x| above `OUTLYING` medians, in every channel.
    """

    rows: Float[Array, "*batch"]
    median: Float[Array, "*batch"]
    rest: Float[Array, "*batch"]
    value: Float[Array, "*batch top"]
    token: Float[Array, "*batch top"]
    channel: Float[Array, "*batch top"]
    mean: Float[Array, "*batch k"]
    peak: Float[Array, "*batch k"]
    at: Float[Array, "*batch k"]
    share: Float[Array, "*batch k"]


@dataclasses.dataclass(frozen=True)
class Largest:
    """A summary for `jaxquant.calibration.observe`: largest entries, and the size of every channel.

    Attributes:
      top: number of entries to keep.
    """

    top: int = 4

    def zeros(self, k: int, n: int) -> Extremes:
        """Return the summary before anything is seen, of a weight [k, n]."""
        one, some, all_ = (jnp.zeros(s) for s in ((), (self.top,), (k,)))
        return Extremes(one, one, one, some, some, some, all_, all_, all_, all_)

    def of(self, seen: Seen) -> Extremes:
        """Return the summary of one input, ignoring zeros in place of other experts' rows."""
        found, rows = self.of_matrix(seen.rows), jnp.sum(seen.counted)
        more = len(seen.rows) / jnp.maximum(rows, 1)
        return found._replace(rows=rows, mean=more * found.mean, share=more * found.share)

    def of_matrix(self, x: Float[Array, "t k"]) -> Extremes:
        """Return the summary of a matrix.

        Args:
          x: the matrix.
        Returns:
          Its summary, without batch axes.
        """
        x = x.astype(jnp.float32)
        size, k = jnp.abs(x), x.shape[1]
        flat = jnp.pad(x.reshape(-1), (0, self.top))
        _, index = jax.lax.top_k(jnp.abs(flat), self.top)
        median = _median(size)
        return Extremes(
            rows=jnp.float32(len(x)),
            median=median,
            rest=jnp.max(size[1:], initial=0.0),
            value=flat[index],
            token=(index // k).astype(jnp.float32),
            channel=(index % k).astype(jnp.float32),
            mean=jnp.mean(size, axis=0),
            peak=jnp.max(size, axis=0),
            at=jnp.argmax(size, axis=0).astype(jnp.float32),
            share=jnp.mean(size > OUTLYING * median, axis=0),
        )


def _median(size: Array) -> Array:
    """Return the median of all sizes, or of the nonzero ones if most are 0; 0 if all are.

    Nonnegative floats are ordered like their bits, so 31 counts find the lower of the two middle
    values. Sorting takes ten times as long, because XLA sorts on one thread.
    """
    bits = jax.lax.bitcast_convert_type(size, jnp.int32)
    below = lambda value: jnp.sum(bits < value)
    zeros = below(1)
    all_zero = zeros == size.size
    zeros = jnp.where(2 * zeros > size.size, zeros, 0)
    rank = (size.size + zeros - 1) // 2

    def narrowed(i: Array, value: Array) -> Array:
        raised = value | (1 << (30 - i))
        return jnp.where(below(raised) <= rank, raised, value)

    low = jax.lax.fori_loop(0, 31, narrowed, jnp.int32(0))
    above = jnp.min(jnp.where(bits > low, bits, jnp.iinfo(jnp.int32).max))
    two = ((size.size - zeros) % 2 == 0) & (below(low + 1) == rank + 1)
    middle = jax.lax.bitcast_convert_type(jnp.stack([low, jnp.where(two, above, low)]), jnp.float32)
    return jnp.where(all_zero, 0.0, jnp.mean(middle))


class Entry(NamedTuple):
    """One entry of an activation matrix."""

    value: float
    token: int
    channel: int


class Channel(NamedTuple):
    """One channel of an activation matrix.

    Attributes:
      channel: its index.
      ratio: its mean |x| over that of the median channel.
      share: share of the tokens in which |x| is above `OUTLYING` medians.
    """

    channel: int
    ratio: float
    share: float

    @property
    def persistent(self) -> bool:
        """Whether the channel is a normal outlier."""
        return self.ratio >= CHANNEL and self.share >= PERSISTENT


@dataclasses.dataclass(frozen=True)
class Profile:
    """Profile of an activation matrix [t, k]: the input of a weight, or a hidden state.

    Attributes:
      site: path of the weights, with "*" for numbers, or "residual".
      layer: these numbers, followed by the index in a stack.
      weights: paths of the weights that multiply it; () for a hidden state.
      tokens: number of tokens t.
      median: median of |x|.
      rest: max |x| without the first token.
      top: the largest entries.
      channels: the channels with the largest means, persistent ones first.
      spikes: the largest token-specific entries by |x|, at most one per channel.
      n_spikes: number of channels that have such an entry.
    """

    site: str
    layer: tuple[int, ...]
    weights: tuple[str, ...]
    tokens: int
    median: float
    rest: float
    top: tuple[Entry, ...]
    channels: tuple[Channel, ...]
    spikes: tuple[Entry, ...]
    n_spikes: int

    @property
    def max(self) -> float:
        """The largest |x|."""
        return abs(self.top[0].value)

    @property
    def ratio(self) -> float:
        """The largest |x| over the median; 0 if the median is 0."""
        return self.max / self.median if self.median else 0.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of outliers, see `classify`."""
        return classify(self)

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        named = lambda rows: [row._asdict() for row in rows]
        lists = {name: named(getattr(self, name)) for name in ("top", "channels", "spikes")}
        whole = {"max": self.max, "ratio": self.ratio, "kinds": list(self.kinds)}
        return vars(self) | lists | whole | {"layer": [*self.layer], "weights": [*self.weights]}


def classify(profile: Profile) -> tuple[str, ...]:
    """Return the kinds of outliers of a matrix: "channel", "token", "massive" (see the module).

    Args:
      profile: profile of the matrix.
    Returns:
      The kinds that it has.

    >>> x = jax.random.normal(jax.random.key(0), (64, 32))
    >>> classify(profile(x))
    ()
    >>> classify(profile(x.at[:, 5].add(30.0)))
    ('channel',)
    >>> classify(profile(x.at[7, 5].set(60.0)))
    ('token',)
    >>> classify(profile(x.at[0, 5].set(3000.0)))
    ('token', 'massive')
    """
    found = {
        "channel": any(c.persistent for c in profile.channels),
        "token": profile.n_spikes > 0,
        "massive": profile.max > ABSOLUTE and profile.ratio > MASSIVE,
    }
    return tuple(kind for kind, has in found.items() if has)


def profile(
    x: Float[Array, "t k"], site: str = "", layer: tuple[int, ...] = (), top: int = 4
) -> Profile:
    """Return the profile of a matrix.

    Args:
      x: activations.
      site, layer: labels of the profile. Default: none.
      top: number of entries and channels to keep.
    Returns:
      The profile.
    Raises:
      ValueError: entries are not finite.
    """
    return profile_of(_of_matrix(Largest(top), x), site, layer)


_of_matrix = jax.jit(Largest.of_matrix, static_argnums=0)


def profile_of(
    found: Extremes, site: str, layer: tuple[int, ...], weights: tuple[str, ...] = ()
) -> Profile:
    """Return the profile of one matrix (without batch axes) from its summary.

    Args:
      found: the summary.
      site, layer, weights: labels of the profile.
    Returns:
      The profile.
    Raises:
      ValueError: entries are not finite.
    """
    e: Any = jax.tree.map(np.asarray, found)
    if not np.all(np.isfinite(e.peak)):
        raise ValueError(f"{site} of layer {layer} holds NaN or infinite activations")
    count = len(e.value)
    typical = float(_median(e.mean)) or 1.0
    alone = (e.peak >= TOKEN * e.median) & (e.peak >= ALONE * e.mean) & (e.peak > 0)
    # Persistent channels come first: another channel's mean may be due to one giant entry.
    persistent = (e.share >= PERSISTENT) & (e.mean >= CHANNEL * typical)
    order = np.lexsort((-e.mean, ~persistent))[:count]
    spikes = np.argsort(-np.where(alone, e.peak, 0), kind="stable")[: min(count, alone.sum())]
    return Profile(
        site=site,
        layer=layer,
        weights=weights,
        tokens=int(e.rows),
        median=float(e.median),
        rest=float(e.rest),
        top=_entries(e.value, e.token, e.channel),
        channels=tuple(
            Channel(int(c), float(e.mean[c] / typical), float(e.share[c])) for c in order
        ),
        spikes=_entries(e.peak[spikes], e.at[spikes], spikes),
        n_spikes=int(alone.sum()),
    )


def _entries(values: PyTree, tokens: Any, channels: Any) -> tuple[Entry, ...]:
    rows = zip(values, tokens, channels, strict=True)
    return tuple(Entry(float(v), int(t), int(c)) for v, t, c in rows)
