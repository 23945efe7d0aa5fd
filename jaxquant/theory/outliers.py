"""Outliers of a model: in the inputs of its weights, its hidden states and its attention.

The inputs of all weights come from one backward pass of the user's function
(`jaxquant.calibration.observe`). Hidden states and attention are passed in, for models that
expose them.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.observation import Observation, observe
from jaxquant.core.text_table import aligned
from jaxquant.theory.profile import ABSOLUTE, MASSIVE, Largest, Profile, profile_of

SINK = 0.05  # least share of the attention of a sink; with even attention 512 keys get 0.003 each
RESIDUAL = "residual"
HEADER = (
    "site", "layer", "max", "median", "ratio", "token", "channel", "w/o first", "kinds",
    "channels (ratio)",
)  # fmt: skip


class Massive(NamedTuple):
    """A massive activation: |value| is above 100 and above 1000 medians of the hidden state.

    Attributes:
      layer, token, channel: its position.
      value: its value.
      ratio: |value| over the median of |x|.
    """

    layer: int
    token: int
    channel: int
    value: float
    ratio: float


class Sink(NamedTuple):
    """A key and its share of the attention in one layer."""

    layer: int
    token: int
    share: float


def massive(hidden: Float[Array, "L t d"]) -> tuple[Massive, ...]:
    """Return all massive activations of the hidden states, by layer and decreasing magnitude.

    Args:
      hidden: hidden states after each layer [L, t, d].
    Returns:
      The activations.
    Raises:
      ValueError: `hidden` has another number of axes.
    Source:
      Sun et al. 2024, arXiv:2402.17762, section 2.2.

    >>> h = np.ones((2, 8, 4)); h[1, 0, 3] = -2000.0
    >>> massive(h)
    (Massive(layer=1, token=0, channel=3, value=-2000.0, ratio=2000.0),)
    """
    found = []
    for layer, x in enumerate(_stack(hidden, "hidden", 3)):
        size = np.abs(x)
        median = float(np.median(size))
        at = np.argwhere((size > ABSOLUTE) & (size > MASSIVE * median))
        for t, c in sorted(at.tolist(), key=lambda place: -size[tuple(place)]):
            ratio = float(size[t, c]) / median if median else float("inf")
            found.append(Massive(layer, t, c, float(x[t, c]), ratio))
    return tuple(found)


def sinks(attention: Float[Array, "L t"], share: float = SINK) -> tuple[Sink, ...]:
    """Return the keys that get at least `share` of a layer's attention, by decreasing share.

    Args:
      attention: share of each key [L, t], averaged over heads and over late queries, so that what a
        query gives to its neighbors is spread over all of them.
      share: smallest share of a sink.
    Returns:
      The sinks, layer by layer.
    Raises:
      ValueError: `attention` has another number of axes.

    >>> sinks(np.array([[0.75, 0.125, 0.0]]))
    (Sink(layer=0, token=0, share=0.75), Sink(layer=0, token=1, share=0.125))
    """
    rows = _stack(attention, "attention", 2)
    return tuple(
        Sink(layer, int(t), float(row[t]))
        for layer, row in enumerate(rows)
        for t in np.argsort(-row, kind="stable")
        if row[t] >= share
    )


@dataclasses.dataclass(frozen=True)
class Outliers:
    """The result of `outliers`; `str` gives a table.

    Attributes:
      inputs: profiles of the weights' inputs, by site and layer.
      hidden: profiles of the hidden state after each layer.
      massive: massive activations of the hidden states.
      sinks: keys that get a large share of the attention.
      texts: text of each token, if known.
      unseen: weights whose inputs are not in `inputs`, with the reason.
    """

    inputs: tuple[Profile, ...]
    hidden: tuple[Profile, ...] = ()
    massive: tuple[Massive, ...] = ()
    sinks: tuple[Sink, ...] = ()
    texts: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the rows of the table, with the columns of `HEADER`."""
        for p in (*self.hidden, *self.inputs):
            value, token, channel = p.top[0]
            persistent = [f"{c.channel} ({c.ratio:.0f})" for c in p.channels if c.persistent]
            more = f" +{len(persistent) - 2}" if len(persistent) > 2 else ""
            yield (
                p.site, layer_name(p.layer), f"{abs(value):.5g}", f"{p.median:.4g}",
                f"{p.ratio:.0f}", self.token(token, p.tokens), str(channel), f"{p.rest:.5g}",
                " ".join(p.kinds), ", ".join(persistent[:2]) + more,
            )  # fmt: skip

    def token(self, index: int, tokens: int | None = None) -> str:
        """Return a token's index, followed by its text if known.

        Args:
          index: index of the token.
          tokens: number of rows of the matrix. If it differs from the number of texts, rows are not
            tokens and the text is left out. Default: rows are tokens.
        Returns:
          The name.
        """
        known = self.texts and tokens in (None, len(self.texts))
        return f"{index} {self.texts[index]!r}" if known else str(index)

    def findings(self) -> Iterator[str]:
        """Yield lines on massive activations, attention sinks and weights that were not seen."""
        for (token, channel), group in _grouped(self.massive, lambda m: (m.token, m.channel)):
            first, last = group[0], group[-1]
            yield (
                f"massive activation: token {self.token(token)}, channel {channel}, after layers "
                f"{_runs(m.layer for m in group)}: {first.value:.1f} to {last.value:.1f}, "
                f"{max(m.ratio for m in group):.0f} times the median"
            )
        for token, group in _grouped(self.sinks, lambda s: s.token):
            most = max(group, key=lambda s: s.share)
            yield (
                f"attention sink: key {self.token(token)}, layers {_runs(s.layer for s in group)}: "
                f"up to {most.share:.3f} of the attention (layer {most.layer})"
            )
        yield from (f"not seen: {line}" for line in self.unseen)

    def heat(self) -> tuple[list[str], list[tuple[int, ...]], np.ndarray]:
        """Return the data of a heat map.

        Returns:
          Sites, layers, and log10(max / median) [layers, sites], NaN where a layer has no such
          site.
        """
        all_ = (*self.hidden, *self.inputs)
        names = list(dict.fromkeys(p.site for p in all_))
        layers = sorted({p.layer for p in all_}, key=lambda layer: (not layer, layer))
        out = np.full((len(layers), len(names)), np.nan)
        for p in all_:
            if p.ratio:
                out[layers.index(p.layer), names.index(p.site)] = np.log10(p.ratio)
        return names, layers, out

    def __str__(self) -> str:
        rows = [HEADER, *self.rows()]
        return "\n".join(line.rstrip() for line in (*aligned(rows), *self.findings()))

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return {
            "inputs": [p.to_json() for p in self.inputs],
            "hidden": [p.to_json() for p in self.hidden],
            "massive": [m._asdict() for m in self.massive],
            "sinks": [s._asdict() for s in self.sinks],
            "texts": list(self.texts),
            "unseen": list(self.unseen),
        }


def outliers(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    hidden: Float[Array, "L t d"] | None = None,
    attention: Float[Array, "L t"] | None = None,
    texts: Sequence[str] = (),
    top: int = 4,
) -> Outliers:
    """Find the outliers in every input that `fn(params, *args)` multiplies by a weight.

    Args:
      fn, params, args: as in `jaxquant.calibration.observe`. The rows of an input are its tokens.
        The sequences of a batch would be concatenated, so pass a single one.
      hidden: hidden states after each layer [L, t, d]. Default: none.
      attention: share of each key in the attention of each layer [L, t], see `sinks`. Default:
        none.
      texts: text of every token, to name it by.
      top: number of entries and channels to keep of each matrix.
    Returns:
      The profiles of all inputs and hidden states, massive activations and sinks.
    Raises:
      ValueError: weights are packed, activations are not finite, or `hidden` or `attention` has
        a different shape.
    Warns:
      If no gradient reached the outputs of some weights; the result lists them too.
    Source:
      Sun et al. 2024, arXiv:2402.17762 (massive activations, attention sinks); Lin et al. 2024,
      arXiv:2406.01721 (normal and massive outliers of inputs).

    >>> import jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (64, 32)).at[:, 5].add(30.0)
    >>> fn = lambda params, x: jnp.tanh(x @ params["up"][0])
    >>> found = outliers(fn, {"up": [jnp.ones((32, 4))]}, x)
    >>> [(p.site, p.layer, p.kinds, p.channels[0].channel) for p in found.inputs]
    [('up/*', (0,), ('channel',), 5)]
    """
    kept = Largest(top)
    inputs, unseen = [], []
    for path, seen in observe(fn, params, *args, summary=kept).items():
        one, missing = _profiles(path, seen)
        inputs += one
        unseen += missing
    states: tuple[Profile, ...] = ()
    if hidden is not None:
        states = _hidden(_stack(hidden, "hidden", 3), kept)
    return Outliers(
        tuple(inputs),
        states,
        massive(hidden) if hidden is not None else (),
        sinks(attention) if attention is not None else (),
        tuple(texts),
        tuple(unseen),
    )


def _profiles(path: str, seen: Observation) -> tuple[list[Profile], list[str]]:
    """Return the profile of every layer of a stack, and the layers without one, with the reason."""
    site, place = _site(seen.weights), _numbers(path)
    found, unseen = [], []
    for index in np.ndindex(*np.shape(seen.products)):
        products = int(seen.products[index])
        layer = (*place, *index)
        if products == 1:
            one = jax.tree.map(lambda a, index=index: a[index], seen.summary)
            found.append(profile_of(one, site, layer, seen.weights))
        else:
            why = (
                f"{products} products with it are summed" if products else "no gradient reached it"
            )
            unseen.append(f"{path} {layer_name(index)}".rstrip() + f" ({why})")
    return found, unseen


def _hidden(hidden: np.ndarray, kept: Largest) -> tuple[Profile, ...]:
    found = jax.jit(lambda h: jax.lax.map(kept.of_matrix, h))(hidden)
    layer = lambda i: jax.tree.map(lambda a: a[i], found)
    return tuple(profile_of(layer(i), RESIDUAL, (i,)) for i in range(len(hidden)))


def _stack(a: Any, name: str, ndim: int) -> np.ndarray:
    if np.ndim(a) != ndim:
        axes = "[L, t, d]" if ndim == 3 else "[L, t]"
        raise ValueError(f"{name} must be {axes}, got shape {list(np.shape(a))}")
    return np.asarray(a, np.float32)


# A number that is a part of a path, or ends a part: "layers/3/q", "Dense_3/kernel".
_NUMBER = re.compile(r"(?:(?<=[/_])|^)\d+(?=/|$)")


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(n) for n in _NUMBER.findall(path))


def _site(weights: Sequence[str]) -> str:
    """Return the paths of several weights as one, with "*" for numbers.

    >>> _site(["layers/3/attn/k", "layers/3/attn/q"])
    'layers/*/attn/{k,q}'
    """
    paths = [_NUMBER.sub("*", path).split("/") for path in weights]
    if len({len(path) for path in paths}) > 1:
        return "/".join(paths[0])
    parts = [list(dict.fromkeys(part)) for part in zip(*paths, strict=True)]
    return "/".join(p[0] if len(p) == 1 else f"{{{','.join(p)}}}" for p in parts)


def layer_name(layer: tuple[int, ...]) -> str:
    """Return the name of a layer: its indices joined by dots.

    Args:
      layer: the indices; () gives "".
    Returns:
      The name.
    """
    return ".".join(map(str, layer))


def _grouped(
    found: Iterable[PyTree], key: Callable[[PyTree], Any]
) -> Iterator[tuple[PyTree, list[PyTree]]]:
    groups: dict[Any, list[PyTree]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return iter(groups.items())


def _runs(layers: Iterable[int]) -> str:
    """Return sorted numbers as ranges.

    >>> _runs([2, 3, 4, 9])
    '2-4, 9'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
