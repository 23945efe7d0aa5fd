"""Measures a run: seconds of work and of compilation, and the peak memory of the process."""

import contextlib
import ctypes
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator

import jax

LARGE_BLOCK = 4 * 2**20  # bytes
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of options, from malloc.h
_COMPILE = "/jax/core/compile/"  # prefix of JAX's events of tracing, lowering and compiling


@dataclasses.dataclass
class Phase:
    """Work on tokens, with the time that JAX took to trace and compile programs apart.

    Attributes:
      tokens: number of tokens processed.
      seconds: time of the work, without that of compiling.
      compile_seconds: time of tracing and compiling programs.
    """

    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second, or None if there were none."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the `with` block, which must wait for its arrays to be computed."""
        start = time.perf_counter()
        spans = _Spans()
        jax.monitoring.register_event_duration_secs_listener(spans.heard)
        try:
            yield
        finally:
            with contextlib.suppress(AssertionError):  # the block has cleared all listeners
                jax.monitoring.unregister_event_duration_listener(spans.heard)
            took = time.perf_counter() - start
            self.compile_seconds += spans.seconds
            self.seconds += took - spans.seconds


class _Spans:
    """The union of time spans, each added when it ends; an inner span ends before its outer one."""

    def __init__(self) -> None:
        self.apart: list[tuple[float, float]] = []

    def heard(self, event: str, seconds: float, **_: object) -> None:
        """Listen to JAX: add the span of an event that ends now, if it is one of compiling."""
        if event.startswith(_COMPILE):
            end = time.perf_counter()
            self.add(end - seconds, end)

    def add(self, start: float, end: float) -> None:
        while self.apart and self.apart[-1][0] >= start:
            self.apart.pop()
        if self.apart:
            start = max(start, self.apart[-1][1])
        self.apart.append((start, end))

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self.apart)


def peak_memory() -> int:
    """Return the largest amount of memory that the process has had so far, in bytes.

    It is the resident set size, which includes the code of the libraries.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library offers this (glibc).

    XLA frees what it needs to compile a program, but glibc keeps it for later: 80 MB for a
    generation of SmolLM2-135M.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_freed_memory_at_once() -> None:
    """Make the C library return large blocks to the system when they are freed (glibc).

    By default glibc keeps blocks of up to 32 MB for later: .5 GB after calibrating a layer of a
    1.1B model. Larger blocks are always returned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, LARGE_BLOCK)
        mallopt(MMAP_THRESHOLD, LARGE_BLOCK)
