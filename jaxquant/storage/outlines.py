"""The tree of a checkpoint with shapes in place of arrays; no arrays are read."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxquant.storage.containers import filled, outline_of_paths
from jaxquant.storage.description import Json, first_line, read_description
from jaxquant.storage.leaves import rebuilt, stored_name
from jaxquant.storage.parts import PARTS, joined

# Dtypes that JAX would cut to 32 bits, unless `jax_enable_x64` is on.
WIDE = ("int64", "uint64", "float64", "complex128")


def outline(directory: str | Path) -> PyTree:
    """Return the tree of a checkpoint with shapes in place of arrays, without reading arrays.

    Args:
      directory: the checkpoint.
    Returns:
      The tree that `load` returns, with a `jax.ShapeDtypeStruct` in place of every array, including
      those of `QTensor`s. Arrays of 64 bits per number are NumPy arrays that take no memory, unless
      `jax_enable_x64` is on. Python numbers and strings are unchanged.
    Raises:
      ValueError: as in `load`, except that the files of arrays are not checked.

    >>> import tempfile, jaxquant as jq
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jq.save(folder, {"w": jnp.ones((2, 3))})
    ...     outline(folder)
    {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    path = Path(directory).absolute()
    description = read_description(path)
    try:
        stored = description["arrays"].items()
        arrays = {name: _abstract(tuple(d["shape"]), d["dtype"]) for name, d in stored}
        paths = [entry["path"] for entry in description["leaves"]]
        leaves = [_leaf_outline(entry, arrays) for entry in description["leaves"]]
        tree = filled(outline_in(description, paths), leaves)
    except Exception as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error
    if PARTS in description:
        tree = tree | joined(path, description[PARTS], outline)
    return tree


def _abstract(shape: tuple[int, ...], dtype: str) -> Any:
    """Return a shape in place of an array; a NumPy array for a dtype that JAX would truncate."""
    if dtype in WIDE and jnp.result_type(float) != np.float64:
        return np.broadcast_to(np.zeros((), dtype), shape)
    return jax.ShapeDtypeStruct(shape, dtype)


def _leaf_outline(entry: Json, arrays: dict[str, Any]) -> Any:
    """Return a leaf with shapes in place of arrays."""
    if "type" in entry:
        return rebuilt(entry, {})
    if "parts" not in entry and "key" not in entry:
        return rebuilt(entry, dict(arrays))
    beginnings = stored_name(entry["path"]), entry["path"]
    mine = {name: a for name, a in arrays.items() if name.startswith(beginnings)}
    return jax.eval_shape(lambda a: rebuilt(entry, dict(a)), mine)


def outline_in(description: Json, paths: list[str]) -> Any:
    """Return the outline of a checkpoint's tree; checkpoints of version 1 do not hold it.

    Args:
      description: the checkpoint's description.
      paths: the paths of the leaves.
    """
    if "tree" in description:
        return description["tree"]
    return outline_of_paths(
        paths, description.get("empty", []), description.get("integer_keys", [])
    )
