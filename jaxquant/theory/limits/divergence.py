"""When two models' greedy texts part, from one pass over the text of the first.

Flips are a table [p, k], by prompt and step: whether the second model, which reads the greedy text
of the first, would continue it otherwise. As long as two models agree they read the same prefix, so
the first flip of a prompt is where the two texts part, exactly. Natural text has other rates.
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.arguments import check_arguments

TIE = 1e-3  # difference of two logits that the order of additions in float32 may decide


@dataclasses.dataclass(frozen=True, eq=False)
class Flips:
    """Flips of greedy choices, and what follows from them.

    Attributes:
      table: bool [p, k].

    Raises:
      ValueError: the table has no prompt or no step.

    >>> found = Flips(np.array([[0, 1, 1, 1], [0, 0, 0, 1]], bool))
    >>> found.rate, found.first.tolist(), found.survival.tolist()
    (0.5, [1, 3], [1.0, 1.0, 0.5, 0.5, 0.0])
    >>> found.chain.round(3).tolist(), found.boole.tolist()
    ([1.0, 0.5, 0.25, 0.125, 0.062], [1.0, 1.0, 0.5, 0.0, 0.0])
    """

    table: Bool[np.ndarray, "p k"]

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or not self.table.size:
            raise ValueError(
                f"expected flips [prompts, steps] of one or more of both, got shape "
                f"{list(self.table.shape)}"
            )

    @property
    def rate(self) -> float:
        """Share of flips, d, over all prompts and steps."""
        return float(self.table.mean())

    @property
    def first(self) -> Int[np.ndarray, " p"]:
        """Number of tokens before the texts part; k if they do not."""
        flips = self.table
        return np.where(flips.any(1), flips.argmax(1), flips.shape[1])

    @property
    def survival(self) -> Float[np.ndarray, " k+1"]:
        """S(k): share of prompts whose first k tokens agree, for k = 0, 1, ..."""
        kept = ~np.logical_or.accumulate(self.table, axis=1)
        return np.concatenate([[1.0], kept.mean(0)])

    @property
    def chain(self) -> Float[np.ndarray, " k+1"]:
        """(1 - d)^k.

        If flips are independent within a prompt, S(k) is at least this in expectation: prompts
        differ in their rates, and the mean of (1 - d_p)^k is no less than (1 - d)^k (Jensen).
        """
        return (1 - self.rate) ** np.arange(self.table.shape[1] + 1)

    @property
    def boole(self) -> Float[np.ndarray, " k+1"]:
        """1 - k d_k, d_k the rate of the first k steps, or 0: S(k) is at least this, always."""
        return np.concatenate([[1.0], np.maximum(1 - np.cumsum(self.table.mean(0)), 0.0)])

    @property
    def ceiling(self) -> Float[np.ndarray, " k+1"]:
        """1 - the largest rate of one of the first k steps: S(k) is at most this, always."""
        return np.concatenate([[1.0], 1 - np.maximum.accumulate(self.table.mean(0))])

    @property
    def hazard(self) -> float:
        """Texts that part over the steps at which they could: the rate of first flips.

        It equals the rate of flips if flips are independent and prompts alike. A model whose flips
        come in clusters has a lower hazard.
        """
        return float(
            self.table.any(1).sum() / np.minimum(self.first + 1, self.table.shape[1]).sum()
        )


def flips_of(
    text: Int[Array | np.ndarray, "p k"], choices: Int[Array | np.ndarray, "p k"]
) -> Flips:
    """Return the flips of a model that reads the greedy text of another.

    Args:
      text: the other model's greedy continuations, token ids [p, k].
      choices: the most likely token of the model at each of these places, given the text before.
    Raises:
      ValueError: the shapes differ, or are empty.

    >>> flips_of(np.array([[4, 5, 6]]), np.array([[4, 7, 6]])).table.tolist()
    [[False, True, False]]
    """
    check_arguments(flips_of, locals())
    a, b = np.asarray(text), np.asarray(choices)
    if a.shape != b.shape:
        raise ValueError(
            f"text and choices must have one shape, got {list(a.shape)} and {list(b.shape)}"
        )
    return Flips(a != b)


def unexplained(
    flips: Flips,
    text: Int[Array | np.ndarray, "p k"],
    free: Int[Array | np.ndarray, "p k"],
    gap: Float[Array | np.ndarray, "p k"],
    tie: float = TIE,
) -> Bool[np.ndarray, " p"]:
    """Return the prompts whose free greedy text parts elsewhere than flips say, without a tie.

    Both must part at the same step. Passes with and without a cache add in different orders, so a
    prompt is excused where the two likeliest tokens are nearly equal at the earlier step. What is
    left shows that generation and scoring do not compute the same function: a damaged or rounded
    cache, wrong positions after a prompt, or nondeterminism.

    Args:
      flips: flips of the model on the text of the other.
      text: the other model's greedy continuations [p, k].
      free: the model's own greedy continuations of the same prompts [p, k].
      gap: on `text`, the model's largest logit minus its second largest [p, k].
      tie: gap below which a prompt is excused.
    Returns:
      One bool per prompt.

    >>> flips = Flips(np.array([[False, True]]))
    >>> of = lambda free: unexplained(flips, np.array([[4, 5]]), np.array(free), np.ones((1, 2)))
    >>> of([[4, 9]]).tolist(), of([[8, 5]]).tolist()
    ([False], [True])
    """
    check_arguments(unexplained, locals())
    seen = flips_of(text, free).first
    told = flips.first
    k = flips.table.shape[1]
    at = np.minimum(np.minimum(seen, told), k - 1)
    near = np.take_along_axis(np.asarray(gap), at[:, None], axis=1)[:, 0] < tie
    return (seen != told) & ~near


def certified(
    gap: Float[Array | np.ndarray, "*p"],
    change: Float[Array | np.ndarray, "*p"],
    slack: float = 1e-5,
) -> Bool[np.ndarray, "*p"]:
    """Return where a change of the logits cannot change the likeliest token.

    For logits z and z + e, the likeliest token stays if gap(z) > max e - min e. This ignores what
    all logits have in common.

    Args:
      gap: largest logit minus second largest, of the first model.
      change: max e - min e at the same places.
      slack: relative rounding error of `change`, which is added to it.
    Raises:
      ValueError: the shapes differ.

    >>> certified(np.array([1.0, 1.0]), np.array([0.9, 1.1])).tolist()
    [True, False]
    """
    check_arguments(certified, locals())
    a, b = np.asarray(gap, np.float64), np.asarray(change, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"gap and change must have one shape, got {list(a.shape)} and {list(b.shape)}"
        )
    return a > b * (1 + slack)


def coupled_disagreement(distance: Float[Array | np.ndarray, "*p"]) -> Float[np.ndarray, "*p"]:
    """Return how often two models that sample with one random key may differ at most.

    `jax.random.categorical` adds Gumbel noise to logits and takes the largest sum. With the same
    noise for distributions p and q, P(both choose x) = 1 / sum_y max(p_y / p_x, q_y / q_x)
    >= min(p_x, q_x) / sum_y max(p_y, q_y). The sum over x is (1 - TV) / (1 + TV), so the choices
    differ with probability 2 TV / (1 + TV) at most.

    Args:
      distance: total variation distances TV, in [0, 1].
    Raises:
      ValueError: a distance is outside [0, 1].

    >>> coupled_disagreement(np.array([0.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    check_arguments(coupled_disagreement, locals())
    tv = np.asarray(distance, np.float64)
    if not ((tv >= 0) & (tv <= 1)).all():
        raise ValueError("total variation distances must lie in [0, 1]")
    return 2 * tv / (1 + tv)
