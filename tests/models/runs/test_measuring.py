"""Times of work and of compiling, apart; peak memory; the help that the commands print."""

import time

import click
import jax
import jax.numpy as jnp
import pytest

from jaxquant_models.cli.commands import cli
from jaxquant_models.runs.measuring import Phase, _Spans, peak_memory, return_freed_memory


def test_spans_that_lie_in_one_another_count_once():
    spans = _Spans()
    for start, end in [(1, 2), (3, 4), (0.5, 4.5), (4, 5), (7, 8)]:
        spans.add(start, end)
    assert spans.seconds == 5.5


def test_compiling_is_apart_from_work():
    def slow_to_trace(x):
        time.sleep(0.3)
        return jax.jit(lambda x: x + 1)(x)

    run, phase = jax.jit(slow_to_trace), Phase(tokens=10)
    start = time.perf_counter()
    with phase.timed():
        run(jnp.ones(3)).block_until_ready()
    took = time.perf_counter() - start
    assert phase.compile_seconds >= 0.3 and 0 < phase.seconds <= took - phase.compile_seconds
    compiled = phase.compile_seconds
    with phase.timed():
        run(jnp.ones(3)).block_until_ready()
        time.sleep(0.2)
    assert phase.compile_seconds == compiled and phase.seconds >= 0.2
    assert phase.tokens_per_second == pytest.approx(10 / phase.seconds)
    assert Phase().tokens_per_second is None


def test_peak_memory_is_in_bytes():
    before = peak_memory()
    held = bytearray(before)  # written to below, so that it takes memory
    held[::4096] = b"1" * len(held[::4096])
    assert peak_memory() > 1.5 * before
    return_freed_memory()


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_is_whole_sentences(name):
    command = cli.commands[name]
    for option in (p for p in command.params if isinstance(p, click.Option)):
        assert option.help[0].isupper() or option.help.startswith(("qat ", "--"))
        assert option.help.endswith("."), option.name
        assert "; default" not in option.help and "default:" not in option.help, option.name
    assert command.help.strip().endswith(".")
