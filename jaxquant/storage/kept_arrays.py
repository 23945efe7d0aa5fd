"""The arrays that Orbax keeps in place of those of a tree: in other dtypes, or coded."""

from typing import Any

import numpy as np

from jaxquant.lossless.arrays import decode_array
from jaxquant.storage.description import Json

# Dtypes that TensorStore does not support, and the dtypes in which their values are stored.
STORED_AS = {
    "int1": "int8", "uint1": "uint8", "uint2": "uint8", "uint4": "uint8", "float8_e4m3": "float16",
}  # fmt: skip


def restored(name: str, a: Any, spec: Json) -> Any:
    """Return an array of the tree from the array in which Orbax keeps it.

    Args:
      name: name of the array.
      a: what Orbax has read, of the shape and dtype `kept_as(spec)`.
      spec: the description of the array.

    Raises:
      ValueError: it was stored without loss, and is damaged.
    """
    if "coded" in spec:
        return decode_array(np.asarray(a), spec["dtype"], tuple(spec["shape"]), name)
    return a.astype(spec["dtype"]) if spec["dtype"] in STORED_AS else a


def kept_as(spec: Json) -> tuple[tuple[int, ...], str]:
    """Return the shape and the dtype in which Orbax keeps an array.

    Args:
      spec: the description of the array.
    """
    if "coded" in spec:
        return (spec["coded"],), "uint8"
    dtype: str = spec["dtype"]
    return tuple(spec["shape"]), STORED_AS.get(dtype, dtype)
