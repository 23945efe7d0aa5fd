"""Measured bandwidth and peaks of the machine that this program runs on.

What is measured is what programs reach, so a bound from it holds for programs that reach no more:
several programs are timed, several times each, and the fastest run counts.
"""

import datetime
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import shown
from jaxquant.formats.integer import Integer
from jaxquant.theory.hardware import Hardware
from pallas_kernels import dispatch

_ROWS, _WIDTH = 512, 1024  # of the products that are timed
_LEAST = 64 << 20  # bytes of a timed reading, beside which starting threads takes no time


def this_machine(
    size: int = 256 << 20, runs: int = 5, memory: float | None = None, name: str = "this machine"
) -> Hardware:
    """Return this machine's bandwidth and peaks, measured in about 2 seconds on its CPU.

    The bandwidth is that of reading `size` bytes again and again, by all cores at once and by a
    product of a row with a float matrix. A model that partly stays in a cache between two tokens is
    read faster than memory is: pass its bytes as `size` to measure at its size. The peaks are those
    of products of float32 matrices, and of this project's kernel for int8 codes.

    Args:
      size: bytes that are read, at least 2^20 (default 2^28).
      runs: number of runs of each program, 1 or more, of which the fastest counts (default 5).
      memory: bytes of memory; by default what the operating system states.
      name: name of the row.
    Returns:
      The row; `flops` are of float32 products, since CPUs have no faster ones of 16-bit floats
        everywhere.
    Raises:
      ValueError: an argument is out of range, or memory is not given and not known.

    >>> row = this_machine(size=1 << 20, runs=1)
    >>> 0 < row.bandwidth < 1e13 and row.ops >= row.flops > 0
    True
    """
    check_arguments(this_machine, locals())
    if size < 1 << 20 or runs < 1:
        raise ValueError(f"size must be {1 << 20} or more and runs 1 or more, got {size}, {runs}")
    if memory is None:
        memory = _memory()
    if not memory > 0:
        raise ValueError(f"memory must be positive, got {shown(memory)}")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        flops = _peak_of_floats(runs)
        bandwidth, ops = _bandwidth(size, runs), max(flops, _peak_of_integers(runs))
    month = str(datetime.date.today())[:7]
    source = f"measured: the fastest of {runs} runs of each program, reading {size} bytes"
    return Hardware(name, memory, bandwidth, flops, ops, "int8", None, source, month)


def _bandwidth(size: int, runs: int) -> float:
    """Return the bytes per second of the fastest reading of arrays of `size` bytes together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    side = max(1, size // 4 // 1024)
    matrix = np.ones((side, 1024), np.float32)  # written, so that its pages exist
    parts = np.array_split(matrix.reshape(-1), cores)
    times = max(1, _LEAST // matrix.nbytes)
    again = lambda read: lambda part: [read(part) for _ in range(times)]
    with ThreadPoolExecutor(cores) as pool:
        reading = lambda: list(pool.map(again(np.max), parts))  # NumPy releases the lock
        adding = lambda: list(pool.map(again(_square), parts))
        best = min(_seconds(run, runs) for run in (reading, adding)) / times
    row, array = jnp.ones((1, side), jnp.float32), jnp.asarray(matrix)
    product = jax.jit(jnp.dot)
    best = min(best, _seconds(lambda: product(row, array).block_until_ready(), runs))
    return matrix.nbytes / best


def _square(a: np.ndarray) -> Any:
    return np.dot(a, a)


def _peak_of_floats(runs: int) -> float:
    a = np.ones((_ROWS, _WIDTH), np.float32)
    b = np.ones((_WIDTH, _WIDTH), np.float32)
    x, w, product = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.dot)
    several: Sequence[Callable[[], Any]] = (
        lambda: np.dot(a, b),
        lambda: product(x, w).block_until_ready(),
    )
    return 2 * a.size * _WIDTH / min(_seconds(run, runs) for run in several)


def _peak_of_integers(runs: int) -> float:
    """Return the fastest rate of the kernel for packed codes, over the widths of codes."""
    x = jnp.ones((_ROWS, _WIDTH), jnp.float32)

    def seconds(bits: int) -> float:
        format = Integer(bits, "channel", symmetric=True)
        data = jax.jit(format.encode)(jnp.ones((_WIDTH, _WIDTH), jnp.float32))
        (codes, scale, zero), static = format.arguments(data, _WIDTH)
        run = jax.jit(
            lambda x, codes, scale: dispatch.product(
                "packed_matmul", x, codes, scale, zero, **static, activations="int8"
            )
        )
        return _seconds(lambda: run(x, codes, scale).block_until_ready(), runs)

    return 2 * x.size * _WIDTH / min(seconds(bits) for bits in (2, 8))


def _seconds(run: Callable[[], Any], runs: int) -> float:
    """Return the time of the fastest run, after one that is not timed."""
    run()
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        raise ValueError(
            "the memory of this machine is not known: pass memory=BYTES to this_machine"
        ) from None
