"""What a language model must offer to be examined by `theory.limits.suite.run_suite`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.theory.limits.divergence import TIE

Reduce = Callable[[Float[Array, "t t"]], PyTree]


class Inside(NamedTuple):
    """What a model computes on the way.

    Attributes:
      states: the residual stream after the last layer [t, d].
      heads: what the scores of every head were reduced to; leaves [layers, heads, ...].
    """

    states: Float[Array, "t d"]
    heads: PyTree


class Functions(NamedTuple):
    """The pure functions of an architecture.

    Models of one architecture share the same function objects, so that one compiled program serves
    a float model and its quantized versions.

    Attributes:
      apply: (params, tokens int [b, t]) -> logits [b, t, V].
      apply_cached: (params, tokens int [b, t], cache) -> (logits [b, t, V], cache), where the
        tokens follow those that the cache has seen.
      init_cache: (batch, size) -> an empty cache for `size` tokens of each sequence.
      inside: (params, tokens int [t], reduce) -> `Inside`. `reduce` maps the attention scores of
        one head [t, t], query by key, scaled and with -inf where a query must not look, to arrays.
      tie: difference of two logits that rounding may decide: passes with and without a cache add
        in different orders. Coarse activations need more than the default, which is for float32.
    """

    apply: Callable[[PyTree, Array], Array]
    apply_cached: Callable[[PyTree, Array, Any], tuple[Array, Any]]
    init_cache: Callable[[int, int], Any]
    inside: Callable[[PyTree, Array, Reduce], Inside]
    tie: float = TIE


class Sentences(NamedTuple):
    """Vectors of norm 1 for retrieval; query i belongs to document i.

    Attributes:
      queries, documents: float32 [n, d].
    """

    queries: Float[np.ndarray, "n d"]
    documents: Float[np.ndarray, "n d"]


class Subject(Protocol):
    """A language model, its text, and how to quantize it.

    `jaxquant_models.runs.limits.subject_of` makes one from a model of this library.
    """

    @property
    def name(self) -> str:
        """Its name in reports."""

    @property
    def functions(self) -> Functions:
        """Its pure functions."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the vocabulary."""

    @property
    def context(self) -> int:
        """Largest number of positions."""

    @property
    def end(self) -> tuple[int, ...]:
        """Ids of the stop tokens."""

    @property
    def tokens(self) -> Int[np.ndarray, " n"]:
        """The text on which it is examined, as token ids."""

    @property
    def stored(self) -> PyTree:
        """The parameters as they are stored; their bytes tell one model from another."""

    @property
    def stored_bits(self) -> float:
        """Number of bits of all parameters as they are stored."""

    @property
    def frequencies(self) -> Float[np.ndarray, " pairs"] | None:
        """Radians per position of the rotary position embedding; None for a model without one."""

    def angles(self, count: int) -> Float[np.ndarray, "t pairs"] | None:
        """Return the angles of positions 0 to count - 1 as the model computes them, or None."""

    def params(self) -> PyTree:
        """Return the parameters that `functions` take, dequantized at each call."""

    def variants(self) -> Mapping[str, Callable[[], "Subject"]]:
        """Return quantized versions of the model by name, made when called."""

    def sentences(self, count: int) -> Sentences | None:
        """Return vectors of `count` passages of the text, and of queries; None without encoder."""
