"""Retrieval from rounded vectors: the certificate by a loop, and roundings that break promises."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxquant.theory.limits.retrieval import (
    certified,
    monotone_limit,
    ranks,
    retrieval,
    rounded_documents,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
DOCUMENTS = unit(np.repeat(RNG.normal(size=(10, 48)), 20, 0) + 0.4 * RNG.normal(size=(200, 48)))
QUERIES = unit(DOCUMENTS + 0.02 * RNG.normal(size=(200, 48)))
GOLD = np.arange(200)


def at(bits, **options):
    rounded = rounded_documents(DOCUMENTS, bits)
    options = {"k": 1, "name": f"{bits} bits", **options}
    return retrieval(QUERIES, DOCUMENTS, rounded, GOLD, KEY, **options)


def test_ranks_and_recall_are_those_of_sorted_scores():
    order = np.argsort(-QUERIES @ DOCUMENTS.T, 1)
    place = (order == GOLD[:, None]).argmax(1)
    assert (ranks(QUERIES, DOCUMENTS, GOLD) == place).all()
    found = at(8, k=3)
    assert (found.reference_hits == (place < 3)).all()
    # An encoder that has collapsed finds nothing: ties count against it.
    assert ranks(QUERIES, np.ones((200, 48)), GOLD).tolist() == [199] * 200


@pytest.mark.parametrize("bits", [8, 6, 1])
def test_the_certificate_by_a_loop(bits):
    rounded = rounded_documents(DOCUMENTS, bits)
    eps = np.linalg.norm(DOCUMENTS - rounded, axis=1)
    found = certified(QUERIES, DOCUMENTS, eps)
    for i in range(20):
        s = [float(QUERIES[i] @ e) for e in DOCUMENTS]
        best = int(np.argmax(s))
        sure = all(s[best] - s[j] > eps[best] + eps[j] for j in range(200) if j != best)
        assert found[i] == sure
    assert at(bits).limits()[0].verdict == ("undecided" if bits == 1 else "holds")
    if bits > 1:  # the error that a step promises
        promised = np.abs(DOCUMENTS).max(1) / (2 ** (bits - 1) - 1) * np.sqrt(48) / 2
        assert (eps <= promised).all()
        assert at(bits, errors=promised).certified.sum() <= found.sum()


def test_eight_bits_survive_and_what_is_broken_collapses():
    assert [row.verdict for row in at(8).limits()] == ["holds", "survives"]
    assert at(8).recall > 0.9 > at(1).recall / at(8).recall
    assert at(1, tolerance=0.99).limits()[1].verdict == "collapsed"
    eps = np.linalg.norm(DOCUMENTS - rounded_documents(DOCUMENTS, 8), axis=1)
    permuted = np.roll(rounded_documents(DOCUMENTS, 8), 1, 0)
    lost = rounded_documents(DOCUMENTS, 8) * np.where(GOLD == 7, 50.0, 1.0)[:, None]  # a scale
    for broken in (permuted, lost):
        found = retrieval(QUERIES, DOCUMENTS, broken, GOLD, KEY, errors=eps, k=1)
        assert [row.verdict for row in found.limits()] == ["violated", "collapsed"]
        assert "certified answers changed" in found.limits()[0].note
    collapsed = retrieval(QUERIES, DOCUMENTS, np.ones((200, 48)), GOLD, KEY, k=1)
    assert [row.verdict for row in collapsed.limits()] == ["undecided", "collapsed"]
    nothing = retrieval(QUERIES, np.ones((200, 48)), np.ones((200, 48)), GOLD, KEY, k=1)
    assert nothing.limits()[1].verdict == "undecided"


def test_more_bits_find_no_less():
    eight, one = at(8), at(1)
    assert monotone_limit(one, eight).verdict == "holds" == monotone_limit(eight, eight).verdict
    swapped = dataclasses.replace(eight, name="1 bit"), dataclasses.replace(one, name="8 bits")
    assert monotone_limit(*swapped).verdict == "violated"


def test_one_bit_is_the_sign_at_the_best_scale():
    x = RNG.normal(size=(3, 64))
    error = lambda scale: np.sum((x - np.sign(x) * scale) ** 2)
    best = rounded_documents(x, 1)
    assert (np.sign(best) == np.sign(x)).all()
    means = np.abs(x).mean(1, keepdims=True)
    assert np.sum((x - best) ** 2) == pytest.approx(error(means))
    assert error(means) < min(error(means * 0.99), error(means * 1.01))
    assert rounded_documents(np.zeros((2, 4)), 8).tolist() == np.zeros((2, 4)).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks(np.zeros((0, 3)), DOCUMENTS, GOLD), "must not be empty"),
        (lambda: ranks(QUERIES * np.nan, DOCUMENTS, GOLD), "finite"),
        (lambda: ranks(QUERIES[:, :3], DOCUMENTS, GOLD), "one width"),
        (lambda: ranks(QUERIES, DOCUMENTS, GOLD + 1), "an integer from 0 to 199"),
        (lambda: ranks(QUERIES[0], DOCUMENTS, GOLD), r"queries \[n, d\]"),
        (lambda: certified(QUERIES, DOCUMENTS[:1], np.ones(1)), "two documents or more"),
        (lambda: certified(QUERIES, DOCUMENTS, -np.ones(200)), "nonnegative"),
        (lambda: rounded_documents(DOCUMENTS, 0), "bits must be 1 to 16"),
        (lambda: retrieval(QUERIES, DOCUMENTS, DOCUMENTS[:3], GOLD, KEY), "rounded documents"),
        (lambda: at(8, k=0), "k of 1 or more"),
        (lambda: at(8, tolerance=np.nan), "positive tolerance"),
        (lambda: monotone_limit(at(8), dataclasses.replace(at(8), hits=GOLD[:3] > 0)), "the same"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
