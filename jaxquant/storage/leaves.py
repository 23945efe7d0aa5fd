"""The leaves of a saved tree: a JSON description of each, and the names of its arrays."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, PyTree

from jaxquant.core.activations import Activations
from jaxquant.core.paths import path_leaves
from jaxquant.core.standin import is_standin
from jaxquant.core.tensor import QTensor
from jaxquant.recipes.serialize import from_json, to_json

Json = dict[str, Any]  # a JSON object
# Fields of a QTensor stored as JSON.
STATIC = (
    "format", "view", "logical_dtype", "method", "input", "output", "shared", "activations",
)  # fmt: skip
SCALARS = {kind.__name__: kind for kind in (bool, int, float, complex, str)}


def described(path: str, leaf: Any) -> tuple[Json, dict[str, Array]]:
    """Return the JSON description of a leaf, and its arrays by their names on disk.

    Args:
      path: the leaf's path.
      leaf: an array, a Python number or string, a random key or a `QTensor`.
    Returns:
      The description, and a dict of the arrays.
    Raises:
      ValueError: the leaf is anything else, is traced, or was donated.

    >>> described("a:b", jax.random.key(3))
    ({'path': 'a:b', 'key': 'threefry2x32'}, {'a%3Ab': Array([0, 3], dtype=uint32)})
    >>> described("step", 3)
    ({'path': 'step', 'type': 'int', 'value': 3}, {})
    """
    if isinstance(leaf, QTensor):
        return _described_tensor(path, leaf)
    if type(leaf) in SCALARS.values():
        value = str(leaf) if isinstance(leaf, complex) else leaf
        return {"path": path, "type": type(leaf).__name__, "value": value}, {}
    description = {"path": path}
    _check_array(path, leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        description["key"] = str(jax.random.key_impl(leaf))
        leaf = jax.random.key_data(leaf)
    return description, {stored_name(path): leaf}


def _described_tensor(path: str, w: QTensor) -> tuple[Json, dict[str, Array]]:
    for part, a in w.named.items():
        _check_array(f"{path}:{part}", a)
    static = {f: to_json(getattr(w, f)) for f in STATIC}
    several = any(isinstance(a, jax.Array) and not a.is_fully_addressable for a in w.data.values())
    # Processes that hold parts of an exact weight save these as they are.
    data = w.data if w.format.exact and several else w.format.to_disk(w.data, w.stored_rows)
    stored = dataclasses.replace(w, data=data).named
    if data is not w.data:  # packed more tightly than for matmuls
        static["kept"] = True
    arrays = {f"{stored_name(path)}:{part}": a for part, a in stored.items()}
    return {"path": path, "parts": list(stored), **static}, arrays


def _check_array(path: str, leaf: Any) -> None:
    """Raise ValueError unless a leaf is an array of numbers or random keys that has its values."""
    holds = "a checkpoint holds arrays, numbers, text, random keys and QTensors"
    if is_standin(leaf):
        raise ValueError(
            f"{path!r} is a {type(leaf).__name__}; {holds}: convert it to a QTensor with "
            "jaxquant.freeze"
        )
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"{path!r} is traced; save the tree outside jit, grad and vmap")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(
            f"{path!r} is a {type(leaf).__name__}; {holds}: convert it to one of these, or leave "
            "it out"
        )
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise ValueError(
            f"{path!r} was donated to a jitted function, so its values no longer exist; save the "
            "array that the function returned instead"
        )
    kept_by_jax = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    if not kept_by_jax and (leaf.dtype.kind in "OSUmM" or leaf.dtype.names):
        raise ValueError(
            f"{path!r} is an array of {leaf.dtype}; {holds}: convert it to a numeric dtype, or "
            "leave it out"
        )


def stored_name(path: str) -> str:
    """Return the name of a leaf on disk.

    In the path, "%", ":" (which separates the name of a part) and empty keys are escaped.

    Args:
      path: the leaf's path.

    >>> stored_name("a//b:c")
    'a/%/b%3Ac'
    """
    keys = path.replace("%", "%25").replace(":", "%3A").split("/")
    return "/".join(key or "%" for key in keys)  # Orbax 0.12.0 stores no empty key


def rebuilt(description: Json, arrays: dict[str, Array | None]) -> Any:
    """Return the leaf of a description; the inverse of `described`.

    Args:
      description: the description of the leaf.
      arrays: all arrays by their names on disk. Those of the leaf are replaced by None in place.
    Returns:
      The leaf.
    Raises:
      ValueError: another leaf has taken an array already, or the description has an invalid value.
      KeyError: an array or a field is missing.

    >>> rebuilt({"path": "step", "type": "int", "value": 3}, {})
    3
    """
    if "parts" in description:
        return _rebuilt_tensor(description, arrays)
    if "type" in description:
        return SCALARS[description["type"]](description["value"])
    array = _taken(arrays, description["path"])
    return (
        jax.random.wrap_key_data(array, impl=description["key"]) if "key" in description else array
    )


def _rebuilt_tensor(description: Json, arrays: dict[str, Array | None]) -> QTensor:
    named = {part: _taken(arrays, description["path"], f":{part}") for part in description["parts"]}
    static = {field: from_json(description[field]) for field in STATIC if field in description}
    # Earlier versions stored a string.
    static["activations"] = Activations.of(static.get("activations"))
    w = QTensor(data={}, **static).with_named(named)
    if "kept" not in description:
        return w
    return dataclasses.replace(w, data=w.format.from_disk(w.data, w.stored_rows))


def _taken(arrays: dict[str, Array | None], path: str, part: str = "") -> Any:
    """Return an array by its name on disk, or by its bare path (earlier versions), only once."""
    name = f"{stored_name(path)}{part}"
    name = name if name in arrays else f"{path}{part}"
    if arrays[name] is None:
        raise ValueError(f"two leaves of the tree use the stored array {name!r}")
    array, arrays[name] = arrays[name], None
    return array


def shardings_of(like: PyTree) -> dict[tuple[str, tuple[int, ...]], Sharding]:
    """Return the shardings of those arrays of a tree that are on several devices.

    Args:
      like: tree of arrays or abstract values, and `QTensor`s of these.
    Returns:
      The shardings by (name on disk, shape) of the array.
    """
    found: dict[tuple[str, tuple[int, ...]], Sharding] = {}
    for path, leaf in path_leaves(like):
        parts = leaf.named if isinstance(leaf, QTensor) else {"": leaf}
        for part, a in parts.items():
            place: Any = getattr(a, "sharding", None)
            on_mesh = isinstance(getattr(place, "mesh", None), Mesh)
            if on_mesh and len(place.device_set) > 1:
                name = f"{stored_name(path)}:{part}" if part else stored_name(path)
                found[name, tuple(a.shape)] = place
    return found
