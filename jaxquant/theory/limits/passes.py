"""Compiled passes of language models that several limits share; logits are reduced row by row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant.theory.limits.subject import Functions, Inside, Reduce


class Scores(NamedTuple):
    """Two models' predictions of the tokens 1, 2, ... of sequences [b, t]; arrays [b, t - 1].

    Attributes:
      nll, other_nll: negative log-likelihood of the token, of the first and the second model.
      top, other_top: the likeliest token.
      gap, other_gap: the largest logit minus the second largest.
      change: max - min of the second model's logits minus the first's.
      kl: KL(first | second), in nats.
      distance: total variation distance.
    """

    nll: Float[Array | np.ndarray, "b t"]
    other_nll: Float[Array | np.ndarray, "b t"]
    top: Int[Array | np.ndarray, "b t"]
    other_top: Int[Array | np.ndarray, "b t"]
    gap: Float[Array | np.ndarray, "b t"]
    other_gap: Float[Array | np.ndarray, "b t"]
    change: Float[Array | np.ndarray, "b t"]
    kl: Float[Array | np.ndarray, "b t"]
    distance: Float[Array | np.ndarray, "b t"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def scored(
    first: Functions, second: Functions, params: PyTree, other: PyTree, tokens: Int[Array, "b t"]
) -> Scores:
    """Return what two models predict on the same sequences, one sequence at a time.

    Args:
      first, second: the models' functions.
      params, other: their parameters.
      tokens: token ids [b, t].
    """

    def of_row(row: Array) -> Scores:
        z = first.apply(params, row[None])[0, :-1].astype(jnp.float32)
        w = second.apply(other, row[None])[0, :-1].astype(jnp.float32)
        log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(w)
        p, change = jnp.exp(log_p), w - z
        said = lambda a: -jnp.take_along_axis(a, row[1:, None], axis=-1)[:, 0]
        return Scores(
            said(log_p),
            said(log_q),
            z.argmax(-1),
            w.argmax(-1),
            _gap(z),
            _gap(w),
            change.max(-1) - change.min(-1),
            jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), -1),
            0.5 * jnp.abs(p - jnp.exp(log_q)).sum(-1),
        )

    return jax.lax.map(of_row, tokens)


@functools.partial(jax.jit, static_argnums=0)
def likelihoods(
    functions: Functions, params: PyTree, tokens: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """Return the negative log-likelihood of the tokens 1, 2, ... of sequences [b, t - 1].

    Args:
      functions: the model's functions.
      params: its parameters.
      tokens: token ids [b, t].
    """

    def of_row(row: Array) -> Array:
        log_p = jax.nn.log_softmax(functions.apply(params, row[None])[0, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(log_p, row[1:, None], axis=-1)[:, 0]

    return jax.lax.map(of_row, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def generated(
    functions: Functions,
    length: int,
    params: PyTree,
    prompts: Int[Array, "b p"],
    keys: Array,
    sampled: bool | Array,
) -> Int[Array, "b {length}"]:
    """Return continuations of a batch of prompts; stop tokens do not end them.

    Args:
      functions: the model's functions.
      length: number of tokens to generate.
      params: the model's parameters.
      prompts: token ids [b, p], p 2 or more.
      keys: one random key per step; two models given the same keys get the same Gumbel noise.
      sampled: whether to sample at temperature 1 rather than take the likeliest token.
    """
    b, p = prompts.shape
    # The logits of all prompt tokens but the last are not used, so that they are not computed.
    _, cache = functions.apply_cached(
        params, prompts[:, :-1], functions.init_cache(b, p - 1 + length)
    )
    draw = lambda key, z: jax.random.categorical(key, z).astype(jnp.int32)
    likeliest = lambda _, z: z.argmax(-1).astype(jnp.int32)

    def step(state: tuple, key: Array) -> tuple:
        tokens, cache = state
        logits, cache = functions.apply_cached(params, tokens[:, None], cache)
        tokens = jax.lax.cond(sampled, draw, likeliest, key, logits[:, 0].astype(jnp.float32))
        return (tokens, cache), tokens

    return jax.lax.scan(step, (prompts[:, -1].astype(jnp.int32), cache), keys)[1].T


@functools.partial(jax.jit, static_argnums=(0, 1))
def recalled(
    functions: Functions,
    skip: int,
    params: PyTree,
    context: Int[Array, " t"],
    passages: Int[Array, "n q"],
) -> Float[Array, " n"]:
    """Return the mean negative log-likelihood of each passage after a context, in nats per token.

    Args:
      functions: the model's functions.
      skip: number of tokens at the beginning of a passage that are not scored, 1 or more.
      params: the model's parameters.
      context: token ids [t].
      passages: token ids [n, q]; each follows the context alone.
    """
    q = passages.shape[1]
    empty = functions.init_cache(1, len(context) + q)
    _, cache = functions.apply_cached(params, context[None], empty)

    def of_passage(passage: Array) -> Array:
        logits, _ = functions.apply_cached(params, passage[None], cache)
        log_p = jax.nn.log_softmax(logits[0, skip - 1 : -1].astype(jnp.float32))
        return -jnp.take_along_axis(log_p, passage[skip:, None], axis=-1).mean()

    return jax.lax.map(of_passage, passages)


@functools.partial(jax.jit, static_argnums=(0, 1))
def looked_inside(
    functions: Functions, reduce: Reduce, params: PyTree, tokens: Int[Array, " t"]
) -> Inside:
    """Return the last states of a text, and its attention scores, reduced head by head.

    Args:
      functions: the model's functions.
      reduce: see `Functions`.
      params: the model's parameters.
      tokens: token ids [t].
    """
    return functions.inside(params, tokens, reduce)


@functools.partial(jax.jit, static_argnums=0)
def two_likeliest(
    functions: Functions, params: PyTree, tokens: Int[Array, " t"]
) -> Int[Array, "t 2"]:
    """Return the two likeliest tokens after each prefix of a text.

    Args:
      functions: the model's functions.
      params: the model's parameters.
      tokens: token ids [t].
    """
    return jax.lax.top_k(functions.apply(params, tokens[None])[0], 2)[1]


@functools.partial(jax.jit, static_argnums=0)
def prefers_first(
    functions: Functions, params: PyTree, tokens: Int[Array, " t"], pairs: Int[Array, "t 2"]
) -> Bool[Array, " t"]:
    """Return whether the first token of each pair is likelier than the second.

    Args:
      functions: the model's functions.
      params: the model's parameters.
      tokens: token ids [t].
      pairs: two token ids for each prefix [t, 2].
    """
    two = jnp.take_along_axis(functions.apply(params, tokens[None])[0], pairs, axis=-1)
    return two[:, 0] > two[:, 1]


def check_finite(scores: Scores, names: tuple[str, str]) -> None:
    """Raise ValueError if a model's predictions are not finite.

    Args:
      scores: the predictions of two models.
      names: their names.
    """
    for name, nll, gap in zip(
        names, (scores.nll, scores.other_nll), (scores.gap, scores.other_gap), strict=True
    ):
        good = np.isfinite(np.asarray(nll)) & np.isfinite(np.asarray(gap))
        if not good.all():
            row, place = np.argwhere(~good)[0]
            raise ValueError(
                f"the logits of {name} are not finite at token {place} of sequence {row}, and in "
                f"{(~good).mean():.0%} of the predictions: the weights hold NaN or infinities, or "
                "activations overflow"
            )


def _gap(z: Float[Array, "t V"]) -> Float[Array, " t"]:
    others = jnp.where(jnp.arange(z.shape[1]) == z.argmax(-1)[:, None], -jnp.inf, z)
    return z.max(-1) - others.max(-1)
