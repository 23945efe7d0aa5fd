"""What an implementation of an op is: a function, and a test of what it serves."""

from collections.abc import Callable
from typing import NamedTuple


class Kernel(NamedTuple):
    """One op on one platform.

    Attributes:
      call: as the op's reference: arrays by position, statics by keyword, float32 out.
      serves: of the same arguments, arrays given as `jax.ShapeDtypeStruct`: "" if they are
        served, else why not, in a few words.
      together: products of one x with several matrices in one call, if the platform has that:
        x, a sequence of the arrays of each, and the static values; a tuple of results.
    """

    call: Callable
    serves: Callable[..., str]
    together: Callable[..., tuple] | None = None
