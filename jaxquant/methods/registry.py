"""The registry of methods by name."""

from collections.abc import Callable
from typing import Any

from jaxquant.core.fields import shown
from jaxquant.methods.codebooks import aqlm, entropy_coded, qtip, quip_sharp, trellis, vptq
from jaxquant.methods.method import Method
from jaxquant.methods.outliers import awq, duquant, flatquant, quarot, smoothquant
from jaxquant.methods.training import bitnet, lsq, pact, ste, stretched_elastic, zeroqat
from jaxquant.methods.weights import (
    float8,
    gptq,
    mxfp4,
    nf4,
    normal_float,
    nvfp4,
    rtn,
    ternary,
)

METHODS: dict[str, Callable[..., Method]] = {
    f.__name__: f
    for f in (
        rtn, gptq, ternary, quip_sharp, qtip, trellis, aqlm, vptq, entropy_coded,
        normal_float, nf4, float8, mxfp4, nvfp4, smoothquant, awq, duquant, quarot, flatquant,
        ste, lsq, pact, stretched_elastic, bitnet, zeroqat,
    )
}  # fmt: skip


def named_method(name: str, **options: Any) -> Method:
    """Return the method of a given name.

    Args:
      name: a key of `METHODS`, such as "gptq".
      options: keyword arguments of the method; lists become tuples, and options that are
        None keep their defaults.

    Returns:
      The `Method`.

    Raises:
      ValueError: the name is unknown, or an option is unknown or has a bad value.

    >>> named_method("gptq", bits=3, group_size=None).format.bits
    3
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {shown(name)}; known: {', '.join(sorted(METHODS))}")
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if v is not None
    }
    try:
        return METHODS[name](**given)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None
