"""The description of a kernel: a function, and a test of the arguments it supports."""

from collections.abc import Callable
from typing import NamedTuple


class Kernel(NamedTuple):
    """The implementation of one op on one platform.

    Attributes:
      call: function with the signature of the op's reference: arrays by position, static arguments
        by keyword, float32 result.
      serves: function of the same arguments, with arrays given as `jax.ShapeDtypeStruct`, that
        returns "" if the kernel supports them and otherwise a short reason.
      together: function that multiplies one x with several matrices in one call, or None if the
        platform has none. It takes x, a sequence with the arrays of each matrix, and the static
        arguments, and returns a tuple of results.
    """

    call: Callable
    serves: Callable[..., str]
    together: Callable[..., tuple] | None = None
