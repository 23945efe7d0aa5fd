"""Evaluation: perplexity, KL divergence from a teacher, top-1 agreement; one chunk at a time."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

Logits = Callable[[PyTree, Array], Array]


class ByChunk(NamedTuple):
    """Parameters that depend on the chunk, such as those of a model that was run in advance.

    Attributes:
      of: function from the number of a chunk to the parameters for it.
    """

    of: Callable[[int], PyTree]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores over the evaluated tokens.

    Attributes:
      perplexity: exp(nll), with nll capped at 700.
      tokens_scored: number of predicted tokens.
      nll: mean negative log-likelihood, in nats per token.
      kl: mean KL(teacher || model), in nats per token; None without a teacher.
      top1_agreement: fraction of tokens for which model and teacher rank the same token first; None
        without a teacher.
    """

    perplexity: float
    tokens_scored: int
    nll: float
    kl: float | None = None
    top1_agreement: float | None = None


def chunk(tokens: Any, ctx: int, chunks: int | None = None) -> np.ndarray:
    """Split a token sequence into consecutive chunks; tokens that do not fill a chunk are dropped.

    Args:
      tokens: token ids, a sequence of integers.
      ctx: tokens per chunk, at least 4.
      chunks: largest number of chunks to return; None for all.

    Returns:
      Token ids [N, ctx], int32.

    Raises:
      ValueError: `ctx` is below 4, `chunks` is below 1, or there are fewer tokens than one chunk
        needs.

    >>> chunk(range(9), 4).tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    check_sizes(ctx, chunks)
    tokens = np.asarray(tokens, np.int32)
    count = len(tokens) // ctx
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens; one chunk needs {ctx}")
    return tokens[: count * ctx].reshape(count, ctx)[:chunks]


def check_sizes(ctx: int, chunks: int | None) -> None:
    """Raise ValueError if `ctx` is below 4 or `chunks` is below 1."""
    if ctx < 4:
        raise ValueError(f"ctx must be at least 4, got {ctx}")
    if chunks is not None and chunks < 1:
        raise ValueError(f"the number of chunks must be positive, got {chunks}")


def evaluate(
    logits: Logits,
    params: PyTree,
    chunks: np.ndarray,
    *,
    against: tuple[Logits, PyTree] | None = None,
    first: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score the second half of every chunk, as llama.cpp's perplexity tool does.

    The logits at positions ctx // 2 to ctx - 2 each predict the next token.

    Args:
      logits: the model, a function (params, tokens [1, ctx]) -> [1, ctx, vocabulary]; wrap it in
        `jaxquant.quantized` if `params` contains stand-ins.
      params: parameters of the model; or `ByChunk`, if they depend on the chunk.
      chunks: token ids [N, ctx], as `jaxquant.evaluation.chunk` makes them.
      against: (logits, params) of the teacher, likewise, for KL and agreement; None for no teacher.
      first: first position whose logits are scored. Default: ctx // 2.
      progress: called with the number of chunks done, after each chunk.

    Returns:
      An `Evaluation`.

    Raises:
      ValueError: there are no chunks, `first` leaves nothing to score, ids are outside the
        vocabulary, the likelihood is not finite, or the teacher has a different vocabulary.

    >>> import jax
    >>> uniform = lambda p, x: jnp.zeros((*x.shape, 8))
    >>> round(evaluate(uniform, None, chunk(range(8), 8)).perplexity, 4)
    8.0
    """
    if len(chunks) == 0:
        raise ValueError("expected at least one chunk, got none")
    first = chunks.shape[1] // 2 if first is None else first
    if not 0 <= first < chunks.shape[1] - 1:
        raise ValueError(f"first must be in [0, {chunks.shape[1] - 1}), got {first}")
    step = jax.jit(lambda p, t, x: _score(logits, against and against[0], p, t, x, first))
    teacher = against[1] if against else None
    of = lambda params, i: params.of(i) if isinstance(params, ByChunk) else params
    totals = np.zeros(3)
    for i, tokens in enumerate(chunks):
        *sums, vocabulary = np.asarray(
            step(of(params, i), of(teacher, i), jnp.asarray(tokens)[None]), np.float64
        )
        if not 0 <= np.min(tokens) <= np.max(tokens) < vocabulary:
            raise ValueError(
                f"token ids must lie in [0, {vocabulary:.0f}), the logits' vocabulary; chunk {i} "
                f"has ids from {np.min(tokens)} to {np.max(tokens)}"
            )
        totals += sums
        if not np.all(np.isfinite(totals)):
            raise ValueError(
                f"the likelihood of chunk {i} is not finite: the model returned NaN, or "
                "probability 0 for a token"
            )
        if progress is not None:
            progress(i + 1)
    count = len(chunks) * (chunks.shape[1] - first - 1)
    nll, kl, agree = totals / count
    more = (float(kl), float(agree)) if against else (None, None)
    return Evaluation(math.exp(min(nll, 700.0)), count, float(nll), *more)


def _score(
    logits: Logits, teacher: Logits | None, params: PyTree, other: PyTree, x: Array, first: int
) -> Array:
    """Return the sums over one chunk, and the vocabulary size.

    The sums are those of negative log-likelihood, KL and agreements.
    """
    log_p = _log_probabilities(logits, params, x, first)
    nll = -jnp.sum(jnp.take_along_axis(log_p, x[0, first + 1 :, None], axis=-1))
    vocabulary = jnp.float32(log_p.shape[-1])
    if teacher is None:
        return jnp.stack([nll, jnp.zeros(()), jnp.zeros(()), vocabulary])
    log_t = _log_probabilities(teacher, other, x, first)
    if log_t.shape != log_p.shape:
        raise ValueError(
            "the teacher and the model must have vocabularies of one size, got "
            f"{log_t.shape[1]} and {log_p.shape[1]} tokens"
        )
    p = jnp.exp(log_t)  # 0 where -inf masks padding of the vocabulary
    kl = jnp.sum(jnp.where(p > 0, p * (log_t - log_p), 0.0))
    agree = jnp.sum(jnp.argmax(log_p, -1) == jnp.argmax(log_t, -1))
    return jnp.stack([nll, kl, agree, vocabulary])


def _log_probabilities(logits: Logits, params: PyTree, x: Array, first: int) -> Array:
    return jax.nn.log_softmax(logits(params, x)[0, first:-1].astype(jnp.float32))
