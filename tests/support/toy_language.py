"""A language model of a few lines in plain JAX, as `run_suite` examines one; and broken ones.

It attends with one head to the last tokens of its text and copies what followed the same token
before, so that a passage that returns is likelier. Nothing of `models` is used.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.theory.limits.subject import Functions, Inside, Sentences

V, D, CONTEXT = 40, 32, 160
THETA = 0.5 ** np.arange(D // 2)


def weights(seed=0, recall=3.0):
    """Embedding, bigram logits, and the strengths of recall and of all logits."""
    a, b = jax.random.split(jax.random.key(seed))
    unit = jax.random.normal(a, (V, D))
    unit /= jnp.linalg.norm(unit, axis=1, keepdims=True)
    table = 2.0 * jax.random.normal(b, (V, V))
    return {"embed": unit, "table": table, "recall": jnp.float32(recall), "heat": jnp.float32(1)}


def text(length=1500, seed=0):
    """Tokens from the model's own bigrams."""
    p = np.asarray(jax.nn.softmax(weights()["table"], -1), np.float64)
    rng, out = np.random.default_rng(seed), [0]
    while len(out) < length:
        out.append(int(rng.choice(V, p=p[out[-1]] / p[out[-1]].sum())))
    return np.array(out, np.int32)


def attended(params, queries, keys, at, recall=1.0):
    """Logits of queries at positions `at`, and scores, given all tokens' ids; -1 is no token."""
    seen = (jnp.arange(len(keys)) < at[:, None]) & (keys >= 0)
    e = params["embed"]
    scores = jnp.where(seen, 12 * e[queries] @ e[keys].T, -jnp.inf)
    share = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e9), -1), 0)
    follows = jax.nn.one_hot(jnp.roll(keys, -1), V)
    z = params["table"][queries] + recall * params["recall"] * share @ follows
    return params["heat"] * z, scores


def one(params, tokens):
    """Logits of one text."""
    return attended(params, tokens, tokens, jnp.arange(len(tokens)))[0]


def apply(params, tokens):
    """Logits of texts."""
    return jax.vmap(one, (None, 0))(params, tokens)


def init_cache(batch, size):
    """No tokens yet."""
    return jnp.full((batch, size), -1, jnp.int32), jnp.int32(0)


def cached(params, tokens, cache, recall=1.0):
    """Logits of further tokens of texts."""
    held, length = cache
    held = jax.lax.dynamic_update_slice(held, tokens.astype(jnp.int32), (0, length))
    at = length + jnp.arange(tokens.shape[1])
    z = jax.vmap(lambda q, k: attended(params, q, k, at, recall)[0])(tokens, held)
    return z, (held, length + tokens.shape[1])


def inside(params, tokens, reduce):
    """The states, and causal scores of one head."""
    t, e = len(tokens), params["embed"][tokens]
    scores = jnp.where(jnp.tri(t) > 0, 4 * e @ e.T, -jnp.inf)
    states = e + jnp.cumsum(e, 0) / jnp.arange(1, t + 1)[:, None]
    return Inside(states, jax.tree.map(lambda a: a[None, None], reduce(scores)))


FUNCTIONS = Functions(apply, cached, init_cache, inside)


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
    """The model as a subject."""

    stored: dict
    name: str = "toy"
    functions: Functions = FUNCTIONS
    tokens: np.ndarray = dataclasses.field(default_factory=text)
    vocabulary: int = V
    context: int = CONTEXT
    end: tuple[int, ...] = ()
    stored_bits: float = 32.0 * V * (V + D)
    frequencies: np.ndarray | None = dataclasses.field(default_factory=lambda: THETA)
    vectors: Callable | None = None

    def angles(self, count):
        return np.arange(count, dtype=np.float32)[:, None] * THETA.astype(np.float32)

    def params(self):
        return self.stored

    def variants(self):
        def rounded(bits):
            step = 8.0 / 2**bits
            table = jnp.round(self.stored["table"] / step) * step
            return dataclasses.replace(self, stored=self.stored | {"table": table}, name=f"{bits}b")

        return {f"{bits}b": lambda bits=bits: rounded(bits) for bits in (8, 3)}

    def sentences(self, count):
        if self.vectors is None:
            return None
        return Sentences(*self.vectors(count))
