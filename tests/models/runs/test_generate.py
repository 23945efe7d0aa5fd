"""Generation against a naive loop, and how often it compiles."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxquant_models import load
from jaxquant_models.runs.generate import generate
from tests.support.tiny_llama import FAMILIES, forward, random_tensors, write_folder

HF = FAMILIES["qwen3"] | {"eos_token_id": None}
TENSORS = random_tensors(HF)
PROMPT = np.random.default_rng(2).integers(0, 256, 40).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("m") / "m", HF, TENSORS))


def naive(prompt, max_tokens):
    """Greedy: the whole sequence again for each token, no cache, no padding, in NumPy."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(forward(HF, TENSORS, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 32, 33])
def test_greedy_equals_the_naive_loop(tiny, length):
    got = generate(tiny.apply_cached, tiny.params, tiny.config, PROMPT[:length], 8)
    assert got == naive(PROMPT[:length], 8)


def test_it_stops_at_the_end_token(tiny):
    free = generate(tiny.apply_cached, tiny.params, tiny.config, PROMPT[:5], 12)
    for stop in (0, 4):
        config = dataclasses.replace(tiny.config, eos_ids=(9999, free[stop]))
        expected = free[: free.index(free[stop])]
        assert generate(tiny.apply_cached, tiny.params, config, PROMPT[:5], 12) == expected


def test_max_tokens_is_exact(tiny):
    run = lambda n: generate(tiny.apply_cached, tiny.params, tiny.config, PROMPT[:5], n)
    longest = run(33)
    assert len(longest) == 33
    for n in (0, 1, 2, 32):
        assert run(n) == longest[:n]


def test_compiles_once_for_each_bucket(tiny):
    traces = []

    def counted(params, tokens, cache):
        traces.append(tokens.shape)
        return tiny.apply_cached(params, tokens, cache)

    run = lambda *args: generate(counted, tiny.params, tiny.config, *args)
    run(PROMPT[:3], 4)
    first = len(traces)
    run(PROMPT[:32], 32, 0.7, jax.random.key(1))
    run(PROMPT[:9], 1)
    assert len(traces) == first
    assert set(traces) == {(1, 32), (1, 1)}
    run(PROMPT[:33], 4)
    assert len(traces) == 2 * first


def test_sampling_follows_the_key_and_the_temperature(tiny):
    run = lambda t, seed: generate(
        tiny.apply_cached, tiny.params, tiny.config, PROMPT[:5], 20, t, jax.random.key(seed)
    )
    assert run(1.0, 0) == run(1.0, 0)
    assert run(1.0, 0) != run(1.0, 1)
    assert run(1e-6, 0) == run(0.0, 1)


def test_sampled_frequencies_are_softmax(tiny):
    """The first token over many keys; the bound is five standard deviations of a count."""
    temperature, n = 0.5, 400
    p = np.exp(forward(HF, TENSORS, PROMPT[:5])[-1] / temperature)
    p = p / p.sum()
    draws = [
        generate(
            tiny.apply_cached, tiny.params, tiny.config, PROMPT[:5], 1, temperature,
            jax.random.key(seed),
        )[0]
        for seed in range(n)
    ]  # fmt: skip
    top = int(p.argmax())
    assert abs(draws.count(top) / n - p[top]) < 5 * np.sqrt(p[top] * (1 - p[top]) / n)
    assert p[top] < 0.9  # else greedy would pass too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [0, 261]}, r"token ids must lie in \[0, 261\)"),
        ({"prompt_ids": [-1]}, r"token ids must lie in \[0, 261\)"),
        ({"max_tokens": -1}, "max_tokens must not be negative, got -1"),
        ({"max_tokens": 254}, r"prompt \(3\) and max_tokens \(254\) exceed the model's 256"),
        ({"temperature": -1.0}, "temperature must be finite and not negative"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative"),
        ({"temperature": 1.0}, "needs a key"),
    ],
)
def test_wrong_arguments(tiny, change, message):
    arguments = {"prompt_ids": [1, 2, 3], "max_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        generate(tiny.apply_cached, tiny.params, tiny.config, **arguments)
