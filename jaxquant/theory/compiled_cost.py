"""The roofline of a compiled function, from the bytes and operations that XLA counts in it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxquant.core.fields import shown
from jaxquant.theory.hardware import Hardware
from jaxquant.theory.roofline_point import RooflinePoint

_LOOP = re.compile(r"\bwhile\(")
# Calls out of the program; XLA knows the counts of those to NVIDIA's libraries, and takes -1 for
# those of any other, which a sum with the counts of the rest would hide.
_CALL = re.compile(r'custom_call_target="(?!__cublas|__cudnn\$conv)([^"]+)"')
_CALLS = (
    "calls a kernel ({}), into which XLA cannot look; compile it under "
    "pallas_kernels.dispatch.using('reference'), or use jaxquant.theory.serving_roofline"
)
# A product whose result is of integers in XLA's text, such as "%dot.1 = s32[8,32]{1,0} dot(".
_INTEGER = re.compile(r"= \(?[su]\d+\[[^=]*? (?:dot|convolution|custom-call)\(")
_INTEGERS = (
    "products of integers are counted at the peak of floats, so the bound does not hold for units "
    "that multiply integers faster"
)
_LOOPS = "the function has loops, of whose bodies only one pass is counted"


class CompiledCost(NamedTuple):
    """What XLA counts in a compiled function.

    Attributes:
      point: the point on the roofline of the machine; all operations are taken to be on floats.
      notes: what the counts leave out.
    """

    point: RooflinePoint
    notes: tuple[str, ...]


def from_compiled(compiled: Any, hardware: Hardware) -> CompiledCost:
    """Return the bytes and operations of a compiled function, and its roofline.

    XLA counts one pass of the body of every loop (`scan`, `while_loop`, `fori_loop`), however often
    it runs; a note says so if there is a loop. It cannot look into kernels: a function that calls
    one has no counts, and is an error here. It does not tell operations on integers from those on
    floats, so all are counted at the peak of floats; a note says so if there are products of
    integers. Bytes are those of the operands and results of every
    fusion, some of which stay in caches.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.
      hardware: the machine.
    Returns:
      The point, and notes.
    Raises:
      ValueError: the function is not compiled, or XLA does not know its counts.

    >>> import jax, jax.numpy as jnp
    >>> from jaxquant.theory.hardware import HARDWARE
    >>> compiled = jax.jit(jnp.dot).lower(jnp.ones((8, 64)), jnp.ones((64, 32))).compile()
    >>> found = from_compiled(compiled, HARDWARE["v5e"])
    >>> found.point.floats == 2 * 8 * 64 * 32
    True
    """
    if not callable(getattr(compiled, "cost_analysis", None)) or hasattr(compiled, "compile"):
        raise ValueError(
            "compiled must be a compiled function, jax.jit(f).lower(...).compile(), got "
            f"{shown(compiled)}"
        )
    counts, text = _counts(compiled.cost_analysis()), _text(compiled)
    if called := sorted(set(_CALL.findall(text))):
        raise ValueError(f"the function {_CALLS.format(', '.join(called))}")
    point = RooflinePoint(hardware, _known(counts, "bytes accessed"), _known(counts, "flops"))
    found = (_LOOP, _LOOPS), (_INTEGER, _INTEGERS)
    return CompiledCost(point, tuple(note for sign, note in found if sign.search(text)))


def _counts(found: Any) -> Mapping[str, float]:
    """Return the counts as one mapping: a list of one per program in some versions of JAX."""
    if isinstance(found, Sequence) and not isinstance(found, str) and found:
        found = found[0]  # all programs of one function are alike
    if not isinstance(found, Mapping):
        raise ValueError(
            "XLA returned no cost analysis for this function on this platform; compile it for "
            "another one"
        )
    return found


def _known(counts: Mapping[str, float], name: str) -> float:
    value = counts.get(name)
    if value is None and name == "flops" and counts.get("bytes accessed", -1) >= 0:
        return 0.0  # XLA lists no operations where there are none
    if value is None or not math.isfinite(value) or value < 0:
        given = "no entry" if value is None else f"{value:g}"
        raise ValueError(
            f"XLA does not know {name!r} of this function ({given}): it {_CALLS.format('unnamed')}"
        )
    return float(value)


def _text(compiled: Any) -> str:
    return (compiled.as_text() if callable(getattr(compiled, "as_text", None)) else "") or ""
