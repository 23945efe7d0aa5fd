"""Evaluation against float64 NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.evaluation import ByChunk, chunk, evaluate
from tests.support.arrays import draw


def model(params, x):
    return params[x]


def log_softmax(x):
    x = np.asarray(x, float)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_figures():
    p, t = draw(11, 11), draw(11, 11, seed=1)
    tokens = np.random.default_rng(2).integers(0, 11, 40)
    chunks = chunk(tokens, 8, 4)
    got = evaluate(model, p, chunks, against=(model, t))
    lp, lt = (log_softmax(np.asarray(a)[chunks[:, 4:7]]) for a in (p, t))
    nll = -np.mean(np.take_along_axis(lp, chunks[:, 5:8, None], -1))
    assert got.tokens_scored == 4 * 3
    assert got.perplexity == pytest.approx(np.exp(nll), rel=1e-5)
    assert got.kl == pytest.approx(np.mean(np.sum(np.exp(lt) * (lt - lp), -1)), rel=1e-4)
    assert got.top1_agreement == pytest.approx(np.mean(lp.argmax(-1) == lt.argmax(-1)))
    same = evaluate(model, p, chunks, against=(model, p))
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1_agreement == 1


def test_one_compilation():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return params[x]

    evaluate(counted, draw(11, 11), chunk(np.zeros(40, int), 8))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((range(7), 8), "has 7 tokens; one chunk needs 8"),
        (([], 8), "has 0 tokens"),
        ((range(9), 3), "ctx must be at least 4"),
        ((range(9), 8, 0), "must be positive"),
    ],
)
def test_bad_sizes(args, message):
    with pytest.raises(ValueError, match=message):
        chunk(*args)


def test_uniform_model_has_perplexity_of_its_vocabulary():
    got = evaluate(lambda p, x: jnp.zeros((*x.shape, 8)), None, chunk([0] * 16, 8))
    assert got.perplexity == pytest.approx(8)


def test_bad_logits_are_refused():
    chunks = chunk([0] * 16, 8)

    def flat(size, value=0.0):
        return lambda p, x: jnp.full((*x.shape, size), value)

    with pytest.raises(ValueError, match="chunk 0 is not finite"):
        evaluate(flat(8, jnp.nan), None, chunks)
    with pytest.raises(ValueError, match="vocabularies of one size, got 9 and 8"):
        evaluate(flat(8), None, chunks, against=(flat(9), None))
    with pytest.raises(ValueError, match="at least one chunk"):
        evaluate(flat(8), None, chunks[:0])


def test_a_masked_vocabulary_has_a_finite_kl():
    """Two of ten tokens are padding that the model masks by -inf."""
    masked = jnp.where(jnp.arange(10) < 8, 0.0, -jnp.inf)
    model = lambda p, x: jnp.broadcast_to(masked, (*x.shape, 10))
    got = evaluate(model, None, chunk([0] * 16, 8), against=(model, None))
    assert got.kl == 0
    assert got.perplexity == pytest.approx(8)


def test_parameters_that_can_be_called_are_parameters():
    """An Equinox module is; what depends on the chunk is said to."""
    table = eqx.nn.Embedding(8, 8, key=jax.random.key(0))
    logits = lambda table, x: jax.vmap(jax.vmap(table))(x)
    chunks = chunk(range(8), 4)
    want = evaluate(logits, table, chunks)
    other = lambda i: {"table": table, "x": jnp.asarray(chunks[i])[None]}
    got = evaluate(lambda p, _: logits(p["table"], p["x"]), ByChunk(other), chunks)
    assert (got.nll, got.tokens_scored) == (want.nll, want.tokens_scored)
