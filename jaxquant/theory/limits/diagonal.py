"""A target on which each of several predictors is wrong: the diagonal argument on a finite set.

For predictors h_0 ... h_{V-1} of one bit and n inputs s_i, the target

    f(s_i) = 1 - h_{i mod V}(s_i)

makes each predictor wrong on at least floor(n / V) inputs. It follows from the construction, so it
says nothing about natural questions, and the target depends on the predictors. The number of errors
has content, because

    errors_v = n_v + #{i not of v: h_v(s_i) = h_{i mod V}(s_i)},   n_v = #{i: i mod V = v}:

it is n if all predictors are one function, and about n / V + (n - n / V) / 2 if they are unrelated.

One bit is essential: with more labels than predictors, a single label outside of all predictions
would make every predictor wrong on every input.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.number_checks import finite


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """How often each predictor is wrong on the diagonal target.

    Attributes:
      inputs: number of inputs.
      errors: number of errors of each predictor, when it is evaluated a second time.
      least: floor(inputs / predictors), the number that each must reach.
      changed: number of (predictor, input) pairs whose two evaluations differ.
      agreement: for each pair of predictors, the share of inputs on which they agree.
    """

    inputs: int
    errors: tuple[int, ...]
    least: int
    changed: int
    agreement: tuple[tuple[float, ...], ...]

    def limits(self) -> tuple[Limit, ...]:
        """Return the theorem as a row of a suite."""
        statement = (
            f"A target that is built to contradict each of {len(self.errors)} predictors in turn "
            f"makes each of them wrong on at least {self.least} of {self.inputs} inputs; measured "
            "are the errors of the best one."
        )
        holds = self.changed == 0 and min(self.errors) >= self.least
        off = [a for v, row in enumerate(self.agreement) for a in row[v + 1 :]]
        note = f"The predictors agree on {sum(off) / len(off):.0%} of the inputs on average."
        if self.changed:
            note = f"A predictor is not a function: {self.changed} evaluations changed. {note}"
        measured = min(self.errors)
        return (Limit("diagonal", statement, "theorem", measured, self.least, holds, note=note),)


def prefers(
    logits: Float[Array | np.ndarray, "n vocabulary"],
    first: Int[Array | np.ndarray, "n"],
    second: Int[Array | np.ndarray, "n"],
) -> Bool[np.ndarray, "n"]:
    """Return whether each row of logits prefers its first token to its second.

    This makes a one-bit predictor of a language model. Take for the two tokens of each input the
    most likely ones of a single model, so that the question is a close one.

    Args:
      logits: [n, vocabulary], finite at the tokens.
      first: tokens [n].
      second: tokens [n].
    Returns:
      Answers [n].
    Raises:
      ValueError: shapes do not match, a token is outside of the vocabulary, or a logit is not
        finite.

    >>> prefers(np.array([[1.0, 2.0, 0.0]]), np.array([0]), np.array([1])).tolist()
    [False]
    """
    check_arguments(prefers, locals())
    z, a, b = np.asarray(logits), np.asarray(first), np.asarray(second)
    if z.ndim != 2 or a.shape != z.shape[:1] or b.shape != a.shape:
        raise ValueError(
            f"expected logits [n, vocabulary] and two lists of n tokens, got shapes "
            f"{list(z.shape)}, {list(a.shape)} and {list(b.shape)}"
        )
    if a.size and not (min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) < z.shape[1]):
        raise ValueError(f"tokens must be 0 to {z.shape[1] - 1}, got others")
    rows = np.arange(len(z))
    return finite(z[rows, a], "logits") > finite(z[rows, b], "logits")


def diagonal_adversary(
    predictors: Sequence[Callable[[Any], Bool[Array | np.ndarray, "n"]]], inputs: Any
) -> Diagonal:
    """Build the diagonal target from one evaluation of predictors, and count errors in a second.

    Args:
      predictors: two or more functions from the inputs to n answers of one bit (booleans, or the
        integers 0 and 1).
      inputs: what each predictor takes, the same for all.
    Returns:
      The counts.
    Raises:
      ValueError: there are fewer than two predictors, fewer inputs than predictors, the answers
        are not [n] bits, or their numbers differ.
    Source:
      arXiv:2511.12869, theorems 1 and 2, on a finite set of inputs.

    >>> constant = [lambda x: x > 9, lambda x: x < 9]
    >>> diagonal_adversary(constant, np.arange(4)).errors
    (2, 2)
    """
    check_arguments(diagonal_adversary, locals())
    if len(predictors) < 2:
        raise ValueError(f"expected two predictors or more, got {len(predictors)}")
    first = np.stack(_same_size([_bits(h(inputs), v) for v, h in enumerate(predictors)]))
    second = np.stack(_same_size([_bits(h(inputs), v) for v, h in enumerate(predictors)]))
    if first.shape != second.shape:
        raise ValueError(
            f"predictors answered {first.shape[1]} inputs at first, then {second.shape[1]}"
        )
    count, n = first.shape
    if n < count:
        raise ValueError(f"expected at least as many inputs as predictors, got {n} for {count}")
    each = np.arange(n)
    target = ~first[each % count, each]
    errors = (second != target).sum(1)
    same = (first[:, None] == first[None]).mean(-1)
    return Diagonal(
        inputs=n,
        errors=tuple(map(int, errors)),
        least=n // count,
        changed=int((first != second).sum()),
        agreement=tuple(tuple(map(float, row)) for row in same),
    )


def _bits(answers: Any, index: int) -> Bool[np.ndarray, "n"]:
    found = np.asarray(answers)
    whole = found.dtype == np.bool_ or np.issubdtype(found.dtype, np.integer)
    if found.ndim != 1 or not whole or not np.isin(found, (0, 1)).all():
        raise ValueError(
            f"predictor {index} must return [n] booleans, or integers 0 and 1, got "
            f"{found.dtype}{list(found.shape)}"
        )
    return found.astype(bool)


def _same_size(answers: list[Bool[np.ndarray, "n"]]) -> list[Bool[np.ndarray, "n"]]:
    sizes = sorted({a.size for a in answers})
    if len(sizes) > 1:
        raise ValueError(f"predictors must answer all inputs, got {sizes} answers")
    return answers
