"""The suite on a toy model in plain JAX: broken models flip the verdicts that they must flip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.durable.states import Remembered
from jaxquant.durable.store import Folder
from jaxquant.theory.limits import sections
from jaxquant.theory.limits.effort import EFFORTS, Effort
from jaxquant.theory.limits.pair import Pair
from jaxquant.theory.limits.suite import run_suite
from tests.support import toy_language as toy

SMALL = Effort(
    chunks=1, chunk=96, inside=150, contexts=3, context=120, passage=16, prompts=32, prompt=8,
    new=64, sentences=20, variants=1, trials=20, memories=1,
)  # fmt: skip
FLOAT = toy.Toy(toy.weights())


def model(**changed):
    return dataclasses.replace(FLOAT, stored=FLOAT.stored | changed, name="model")


def functions(**changed):
    return dataclasses.replace(FLOAT, functions=toy.FUNCTIONS._replace(**changed), name="model")


def rows(section, judged, reference=FLOAT):
    kept = Remembered(None, "", {})
    pair = Pair(reference, judged, SMALL, jax.random.key(0), kept, lambda name, seconds: None)
    return {row.name: row for row in section(pair)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    told, kept = [], Folder(tmp_path_factory.mktemp("suite"), {"effort": "small"})
    suite = run_suite(
        FLOAT, effort=SMALL, finished=kept, progress=lambda name, seconds: told.append(name)
    )
    return suite, told, kept


def test_a_whole_suite_holds(whole):
    suite, told, _ = whole
    assert set(sections.SECTIONS) <= set(told)
    for row in suite.rows:
        assert row.kind != "theorem" or row.holds in (True, None), row
        assert row.seconds > 0 and row.statement.endswith(".")
    assert suite.row("diagonal").measured >= 96 // 3
    statements = [row.statement for row in suite.rows]
    assert len(set(statements)) == len(statements)  # no two rows say the same
    assert "predictors are toy, 8b, 3b" in suite.row("diagonal").note
    assert suite.row("retrieval").verdict == "-"


def test_a_finished_suite_is_read_from_its_store(whole):
    suite, _, kept = whole
    again = run_suite(FLOAT, effort=SMALL, finished=kept, progress=lambda *_: pytest.fail("again"))
    assert again == suite


def test_a_killed_suite_continues(whole):
    class Killed(Exception):
        pass

    def until(name, _):
        if name == "sampled generation":
            raise Killed

    kept, told = {}, []
    with pytest.raises(Killed):
        run_suite(FLOAT, effort=SMALL, finished=kept, progress=until)
    found = run_suite(FLOAT, effort=SMALL, finished=kept, progress=lambda n, _: told.append(n))
    assert "greedy generation" not in told and "memory" not in told and "divergence" in told
    plain = lambda suite: [dataclasses.replace(row, seconds=0) for row in suite.rows]
    assert plain(found) == plain(whole[0])


def test_other_weights_are_not_read_from_the_store(whole):
    kept = dict(whole[2])
    told = []
    run_suite(model(recall=jnp.float32(2.5)), effort=SMALL, finished=kept,
              progress=lambda name, _: told.append(name))  # fmt: skip
    assert "greedy generation" in told


def uneven(order=None):
    """A model whose rows are sure or unsure of what follows; the scales of the rows in an order."""
    scales = jnp.exp(jax.random.normal(jax.random.key(5), (toy.V,)))
    scaled = FLOAT.stored["table"] * (scales if order is None else scales[order])[:, None]
    return model(table=scaled)


BROKEN = {
    "nothing": (model(), FLOAT, {}),
    "shuffled scales": (
        uneven(jax.random.permutation(jax.random.key(6), toy.V)),
        uneven(),
        {"judged by the reference": "collapsed", "generation survival": "collapsed"},
    ),
    "a model that loops": (
        model(heat=jnp.float32(10)),
        FLOAT,
        {"sampled loops": "collapsed", "generation survival": "collapsed"},
    ),
    "a model that does not look back": (
        model(recall=jnp.float32(0)),
        FLOAT,
        {"passage recall": "collapsed"},
    ),
    "a damaged cache": (
        functions(apply_cached=functools.partial(toy.cached, recall=0.0), tie=0.5),
        FLOAT,
        {"free running": "violated"},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_suite_flips_the_verdicts_that_it_must(name):
    judged, reference, flipped = BROKEN[name]
    suite = run_suite(judged, reference, effort=SMALL)
    verdicts = {row.name: row.verdict for row in suite.rows}
    assert {row: verdicts[row] for row in flipped} == flipped
    if not flipped:
        judging = [row.verdict for row in suite.rows if row.kind == "survival"]
        assert set(judging) == {"survives"}
        assert "violated" not in verdicts.values()


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["model", "toy"])
def test_a_suite_refuses_what_is_not_finite_before_it_measures(number, which):
    broken = dataclasses.replace(
        FLOAT, stored=FLOAT.stored | {"table": FLOAT.stored["table"].at[0, 5].set(number)},
        name=which,
    )  # fmt: skip
    pair = (broken, FLOAT) if which == "model" else (model(), broken)
    told = []
    with pytest.raises(ValueError, match=f"logits of {which} are not finite at token"):
        run_suite(*pair, effort=SMALL, progress=lambda name, _: told.append(name))
    assert told == ["scores of text"]


def test_a_model_equal_to_its_reference_survives():
    found = {**rows(sections.generation, model()), **rows(sections.middle, model())}
    assert {r.verdict for r in found.values() if r.kind == "survival"} == {"survives"}
    same = [r for n, r in found.items() if n.startswith(("greedy", "sampled seq"))]
    assert all(r.measured == r.bound for r in same)
    parted = rows(sections.divergence, model())
    assert parted["first divergence"].measured == SMALL.new
    assert parted["coupled sampling"].measured == 0 and parted["gap certificate"].measured == 0


def test_a_hot_head_loops_though_its_greedy_text_is_the_same():
    hot = model(heat=jnp.float32(10))
    found = rows(sections.generation, hot)
    assert found["sampled loops"].verdict == found["generation survival"].verdict == "collapsed"
    assert found["judged by the reference"].verdict == "survives"
    parted = rows(sections.divergence, hot)
    assert parted["first divergence"].measured == SMALL.new
    assert parted["coupled sampling"].verdict in ("holds", "undecided")


def test_gibberish_is_found_by_the_judge_and_not_by_loops():
    table = toy.weights(seed=9)["table"]
    found = rows(sections.generation, model(table=table))
    assert found["judged by the reference"].verdict == "collapsed"
    assert found["generation survival"].verdict == "collapsed"
    assert found["sampled loops"].verdict == "survives"


def test_a_model_that_does_not_look_back_loses_the_passages():
    found = rows(sections.middle, model(recall=jnp.float32(0)))
    assert found["passage recall"].verdict == "collapsed"
    assert rows(sections.generation, model(recall=jnp.float32(0)))  # which has verdicts of its own


def test_coarse_activations_decide_ties_that_float32_does_not():
    def coarse(params, tokens, cache):
        z, cache = toy.cached(params, tokens, cache)
        return z.astype(jnp.bfloat16).astype(jnp.float32), cache

    kept = Remembered(None, "", {})
    told = functions(apply_cached=coarse, tie=0.5)
    pair = Pair(FLOAT, told, SMALL, jax.random.key(0), kept, lambda name, seconds: None)
    assert sections.divergence(pair)[0].verdict == "holds"
    pair.model = FLOAT  # the tie of float32, on what has been computed
    assert sections.divergence(pair)[0].verdict == "violated"


def test_scores_without_a_causal_mask_break_the_identity():
    def unmasked(params, tokens, reduce):
        e = params["embed"][tokens]
        found = toy.inside(params, tokens, reduce)
        scores = 4 * e @ e.T
        return found._replace(heads=jax.tree.map(lambda a: a[None, None], reduce(scores)))

    assert rows(sections.attention, model())["attention identity"].verdict == "holds"
    broken = rows(sections.attention, functions(inside=unmasked))
    assert broken["attention identity"].verdict == "violated"


def test_collapsed_states_are_not_in_general_position():
    name = "states in general position"
    assert rows(sections.capacity, model())[name].verdict == "holds"
    same = jnp.broadcast_to(FLOAT.stored["embed"][0], (toy.V, toy.D))
    assert rows(sections.capacity, model(embed=same))[name].verdict == "violated"


def test_rounded_positions_break_the_rotary_kernel():
    class Rounded(toy.Toy):
        def angles(self, count):
            exact = jnp.arange(count, dtype=jnp.bfloat16).astype(jnp.float32)
            return np.asarray(exact)[:, None] * toy.THETA.astype(np.float32)

    reference = Rounded(FLOAT.stored, context=600)
    found = rows(sections.positions, model(), reference)
    assert found["rotary kernel"].verdict == found["rotary positions"].verdict == "violated"


def test_vectors_are_retrieved_from_few_bits_unless_they_collapsed():
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    documents = unit(rng.normal(size=(60, 64)))
    near = lambda count: (unit(documents + 0.05 * rng.normal(size=documents.shape)), documents)
    found = rows(sections.documents, model(), dataclasses.replace(FLOAT, vectors=near))
    assert found["retrieval, 8 bits"].verdict == "survives"
    assert found["retrieval certificate, 8 bits"].verdict == "holds"
    one = lambda count: (documents[:1].repeat(60, 0), documents[:1].repeat(60, 0))
    own = {row.note for row in found.values()}
    assert all("a sentence encoder, not of the model" in note for note in own)
    lost = rows(sections.documents, model(), dataclasses.replace(FLOAT, vectors=one))
    assert lost["retrieval, 8 bits"].verdict == "undecided"  # there is nothing to retain


def test_bad_input():
    nan = FLOAT.stored["table"].at[3, 5].set(jnp.nan)
    with pytest.raises(ValueError, match="logits of model are not finite at token"):
        rows(sections.divergence, model(table=nan))
    states = model(embed=FLOAT.stored["embed"].at[0].set(jnp.inf))
    with pytest.raises(ValueError, match="hidden states of model are not finite"):
        rows(sections.capacity, states)
    short = dataclasses.replace(FLOAT, tokens=FLOAT.tokens[:100])
    with pytest.raises(ValueError, match=r"has 100 tokens, and the limits need 408"):
        run_suite(short, effort=SMALL)
    with pytest.raises(ValueError, match="one vocabulary"):
        run_suite(dataclasses.replace(FLOAT, vocabulary=41), FLOAT, effort=SMALL)
    with pytest.raises(ValueError, match=r"must lie in \[0, 40\)"):
        run_suite(dataclasses.replace(FLOAT, tokens=FLOAT.tokens + 9), effort=SMALL)
    with pytest.raises(ValueError, match="between 2 tokens or more, got a vocabulary of 1"):
        run_suite(dataclasses.replace(FLOAT, vocabulary=1), effort=SMALL)

    class Bare(toy.Toy):
        def variants(self):
            return {}

    with pytest.raises(ValueError, match="pass the float model as `against`"):
        run_suite(Bare(FLOAT.stored), effort=SMALL)
    with pytest.raises(ValueError, match="prompts of an effort must be 2 or more, got 1"):
        dataclasses.replace(SMALL, prompts=1)
    with pytest.raises(ValueError, match="passage of an effort must be 2 or more, got 1"):
        dataclasses.replace(SMALL, contexts=30).within(64)
    with pytest.raises(ValueError, match="effort must be one of fast, default"):
        run_suite(FLOAT, effort="slow")
    with pytest.raises(ValueError, match="64 positions or more"):
        run_suite(dataclasses.replace(FLOAT, context=40), effort=SMALL)


@pytest.mark.parametrize("name", EFFORTS)
@pytest.mark.parametrize("positions", [64, 100, 256, 2048])
def test_efforts_fit_models_with_few_positions(name, positions):
    e = EFFORTS[name].within(positions)
    assert max(e.chunk, e.inside, e.prompt + e.new, e.context + e.passage) <= positions
    assert e.passage >= 4 and e.contexts * e.passage + 16 <= e.context and e.prompt >= 2
