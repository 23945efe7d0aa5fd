"""Description length of a model and of data: two-part and prequential codes, break-even points."""

import dataclasses
import math
import numbers
from typing import Any

import numpy as np
from jaxtyping import Float, Int, PyTree
from scipy import special

from jaxquant.core.arguments import check_arguments
from jaxquant.recipes.size import size
from jaxquant.theory.entropy import contingency

LN2 = math.log(2)  # nats per bit
STIRLING = 1e4  # from which three terms of Stirling's series are exact in float64


@dataclasses.dataclass(frozen=True)
class Coding:
    """A model as a code for text: the bits that store it, and the nats that a token then costs.

      description length of N tokens = bits + N nats_per_token / ln 2    (bits)

    This is a two-part code: the model is sent first, then the tokens, each with the probability
    that the model gives it (ideal arithmetic coding).

    Attributes:
      bits: size of the model in bits, 0 or more, everything included that a decoder needs and that
        the codings that are compared do not share.
      nats_per_token: mean negative log-likelihood of a token in nats, 0 or more; the `nll` of
        `jaxquant.evaluation.evaluate`. All tokens are assumed to be as hard to predict, on average,
        as those on which it was measured.
    Raises:
      ValueError: a number is negative or not finite.

    Source: Rissanen 1978, "Modeling by shortest data description".

    >>> Coding(bits=1e6, nats_per_token=LN2).length(1000)
    1001000.0
    """

    bits: float
    nats_per_token: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            # NumPy's and JAX's numbers would compute in their own precision, and wrap.
            object.__setattr__(self, name, _number(name, value))

    @classmethod
    def of(cls, params: PyTree, nats_per_token: float) -> "Coding":
        """Return the coding by a tree of weights, of which every byte counts.

        Args:
          params: tree of floating-point arrays and `QTensor` leaves, as `jaxquant.size` takes it.
          nats_per_token: mean negative log-likelihood of a token in nats.

        >>> import jax.numpy as jnp
        >>> Coding.of({"w": jnp.ones((4, 4), jnp.float16)}, 3.0).bits
        256
        """
        return cls(8 * size(params).bytes, nats_per_token)

    def length(self, tokens: float) -> float:
        """Return the description length of the model and of this many tokens, in bits.

        Args:
          tokens: number of tokens, 0 or more.
        Raises:
          ValueError: the number is negative or not finite.
        """
        return float(self.bits + _number("tokens", tokens) * (self.nats_per_token / LN2))


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """Which of two codings is the shorter description, by the number of tokens.

    Attributes:
      tokens: the number of tokens at which both are equally long; infinity if there is none, or if
        they are always equally long.
      below: which is shorter for fewer tokens: "a", "b" or "neither".
      above: which is shorter for more tokens; the same as `below` if `tokens` is infinite.
    """

    tokens: float
    below: str
    above: str

    def __str__(self) -> str:
        if math.isfinite(self.tokens):
            return (
                f"below {self.tokens:,.0f} tokens {self.below} is the shorter description, above "
                f"it {self.above}"
            )
        return f"{self.below} is the shorter description for any number of tokens"


def break_even(a: Coding, b: Coding) -> BreakEven:
    """Return the number of tokens at which two codings of one model are equally long.

      N* = (bits_a - bits_b) / ((nats_b - nats_a) / ln 2)

    Below N* tokens the coding with fewer bits is the shorter description, above N* the one with
    fewer nats per token. If one of them has no more bits and no more nats than the other, and fewer
    of either, it dominates: there is no break-even point, N* is infinite, and `below` and `above`
    both name it. (With equal bits the two tie at 0 tokens, and with equal nats nowhere.) Two equal
    codings give infinity and "neither".

    Args:
      a, b: the codings.
    Returns:
      The break-even point.
    Raises:
      ValueError: an argument is no `Coding`.

    >>> four, two = Coding(bits=4.5e8, nats_per_token=2.5), Coding(bits=2.2e8, nats_per_token=2.7)
    >>> print(break_even(four, two))
    below 797,119,...
    >>> break_even(four, Coding(5e8, 2.6))
    BreakEven(tokens=inf, below='a', above='a')
    """
    check_arguments(break_even, locals())
    bits, nats = b.bits - a.bits, b.nats_per_token - a.nats_per_token
    if bits * nats < 0:
        below, above = ("a", "b") if bits > 0 else ("b", "a")
        return BreakEven(float(-bits / nats * LN2), below, above)
    one = "neither" if bits == nats == 0 else "a" if bits >= 0 and nats >= 0 else "b"
    return BreakEven(math.inf, one, one)


def prequential_bits(log_probabilities: Float[Any, "..."]) -> float:
    """Return the prequential code length of a sequence that a model predicts as it goes.

      L = -sum_i log2 p(x_i | x_1 ... x_(i-1))

    Each probability must be one that a decoder can compute too: that of the model as it was before
    it saw the symbol. Sums of the losses of a single epoch of online training are such a length, in
    nats; losses on data that was trained on before are not. No bits for a trained model are added,
    because the receiver trains the same model.

    Args:
      log_probabilities: natural logarithms of the probabilities of the symbols that occurred, each
        0 or less, of any shape; an empty array gives 0. Minus infinity, a symbol that was excluded,
        gives an infinite length.
    Returns:
      The length in bits.
    Raises:
      ValueError: an entry is positive or NaN.

    Source: Dawid 1984, "Statistical theory: the prequential approach".

    >>> prequential_bits(np.log([0.5, 0.25]))
    3.0
    """
    check_arguments(prequential_bits, locals())
    logs = np.asarray(log_probabilities, np.float64)
    if not (logs <= 0).all():
        raise ValueError(
            "log_probabilities must be logarithms of probabilities, so 0 or less, got "
            f"{'NaN' if np.isnan(logs).any() else logs.max()}; negate losses first"
        )
    return float(abs(logs.sum())) / LN2


def adaptive_bits(
    symbols: Int[Any, "..."],
    alphabet: int,
    groups: Int[Any, "..."] | None = None,
    prior: float = 0.5,
) -> float:
    """Return the prequential code length of symbols under adaptive estimates of their frequencies.

      p(x_(i+1) = s) = (n_s + prior) / (i + a prior),    n_s: how often s occurred among x_1 ... x_i

    Nothing but the symbols is sent, so this length includes what a table costs. The sum of the
    logarithms has a closed form in the counts, so the order does not matter. With `prior` 1/2
    (Krichevsky and Trofimov) N symbols cost N H + (a - 1) / 2 log2 N + O(1) bits, where H is their
    order-0 entropy; with 1 (Laplace) exactly as many as a two-part code that names the counts by
    their index among all vectors of counts, then the sequence by its index among those with these
    counts. With groups, each starts anew: that is the price of a table of its own.

    Args:
      symbols: the symbols, integers, of any shape.
      alphabet: number of values a that a symbol can take.
      groups: index of the group of every symbol, integers that broadcast to the shape of `symbols`;
        None for one group.
      prior: what is added to every count, above 0.
    Returns:
      The length of all symbols together, in bits.
    Raises:
      ValueError: there are no symbols, more values occur than `alphabet` says, the shape of
        `groups` does not fit, or `prior` is not a positive number.

    Source: Krichevsky and Trofimov 1981, "The performance of universal encoding".

    >>> round(adaptive_bits(np.array([0, 1, 0]), 2, prior=1), 4)  # 1/2, 1/3, 2/4
    3.585
    """
    check_arguments(adaptive_bits, locals())
    if not 0 < alphabet < 2**1000 or not 0 < alphabet * prior < math.inf:
        raise ValueError(
            "prior must be above 0 and its product with alphabet finite, got "
            f"{prior} and {alphabet}"
        )
    table = contingency(symbols, groups)
    occur = len(np.unique(table.indices))
    if occur > alphabet:
        raise ValueError(f"alphabet is {alphabet}, but {occur} different symbols occur")
    of_groups = _log_rising(alphabet * prior, table.sum(1))
    return float(of_groups.sum() - _log_rising(prior, table.data).sum()) / LN2


def _log_rising(start: float, steps: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return ln(start (start + 1) ... (start + steps - 1))."""
    if start < STIRLING:
        return special.gammaln(start + steps) - special.gammaln(start)
    end = start + steps  # the difference of two large numbers, by Stirling's series
    rest = (1 / end - 1 / start) / 12
    return (end - 0.5) * np.log1p(steps / start) + steps * (math.log(start) - 1) + rest


def _number(name: str, value: Any) -> float:
    try:
        found = int(value) if isinstance(value, numbers.Integral) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, str) or not 0 <= found < math.inf:
        raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}")
    return found
