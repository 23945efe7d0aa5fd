"""Times of device programs, each call's weights fresh from memory.

A program calls a product once for each of several copies of its operands, which together exceed the
cache; x of a call takes an (infinitely small) part of the result before, so that calls come one
after the other. The time of a call is the median over repeats of the program's, over its calls.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

CACHE = 192 << 20  # bytes: more than any of today's caches
REPEATS = 9


def copies(nbytes: int) -> int:
    """How many copies of operands of so many bytes exceed the cache."""
    return max(4, -(-CACHE // nbytes))


def seconds(fn: Callable, x: jax.Array, operands: Sequence[tuple]) -> float:
    """Median seconds of fn(x, *operands[i])."""

    @jax.jit
    def program(x, operands):
        for arrays in operands:
            y = fn(x, *arrays)
            x = x + (0 * y[0, 0]).astype(x.dtype)
        return x

    jax.block_until_ready(program(x, operands))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(x, operands))
        times.append(time.perf_counter() - start)
    return (statistics.median(times) - _launch()) / len(operands)


def _launch() -> float:
    """Seconds of a program that does nothing: what waiting for one costs."""
    if not _LAUNCH:
        nothing, x = jax.jit(lambda x: x + 1), jnp.ones(8)
        nothing(x).block_until_ready()
        for _ in range(4 * REPEATS):
            start = time.perf_counter()
            nothing(x).block_until_ready()
            _LAUNCH.append(time.perf_counter() - start)
    return statistics.median(_LAUNCH)


_LAUNCH: list[float] = []


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying large arrays: what the memory can do."""
    arrays = [jnp.ones(64 << 20, jnp.float32) + i for i in range(4)]

    @jax.jit
    def program(arrays):
        return [a + 1 for a in arrays]

    jax.block_until_ready(program(arrays))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(arrays))
        times.append(time.perf_counter() - start)
    return 2 * sum(a.nbytes for a in arrays) / (statistics.median(times) - _launch())
