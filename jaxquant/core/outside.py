"""What a stand-in answers where it is used as an array outside of `jaxquant.quantized`.

Inside, functions receive tracers and never the stand-in itself, so nothing here runs.
"""

import sys
from typing import Any, NoReturn

import jax
import numpy as np

_NAMES = {*dir(jax.Array), *dir(np.ndarray), "block_until_ready"}
_ARRAY_NAMES = frozenset(name for name in _NAMES if not name.startswith("_"))


class NotAnArray:
    """Refuses every use as an array with one error that says what to do.

    `__iter__` and `__index__` are left out, because their presence alone makes code take a value
    for a sequence or a number; `__getitem__` refuses iteration. `__eq__` and `__hash__` are those
    of any other tree.
    """

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Raise TypeError, whatever the arguments."""
        raise TypeError(_refusal(self))

    def __getattr__(self, name: str) -> Any:
        # Python asks here too if a property raises AttributeError, whose message is then asked for.
        if name not in _ARRAY_NAMES or hasattr(type(self), name):
            return object.__getattribute__(self, name)
        raise AttributeError(_refusal(self))

    # What NumPy and Python ask of an array.
    __array__ = __getitem__ = __setitem__ = __len__ = refuse
    __bool__ = __int__ = __float__ = __complex__ = __round__ = refuse
    __neg__ = __pos__ = __abs__ = __invert__ = refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = refuse
    __matmul__ = __rmatmul__ = __truediv__ = __rtruediv__ = refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = refuse
    __pow__ = __rpow__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = refuse
    __lt__ = __le__ = __gt__ = __ge__ = refuse

    # What Flax linen asks of a parameter that is not an array, before it compares shapes.
    unbox = replace_boxed = add_axis = remove_axis = refuse


def tell_linen() -> None:
    """Make Flax linen ask stand-ins to unbox themselves, if it is imported.

    Without that it compares the shapes of a stand-in's arrays with those of the weight, and reports
    a wrong shape. Flax is not imported here: that would take a third of the time that importing
    jaxquant does.
    """
    meta = sys.modules.get("flax.core.meta")
    if meta is not None and not issubclass(NotAnArray, meta.AxisMetadata):
        meta.AxisMetadata.register(NotAnArray)


def _refusal(value: NotAnArray) -> str:
    return (
        f"{value!r} stands for a weight and is not an array: wrap the function that uses it, as in "
        f"jq.quantized(fn)(params, x), or unpack it by jq.dequantize(params)"
    )
