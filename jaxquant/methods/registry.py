"""The registry of methods by name."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from jaxquant.core.fields import shown
from jaxquant.methods.method import Method
from jaxquant.methods.outliers import awq, duquant, flatquant, inputs, quarot, smoothquant
from jaxquant.methods.training import bitnet, lsq, pact, ste, stretched_elastic, zeroqat
from jaxquant.methods.weights import (
    aqlm,
    entropy_coded,
    float8,
    gptq,
    mxfp4,
    normal_float,
    nvfp4,
    qtip,
    quip_sharp,
    rtn,
    ternary,
    trellis,
    vptq,
)

METHODS: dict[str, Callable[..., Method]] = {
    f.__name__: f
    for f in (
        rtn, gptq, ternary, quip_sharp, qtip, trellis, aqlm, vptq, entropy_coded,
        normal_float, float8, mxfp4, nvfp4, smoothquant, awq, duquant, quarot, flatquant,
        ste, lsq, pact, stretched_elastic, bitnet, zeroqat,
    )
}  # fmt: skip


def named_method(name: str, **options: Any) -> Method:
    """Return the method of a given name.

    Every method accepts `activations` in addition to its own options, see `Method`, or an integer
    `activation_bits`. For methods without an `activation_bits` option of their own, the latter
    means symmetric codes with one scale per token.

    Args:
      name: a key of `METHODS`, such as "gptq".
      options: keyword arguments of the method; options that are None keep their defaults.
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
    form = {"activations": given.pop("activations")} if "activations" in given else {}
    own = inspect.signature(METHODS[name]).parameters
    if "activation_bits" in given and "activation_bits" not in own:
        form = {"activations": inputs(given.pop("activation_bits"), True, 1.0)} | form
    try:
        return dataclasses.replace(METHODS[name](**given), **form)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None
