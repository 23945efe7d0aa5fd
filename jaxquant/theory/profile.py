"""Where the large entries of an activation matrix are: in some channels, some tokens, or one entry.

Three kinds, by thresholds that Gaussian activations never reach:

- "channel" (normal outliers; SmoothQuant, AWQ): the same few channels for nearly all tokens. The
  mean |x| of a channel is 10 times that of the median channel, and in 4 of 5 tokens |x| is above
  3 medians. One giant entry makes such a mean, but not such a share.
- "token" (token-specific outliers): an entry of 50 medians that is 5 times the mean of its own
  channel, as few tokens can be (at most one in five, by Markov). The product of two Gaussians, as a
  gated MLP makes it, comes to some 33 medians in a million entries.
- "massive": above 100 and above 1000 medians. In a hidden state these are the massive activations
  of Sun et al. 2024, arXiv:2402.17762, section 2.2; in the input of a down projection, where they
  come from, the massive outliers of Lin et al. 2024 (DuQuant), arXiv:2406.01721.

Where more than half of the entries are 0, as behind a ReLU, the median is that of the others.
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
    """What is kept of a matrix x [t, k]; float32, indices too (exact to 2^24).

    Attributes:
      rows: t.
      median: of |x|.
      rest: max |x| without the first token.
      value, token, channel: the largest entries, by |x|.
      mean, peak, at, share: of every channel the mean and the maximum of |x|, the token of the
        maximum, and the share of the tokens with |x| above `OUTLYING` medians.
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
    """The summary for `jaxquant.observe`: the `top` largest entries, and every channel's size."""

    top: int = 4

    def zeros(self, k: int, n: int) -> Extremes:
        """Nothing seen yet."""
        one, some, all_ = (jnp.zeros(s) for s in ((), (self.top,), (k,)))
        return Extremes(one, one, one, some, some, some, all_, all_, all_, all_)

    def of(self, seen: Seen) -> Extremes:
        """Of one input; the zeros that stand for rows of other experts do not count."""
        found, rows = self.of_matrix(seen.rows), jnp.sum(seen.counted)
        more = len(seen.rows) / jnp.maximum(rows, 1)
        return found._replace(rows=rows, mean=more * found.mean, share=more * found.share)

    def of_matrix(self, x: Float[Array, "t k"]) -> Extremes:
        """Of a matrix itself."""
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
    """Of all, or of what is not 0 if more than half is; 0 if all is.

    The bits of floats that are not negative are in the floats' order, so that 31 counts find the
    lower one of the middle two; XLA sorts on one thread, ten times as long.
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
    """One channel: its mean |x| over that of the median channel, and the share of the tokens in
    which it is above `OUTLYING` medians."""

    channel: int
    ratio: float
    share: float

    @property
    def persistent(self) -> bool:
        """Whether it is a normal outlier."""
        return self.ratio >= CHANNEL and self.share >= PERSISTENT


@dataclasses.dataclass(frozen=True)
class Profile:
    """An activation matrix [t, k]: what a weight multiplies, or a hidden state.

    Attributes:
      site: path of the weights, "*" for numbers in it, or "residual".
      layer: these numbers, and the index in a stack.
      weights: paths of the weights that multiply it; () of a hidden state.
      tokens: t.
      median: of |x|.
      rest: max |x| without the first token.
      top: the largest entries.
      channels: the channels of the largest means.
      spikes: the largest token-specific entries by |x|, one of a channel.
      n_spikes: how many channels have such.
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
        """Of |x|."""
        return abs(self.top[0].value)

    @property
    def ratio(self) -> float:
        """max / median; 0 if all is 0."""
        return self.max / self.median if self.median else 0.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """See `classify`."""
        return classify(self)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values."""
        named = lambda rows: [row._asdict() for row in rows]
        lists = {name: named(getattr(self, name)) for name in ("top", "channels", "spikes")}
        whole = {"max": self.max, "ratio": self.ratio, "kinds": list(self.kinds)}
        return vars(self) | lists | whole | {"layer": [*self.layer], "weights": [*self.weights]}


def classify(profile: Profile) -> tuple[str, ...]:
    """Which of "channel", "token", "massive" (see the top of this file) a matrix has.

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
    """Of a matrix at hand."""
    return profile_of(_of_matrix(Largest(top), x), site, layer)


_of_matrix = jax.jit(Largest.of_matrix, static_argnums=0)


def profile_of(
    found: Extremes, site: str, layer: tuple[int, ...], weights: tuple[str, ...] = ()
) -> Profile:
    """Of one matrix (no batch axes) from its summary.

    Raises:
      ValueError: NaN or infinite entries.
    """
    e: Any = jax.tree.map(np.asarray, found)
    if not np.all(np.isfinite(e.peak)):
        raise ValueError(f"{site} of layer {layer} holds NaN or infinite activations")
    count = len(e.value)
    typical = float(_median(e.mean)) or 1.0
    alone = (e.peak >= TOKEN * e.median) & (e.peak >= ALONE * e.mean) & (e.peak > 0)
    # A persistent channel first: the mean of another may be one giant entry's doing.
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
