"""Named methods: short compositions of a rounder and a format."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxquant.codebooks import Integer, Ternary
from jaxquant.fields import check_fields
from jaxquant.rounding import LDLQ, Nearest

GroupSize = int | Literal["channel", "tensor"]


@dataclasses.dataclass(frozen=True)
class Method:
    """What to do with a weight: the rounder that chooses codes, the format that stores them.

    `input` and `output` are transforms of the channels on either side (`Rotation`), or None.
    """

    name: str
    rounder: Any
    format: Any
    input: Any = None
    output: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not hasattr(self.rounder, "needs_gram") or not hasattr(self.format, "tile"):
            raise ValueError(
                f"a method is a rounder (LDLQ, ...) and a format (Integer, ...), got "
                f"{self.rounder!r} and {self.format!r}"
            )


    def stored(self, k: int, n: int) -> tuple[int, int]:
        """Rows and columns that the format stores for a matrix [k, n]; ValueError if it cannot."""
        if self.input is not None:
            k = self.input.size(k)
        if self.output is not None:
            n = self.output.size(n)
        self.format.check_shape(k, n)
        return k, n


@dataclasses.dataclass(frozen=True)
class Keep:
    """Leave a leaf as it is."""

    name: str = "keep"


KEEP = Keep()


def rtn(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    mse: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Round to nearest. See `Integer` for the arguments.

    >>> rtn(bits=3).format.bits
    3
    """
    return Method("rtn", Nearest(), Integer(bits, group_size, symmetric, mse, scale_dtype, pad))


def gptq(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    mse: bool = False,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Error feedback against the input's second moment (Frantar et al. 2022, arXiv:2210.17323).

    See `LDLQ` and `Integer` for the arguments.

    >>> gptq(bits=3, act_order=False).rounder.act_order
    False
    """
    return Method(
        "gptq",
        LDLQ(damping, act_order, block_size),
        Integer(bits, group_size, symmetric, mse, scale_dtype, pad),
    )


def ternary(
    group_size: GroupSize = 64,
    *,
    feedback: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Codes -1, 0, 1; with `feedback`, LDLQ against the statistics.

    >>> ternary().format.limits
    (-1, 1)
    """
    rounder = LDLQ() if feedback else Nearest()
    return Method(
        "ternary", rounder, Ternary(group_size=group_size, scale_dtype=scale_dtype, pad=pad)
    )


METHODS: dict[str, Callable[..., Method]] = {"rtn": rtn, "gptq": gptq, "ternary": ternary}


def named_method(name: str, **options: Any) -> Method:
    """A method by name; options that are None are left at their defaults.

    Raises:
      ValueError: unknown name, an option the method does not have, or a bad value.

    >>> named_method("gptq", bits=3, group_size=None).format.bits
    3
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    given = {k: v for k, v in options.items() if v is not None}
    try:
        return METHODS[name](**given)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None
