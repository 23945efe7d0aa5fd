"""The time of a token that the memory wall compares with its bound."""

import itertools
import types

import pytest

from tests.benchmarks import memory_wall


def test_other_programs_never_make_a_token_faster(monkeypatch):
    """Steps of 1 ms, runs that others delay: the time is the least delayed run's, above 1 ms."""
    delays = itertools.chain([9.0, 0.5, 0.2], itertools.repeat(0.3))

    class Delayed:
        def __init__(self, *_):
            self.decode = types.SimpleNamespace(tokens=0, seconds=0.0)

        def stream(self, prompt, count):
            self.decode.tokens = count - 1
            self.decode.seconds = 1e-3 * (count - 1) + next(delays)
            yield [0]
            yield [0] * (count - 1)

    monkeypatch.setattr(memory_wall, "Session", Delayed)
    model = types.SimpleNamespace(apply_cached=lambda *_: None, config=None)
    found, steps = memory_wall.seconds_per_token(model, {}), memory_wall.TOKENS - 1
    assert found == pytest.approx(1e-3 + 0.2 / steps) and found > 1e-3


def test_the_context_is_the_mean_of_the_steps():
    first = len(memory_wall.PROMPT)
    caches = range(first, first + memory_wall.TOKENS - 1)
    assert sum(caches) / len(caches) == memory_wall.CONTEXT
