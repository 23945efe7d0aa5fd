"""The sections of a suite: which limits are checked, on what, and in which order."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant.theory.limits.associative import learned, recalls
from jaxquant.theory.limits.capacity import projected, random_separability, separability
from jaxquant.theory.limits.crowding import crowding
from jaxquant.theory.limits.diagonal import diagonal_adversary
from jaxquant.theory.limits.divergence import flips_of, unexplained
from jaxquant.theory.limits.divergence_limits import (
    certificate_limit,
    coupling_limit,
    flip_limits,
)
from jaxquant.theory.limits.exponents import power_laws, secants
from jaxquant.theory.limits.fact_floor import fact_capacity_limit
from jaxquant.theory.limits.generation_limits import ended, generation_limits, mean_until_end
from jaxquant.theory.limits.kalai_vempala import toy_world
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.limits.middle import middle_limits
from jaxquant.theory.limits.monofacts import monofacts
from jaxquant.theory.limits.pair import Pair
from jaxquant.theory.limits.passes import prefers_first, two_likeliest
from jaxquant.theory.limits.positions import collision_limit, range_limit, rope_positions
from jaxquant.theory.limits.rarity import rarity_limit
from jaxquant.theory.limits.retrieval import (
    Retrieval,
    monotone_limit,
    retrieval,
    rounded_documents,
)
from jaxquant.theory.limits.two_stages import chosen, two_stages

Rows = Sequence[Limit]

INPUTS = 256  # prefixes of the text on which the diagonal target is built
DIMENSIONS = 30  # of the points whose labelings are counted
FACTS, WEIGHTS = 600, 400  # of a memory: 1.5 facts per weight, which a perceptron can learn
LONGEST = 100_000  # tokens of the text whose n-grams are counted
FOUND = 10  # documents that count as found
TOY = "A toy: the model plays no part in it."
LAWS = (1.0, 3.0), (0.3, 0.08)  # coefficients and exponents of two modalities


def _key(pair: Pair, name: str) -> Array:
    return jax.random.fold_in(pair.key, sum(name.encode()))


def diagonal(pair: Pair) -> Rows:
    """Judge predictors of one bit: which of the reference's two likeliest tokens comes first."""
    tokens = jnp.asarray(pair.chunks[0, :INPUTS], jnp.int32)
    others = [m for name, m in pair.reference.variants().items() if name != pair.model.name]
    made = [make() for make in others[: pair.effort.variants]]
    pairs = two_likeliest(pair.reference.functions, pair.params[0], tokens)
    subjects = (pair.reference, pair.model, *made)
    predictors = [
        lambda x, s=s: np.asarray(prefers_first(s.functions, s.params(), x, pairs))
        for s in subjects
    ]
    names = ", ".join(s.name for s in subjects)
    note = (
        f"The predictors are {names}: each says which of the two tokens that are likeliest to the "
        "reference it prefers."
    )
    return _noted(diagonal_adversary(predictors, tokens).limits(), note)


def capacity(pair: Pair) -> Rows:
    """Count separable labelings of random points and of the model's last states."""
    key, (states, _) = _key(pair, "capacity"), pair.inside[1]
    n = min(DIMENSIONS, states.shape[1] // 2, len(states) // 4)
    some = np.linspace(len(states) // 4, len(states) - 1, 2 * n).astype(int)
    points = projected(states[some], n, jax.random.fold_in(key, 1))
    trials = pair.effort.trials
    random = random_separability(2 * DIMENSIONS, DIMENSIONS, trials, jax.random.fold_in(key, 2))
    own = separability(points, trials, jax.random.fold_in(key, 3))
    name, what = "states in general position", f"projected hidden states of {pair.model.name}"
    bits, values = pair.model.stored_bits, pair.model.vocabulary
    return (
        *_noted(random.limits(), TOY),
        *_noted(own.limits(name, what), "Violated, they coincide or lie in few dimensions."),
        fact_capacity_limit(bits, values, owner=pair.model.name),
    )


def memory(pair: Pair) -> Rows:
    """Round memories of random facts."""
    keys = jax.random.split(_key(pair, "memory"), pair.effort.memories)
    return _noted(recalls([learned(FACTS, WEIGHTS, key) for key in keys]).limits(), TOY)


def facts(pair: Pair) -> Rows:
    """Measure what occurs once in the text, and what that means in a toy world."""
    tokens, keys = pair.tokens[:LONGEST], jax.random.split(_key(pair, "facts"), 3)
    scores = pair.on_text
    rare = rarity_limit(pair.tokens, pair.chunks[:, 1:], scores.other_nll - scores.nll)
    grams = [row for n in (1, 2) for row in monofacts(tokens, n, keys[n]).limits()]
    world = [row for model in toy_world(keys[0]) for row in model.limits()]
    return (*_noted(grams, "The text alone is measured."), rare, *_noted(world, TOY))


def attention(pair: Pair) -> Rows:
    """Compare margins of attention with the number of keys, in the model and its reference."""
    first = min(63, pair.effort.inside // 8)
    reference, model = (crowding(margins, first) for _, margins in pair.inside)
    rows = model.limits()
    base = reference.diluting
    statement = f"{rows[1].statement} The bound is the reference's share."
    return rows[0], dataclasses.replace(rows[1], bound=base, statement=statement)


def positions(pair: Pair) -> Rows:
    """Examine the rotary positions of the reference."""
    theta, count = pair.reference.frequencies, pair.reference.context
    angles = pair.reference.angles(min(count, 8192))
    note = "A property of the type, in which positions should not be stored."
    types = _noted([collision_limit(name) for name in ("bfloat16", "float16")], note)
    if theta is None or angles is None:
        return types
    return (*rope_positions(angles, theta).limits(), range_limit(theta, count), *types)


def divergence(pair: Pair) -> Rows:
    """Compare where texts part with what one pass over the reference's text says."""
    scores = pair.on_greedy
    text, free = pair.greedy
    flips = flips_of(text, scores.other_top)
    failed = unexplained(flips, text, free, scores.other_gap, pair.model.functions.tie)
    natural, distance = pair.on_text, pair.on_sampled.distance
    return (
        *flip_limits(flips, flips_of(text, free), failed, pair.model.name),
        certificate_limit(natural.gap, natural.change, natural.top != natural.other_top),
        coupling_limit(*pair.sampled, distance),
    )


def generation(pair: Pair) -> Rows:
    """Judge what the model writes."""
    end = pair.reference.end
    both = lambda texts: (ended(texts[1], end), ended(texts[0], end))
    own, other = pair.sampled
    nats = mean_until_end(pair.judged, other, end), mean_until_end(pair.on_sampled.nll, own, end)
    return generation_limits(both(pair.greedy), both(pair.sampled), nats, pair.model.name)


def middle(pair: Pair) -> Rows:
    """Measure what a passage that returns gains, by its depth."""
    reference, model = pair.gains
    return middle_limits(model, reference, pair.planted.at, pair.model.name)


def documents(pair: Pair) -> Rows:
    """Retrieve passages of the text from rounded vectors."""
    found, key = pair.reference.sentences(pair.effort.sentences), _key(pair, "documents")
    if found is None:
        statement = "Passages of the text are found by vectors of rounded numbers."
        note = "Not measured: there is no sentence encoder, or fewer than two passages."
        return (Limit("retrieval", statement, "description", None, None, None, note=note),)
    queries, whole = found
    gold, k = np.arange(len(queries)), max(1, min(FOUND, len(queries) // 4))
    by_bits: list[Retrieval] = []
    for bits, name in ((8, "8 bits"), (4, "4 bits"), (1, "1 bit")):
        rounded, errors = rounded_documents(whole, bits), _promised(whole, bits)
        by_bits.append(retrieval(queries, whole, rounded, gold, key, errors=errors, k=k, name=name))
    pairs = zip(by_bits[1:], by_bits, strict=False)
    best = chosen(queries @ whole.T, queries @ rounded_documents(whole, 1).T, gold, k)
    rows = (
        *(row for one in by_bits for row in one.limits()),
        *(monotone_limit(fewer, more) for fewer, more in pairs),
        *two_stages(by_bits[-1].hits, best).limits(),
    )
    return _noted(rows, "The vectors are those of a sentence encoder, not of the model.")


def exponents(pair: Pair) -> Rows:
    """Measure the slopes of a sum of two power laws, over sizes that show both."""
    del pair
    sizes = np.logspace(-8, 9, 60)
    return _noted(secants(sizes, power_laws(sizes, *LAWS), LAWS[1]).limits(), TOY)


def _promised(whole: np.ndarray, bits: int) -> np.ndarray | None:
    """Return the largest error of rounding each vector: half a step in every coordinate."""
    if bits == 1:
        return None
    step = np.abs(whole).max(1) / (2 ** (bits - 1) - 1)
    return 0.5 * step * np.sqrt(whole.shape[1]) * (1 + 1e-6)


def _noted(rows: Sequence[Limit], note: str) -> Rows:
    """Return rows whose notes also say something about all of them."""
    return [dataclasses.replace(row, note=f"{row.note} {note}".strip()) for row in rows]


SECTIONS: Mapping[str, Callable[[Pair], Rows]] = {
    "diagonal adversary": diagonal,
    "capacity": capacity,
    "memory": memory,
    "facts": facts,
    "attention": attention,
    "positions": positions,
    "divergence": divergence,
    "generation": generation,
    "passages by depth": middle,
    "retrieval": documents,
    "exponents": exponents,
}
