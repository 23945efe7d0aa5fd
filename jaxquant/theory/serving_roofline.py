"""The memory wall of serving: the least time of decoding and of a prefill on a machine.

A decode step reads every weight once for the whole batch, and the cache of every sequence; a
prefill reads the weights once for all tokens of a prompt. Hence

    decode:   bytes = W + B C(c),          operations = B (2 P + 4 L H d (c + 1))
    prefill:  bytes = W + T writes,        operations = 2 P T + 4 L H d T (T + 1) / 2

with W bytes of weights, B sequences, C(c) bytes of the cache of c tokens, P weights that multiply a
token, L layers, H query heads of d channels, and T tokens of a prompt.

`jaxquant.roofline` bounds one weight at a time, with the unpacking rate of each kernel, and adds
these bounds up, since kernels run one after the other; it knows neither caches nor attention, and
only accelerators. The bound here lets all traffic overlap all products and leaves unpacking out, so
for the same weights it is never above that of `roofline`; it covers caches, attention, experts and
any machine.

It bounds programs that read every weight and every cache from memory once for each new token of a
sequence. Some need not: sequences may share the cache of a common prefix, speculative decoding
makes several tokens of a sequence in one pass, and a small model may stay in on-chip memory.
Experts count as in `Operand.read`, in expectation.
"""

import math

from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import shown
from jaxquant.theory.hardware import Hardware
from jaxquant.theory.roofline_point import RooflinePoint
from jaxquant.theory.workload import Workload

LARGEST = 2**40  # of batches and contexts; a critical batch beyond it is reported as none


def decode(
    workload: Workload, hardware: Hardware, batch: int = 1, context: int = 0
) -> RooflinePoint:
    """Return the bound of one decode step: a new token of every sequence of a batch.

    Args:
      workload: the model.
      hardware: the machine.
      batch: number of sequences, 1 or more (default 1).
      context: number of tokens in the cache of each sequence, 0 or more (default 0).
    Returns:
      The point; its `tokens` are the batch, its `occupied` bytes are weights and caches.
    Raises:
      ValueError: a number is out of range.

    >>> from jaxquant.theory.hardware import HARDWARE
    >>> from jaxquant.theory.workload import architecture
    >>> point = decode(architecture(8.03e9, 16), HARDWARE["v5e"])
    >>> round(point.tokens_per_second), point.wall, point.fits
    (51, 'memory', False)
    """
    check_arguments(decode, locals())
    _check(batch=(batch, 1), context=(context, 0))
    return _step(workload, hardware, float(batch), context)


def prefill(workload: Workload, hardware: Hardware, tokens: int, batch: int = 1) -> RooflinePoint:
    """Return the bound of a prefill: all tokens of a prompt in one pass.

    The keys and values of all tokens are written once; attention is causal. Attention that reads
    keys from memory more than once takes longer.

    Args:
      workload: the model.
      hardware: the machine.
      tokens: number of tokens of each prompt, 1 or more.
      batch: number of prompts, 1 or more (default 1).
    Returns:
      The point; its `tokens` are those of all prompts.
    Raises:
      ValueError: a number is out of range.

    >>> from jaxquant.theory.hardware import HARDWARE
    >>> from jaxquant.theory.workload import architecture
    >>> prefill(architecture(8.03e9, 4.25), HARDWARE["h100"], 2048).wall
    'compute'
    """
    check_arguments(prefill, locals())
    _check(tokens=(tokens, 1), batch=(batch, 1))
    tokens, batch = int(tokens), int(batch)  # NumPy's integers overflow
    cache = batch * workload.cache_bytes(tokens)
    total = tokens * batch
    attention = workload.attention_operations(batch * tokens * (tokens + 1) / 2)
    return RooflinePoint(
        hardware,
        workload.read(total) + cache,
        workload.operations(False, total, batch) + attention,
        workload.operations(True, total, batch),
        total,
        workload.weight_bytes + cache,
    )


def critical_batch(workload: Workload, hardware: Hardware, context: int = 0) -> float | None:
    """Return the batch from which decoding is bound by compute.

    Memory time grows with the batch only through caches, rows of tables and experts, compute time
    in proportion to it. Without these three, for weights of b bits multiplied as 16-bit floats, it
    is ridge b / 16.

    Args:
      workload: the model.
      hardware: the machine.
      context: number of tokens in the cache of each sequence, 0 or more (default 0).
    Returns:
      The batch, a real number; below 1 if a single sequence is bound by compute. None if memory
        bounds every batch, because the cache of a sequence takes longer to read than its products
        take to compute.
    Raises:
      ValueError: the context is negative.

    >>> from jaxquant.theory.hardware import HARDWARE
    >>> from jaxquant.theory.workload import architecture
    >>> round(critical_batch(architecture(8.03e9, 4.25), HARDWARE["h200"]))
    55
    """
    check_arguments(critical_batch, locals())
    _check(context=(context, 0))

    def excess(batch: float) -> float:
        point = _step(workload, hardware, batch, context)
        return point.compute_seconds - point.memory_seconds

    low, high = 2.0**-40, 1.0
    while excess(high) <= 0:
        low, high = high, 2 * high
        if high > LARGEST:
            return None
    while high - low > 1e-12 * high:  # one crossing: memory time is concave in the batch
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return high


def largest_batch(workload: Workload, hardware: Hardware, context: int) -> int:
    """Return the largest batch whose weights and caches fit in memory; 0 if no sequence does.

    Args:
      workload: the model, with attention.
      hardware: the machine.
      context: number of tokens in the cache of each sequence, 1 or more.
    Raises:
      ValueError: the context is below 1, or the workload has no attention.

    >>> from jaxquant.theory.hardware import HARDWARE
    >>> from jaxquant.theory.workload import Attention, architecture
    >>> llama = architecture(8.03e9, 4.25, Attention(32, 32, 8, 128))
    >>> largest_batch(llama, HARDWARE["v5e"], 8192)
    10
    """
    check_arguments(largest_batch, locals())
    _check(context=(context, 1))
    each = workload.cache_bytes(context)
    if not each:
        raise ValueError("the workload has no attention: give it one, which tells its cache")
    return max(0, math.floor((hardware.memory - workload.weight_bytes) / each))


def _step(workload: Workload, hardware: Hardware, batch: float, context: int) -> RooflinePoint:
    caches = batch * workload.cache_bytes(context)
    attention = workload.attention_operations(batch * (context + 1))
    return RooflinePoint(
        hardware,
        workload.read(batch) + caches,
        workload.operations(False, batch) + attention,
        workload.operations(True, batch),
        batch,
        workload.weight_bytes + caches,
    )


def _check(**given: tuple[int, int]) -> None:
    for name, (value, least) in given.items():
        if value > LARGEST:
            raise ValueError(f"{name} must be at most 2^40, got {shown(value)}")
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
