"""Rows of a suite about the texts that a model writes, beside those of the reference."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.theory.limits.generation import (
    EXCESS,
    FLUENT,
    GIBBERISH,
    SIGNIFICANT,
    TOLERATED,
    all_hold,
    judge_survives,
    loops_survive,
    paired_difference,
)
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.limits.repetition import distinct, loop, repeated, until_end

Texts = list[Int[np.ndarray, " t"]]


def ended(texts: Int[Array | np.ndarray, "p k"], end: Sequence[int]) -> Texts:
    """Return each text up to its stop token.

    Args:
      texts: token ids [p, k].
      end: ids of the stop tokens.
    """
    return [until_end(text, end) for text in np.asarray(texts)]


def mean_until_end(
    values: Float[Array | np.ndarray, "p k"],
    texts: Int[Array | np.ndarray, "p k"],
    end: Sequence[int],
) -> Float[np.ndarray, " p"]:
    """Return the mean value of each text's tokens, its stop token included.

    Args:
      values: a value for each token.
      texts: token ids.
      end: ids of the stop tokens.
    """
    lengths = [min(len(text) + 1, values.shape[1]) for text in ended(texts, end)]
    return np.array([np.mean(v[:n]) for v, n in zip(np.asarray(values), lengths, strict=True)])


def generation_limits(
    greedy: tuple[Texts, Texts],
    sampled: tuple[Texts, Texts],
    judged: tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]],
    name: str,
) -> tuple[Limit, ...]:
    """Judge the generated texts of a model.

    Args:
      greedy: greedy texts of the model, and of the reference, for the same prompts.
      sampled: texts sampled at temperature 1 with the same random keys, likewise.
      judged: mean negative log-likelihood of the sampled texts under the reference, likewise.
      name: name of the model.
    """
    looping = lambda texts: np.array([loop(text) is not None for text in texts])
    loops = loops_survive(looping(sampled[0]), looping(sampled[1]))
    judge = judge_survives(*judged)
    rows = [
        Limit(
            "generation survival",
            f"Sampled texts of {name} neither loop nor turn into gibberish.",
            "survival",
            None,
            None,
            all_hold(loops.holds, judge.holds),
            note="Decided by 'sampled loops' and 'judged by the reference': both must survive, and "
            "the collapse of one is enough.",
        ),
        Limit(
            "sampled loops",
            f"The share of texts sampled from {name} that end in a loop exceeds the reference's by "
            "at most the bound, with 95 % confidence.",
            "survival",
            loops.difference.mean,
            TOLERATED,
            loops.holds,
            note=f"{loops.note}. Collapsed is an excess of {EXCESS:g} or more with p below "
            f"{SIGNIFICANT:g}.",
        ),
        Limit(
            "judged by the reference",
            f"Texts sampled from {name} surprise the reference more than its own texts do, but by "
            "less than the bound, in nats per token, with 95 % confidence.",
            "survival",
            judge.difference.mean,
            FLUENT,
            judge.holds,
            note=f"{judge.note}. Collapsed is {GIBBERISH:g} nat or more with 99 % confidence.",
        ),
    ]
    greedy_loops = looping(greedy[0]), looping(greedy[1])
    rows.append(
        _described("greedy loops", "Share of greedy texts that end in a loop", greedy_loops)
    )
    for title, texts in (("greedy", greedy), ("sampled", sampled)):
        what = f"Mean share of repeated 4-grams (seq-rep-4) in {title} texts"
        values = [np.array([repeated(text) for text in of]) for of in texts]
        rows.append(_described(f"{title} seq-rep-4", what, values))
        rows.append(_distinct(title, texts))
    lengths = [np.array([len(text) for text in of]) for of in sampled]
    rows.append(_described("sampled length", "Mean length of sampled texts in tokens", lengths))
    return tuple(rows)


def _described(name: str, what: str, values: Sequence[np.ndarray]) -> Limit:
    model, reference = (v.astype(float) for v in values)
    d = paired_difference(model, reference)
    return _row(name, what, float(model.mean()), float(reference.mean()), (d.low, d.high))


def _distinct(title: str, texts: tuple[Texts, Texts]) -> Limit:
    what = f"Distinct 2-grams over tokens (distinct-2) of all {title} texts"
    return _row(f"{title} distinct-2", what, distinct(texts[0]), distinct(texts[1]), None)


def _row(
    name: str, what: str, model: float, reference: float, interval: tuple[float, float] | None
) -> Limit:
    note = ""
    if interval is not None:
        low, high = interval
        differs = ", which excludes 0" if low > 0 or high < 0 else ""
        note = (
            f"Difference {model - reference:+.3g}, 95 % interval [{low:.3g}, {high:.3g}]{differs}."
        )
    statement = f"{what}; the bound is that of the reference."
    return Limit(name, statement, "description", model, reference, None, note=note)
