"""Checkpoints: one self-describing directory, with arrays stored by Orbax and one JSON file."""

import dataclasses
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from jaxquant.core.activations import Activations
from jaxquant.core.paths import path_leaves
from jaxquant.core.standin import is_standin
from jaxquant.core.tensor import QTensor
from jaxquant.durable.publish import aside, publish, restore
from jaxquant.recipes.recipe import Recipe
from jaxquant.recipes.serialize import from_json, to_json
from jaxquant.storage.containers import (
    as_numbers,
    from_numbers,
    placed,
    unsaid_by_paths,
    with_integer_keys,
)

VERSION = 1
Json = dict[str, Any]  # a JSON object
DESCRIPTION = "jaxquant.json"
ARRAYS = "arrays"
# Fields of a QTensor stored as JSON.
STATIC = (
    "format", "view", "logical_dtype", "method", "input", "output", "shared", "activations",
)  # fmt: skip


class Checkpoint(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
      params: the tree; nested dicts, with integer keys where there were any, unless `load` got
        `like`.
      recipe: the recipe that made it, or None.
      metadata: the JSON values given to `save`.
    """

    params: PyTree
    recipe: Recipe | None
    metadata: Json


def check_target(directory: str | Path, overwrite: bool = False) -> Path:
    """Return the resolved path if a checkpoint may be written there.

    Args:
      directory: where to write.
      overwrite: whether an existing checkpoint may be replaced.
    Raises:
      ValueError: it exists, is not an empty directory, and `overwrite` is off; it contains anything
        but a checkpoint; or its parent is not a writable directory.
    """
    path = Path(directory).resolve()  # follow symbolic links
    restore(path)
    held = set(os.listdir(path)) if path.is_dir() else set()
    if held and overwrite:
        if not is_checkpoint(path) or not (path / ARRAYS).is_dir():
            raise ValueError(f"{path} is not a jaxquant checkpoint; it will not be overwritten")
        if others := sorted(held - {DESCRIPTION, ARRAYS}):
            raise ValueError(
                f"{path} holds a checkpoint and {_some(others)}, which would be lost; it will "
                f"not be overwritten: move what is not of the checkpoint, or write elsewhere"
            )
    elif held or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} exists and is not empty; pass overwrite (--overwrite) or another")
    parent = next((p for p in path.parents if p.exists()), path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {parent} is not a writable directory")
    return path


def _some(names: list[str]) -> str:
    """List the first names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(map(repr, names[:3])) + (f" and {more} more" if more > 0 else "")


def is_checkpoint(directory: str | Path) -> bool:
    """Return whether the directory holds a jaxquant checkpoint.

    If an overwrite was killed after moving a checkpoint away, that one is put back first.
    """
    path = Path(directory)
    if not os.path.lexists(path):
        restore(path.absolute())
    return (path / DESCRIPTION).is_file()


def save(
    directory: str | Path,
    params: PyTree,
    *,
    recipe: Recipe | None = None,
    metadata: Json | None = None,
    overwrite: bool = False,
) -> None:
    """Write a tree of arrays and `QTensor`s atomically.

    A kill at any moment leaves either what was there before or the new checkpoint; the next `save`
    to the same place removes leftover temporary files.

    Args:
      directory: created by this call; it may exist if it is empty, or a checkpoint with
        `overwrite`.
      params: nested dicts, or a Flax NNX `State` (`nnx.state(model)`, quantized or not). Keys are
        names or integers; leaves are numeric arrays, QTensors or random keys.
      recipe: the recipe that made the tree, to store with it.
      metadata: JSON values to return on load (a model's configuration, its tokenizer).
      overwrite: whether to replace an existing checkpoint.
    Raises:
      ValueError: the target exists (perhaps written by another process meanwhile); the tree has
        containers other than mappings; or the metadata is not JSON.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    target = check_target(directory, overwrite)
    unsaid = unsaid_by_paths(params)
    leaves, arrays = _flatten(params)
    description = {
        "format": "jaxquant",
        "version": VERSION,
        "recipe": None if recipe is None else recipe.to_json(),
        "metadata": _as_json(metadata or {}),
        "leaves": leaves,
        "arrays": {n: {"shape": a.shape, "dtype": a.dtype.name} for n, a in arrays.items()},
        **unsaid,
    }
    try:
        with aside(target) as new:
            _fill(new, description, arrays)
            if os.path.lexists(target):
                check_target(target, overwrite)  # it may have changed meanwhile
            publish(new, target, replace=overwrite)
    except FileExistsError:
        raise ValueError(f"{target} was made by another process meanwhile; it stays") from None
    except OSError as error:
        raise OSError(f"could not write {target}: {_line(error)}") from error


def _as_json(metadata: Json) -> PyTree:
    """Return the values as they will be read back."""
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be JSON values: {_line(error)}") from None


def _fill(folder: Path, description: Json, arrays: dict[str, Array]) -> None:
    folder.mkdir()
    _check_space(folder, sum(a.nbytes for a in arrays.values()))
    try:
        # In a thread that is always waited for: when Orbax is interrupted, its own threads keep
        # writing, and would recreate the folder after it is removed.
        with ThreadPoolExecutor(1) as waited:
            waited.submit(_write, folder / ARRAYS, arrays).result()
    except Exception as error:
        raise OSError(_line(error)) from error
    description["files"] = _digests(folder / ARRAYS)
    description["sha256"] = _sha256_of(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


def _write(directory: Path, arrays: dict[str, Array]) -> None:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(directory, args=ocp.args.StandardSave(arrays))


def _check_space(folder: Path, needed: int) -> None:
    """Raise OSError if the disk lacks space for the uncompressed arrays.

    That is a little more than Orbax needs, but on a full disk its threads print tracebacks that
    cannot be caught.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"No space left: {needed:,} bytes are needed, {free:,} are free")


def load(directory: str | Path, *, like: PyTree = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
      directory: the checkpoint.
      like: tree with the paths and shapes of the saved one, of arrays or abstract values, whose
        containers the result uses; None gives nested dicts. The state of a float NNX model
        (`nnx.state(nnx.eval_shape(make))` will do) gives a `State` with its types of `Variable`.
        Saved QTensors replace float weights, and dtypes are the saved ones.
    Raises:
      ValueError: there is no checkpoint, it has a newer version or is damaged; or `like` has other
        leaves.

    >>> import tempfile, jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, nnx.state(model))
    ...     state = load(folder, like=nnx.state(model)).params
    >>> nnx.update(model, state)
    """
    path = Path(directory).absolute()
    description = _description(path)
    # Checked before Orbax opens the files, because its errors are long and come from threads.
    found = _digests(path / ARRAYS)
    for name, digest in description["files"].items():
        if found.get(name) != digest:
            state = "differs from what was saved" if name in found else "is missing"
            raise ValueError(f"{path} is damaged: {ARRAYS}/{name} {state}")
    try:
        arrays = _read(path / ARRAYS, description["arrays"])
        params = _unflatten(description["leaves"], dict(arrays), description.get("empty", []))
        params = with_integer_keys(params, description.get("integer_keys", []))
    except Exception as error:
        raise ValueError(f"{path} is damaged: {_line(error)}") from error
    if like is not None:
        params = placed(like, params)
    return Checkpoint(params, _recipe_of(path, description), description["metadata"])


def _read(directory: Path, said: dict[str, Json]) -> dict[str, Array]:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(directory, args=ocp.args.StandardRestore(
            {name: jax.ShapeDtypeStruct(tuple(d["shape"]), d["dtype"]) for name, d in said.items()}
        ))  # fmt: skip


def stored_recipe(directory: str | Path) -> Recipe | None:
    """Return the recipe that made a checkpoint, or None, without reading arrays.

    Raises:
      ValueError: there is no checkpoint, or it has a newer version or is damaged.
    """
    path = Path(directory).absolute()
    return _recipe_of(path, _description(path))


def stored_metadata(directory: str | Path) -> Json:
    """Return the metadata given to `save`, without reading arrays.

    Raises:
      ValueError: there is no checkpoint, or it has a newer version or is damaged.
    """
    return _description(Path(directory).absolute())["metadata"]


def _recipe_of(path: Path, description: Json) -> Recipe | None:
    recipe = description["recipe"]
    try:
        return None if recipe is None else Recipe.from_json(recipe)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / DESCRIPTION} is damaged: recipe: {_line(error)}") from error


def nbytes(directory: str | Path) -> int:
    """Return the total size of a checkpoint's files, in bytes."""
    return sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file())


def _description(path: Path) -> Json:
    """Read and verify the JSON file."""
    if not is_checkpoint(path):
        raise ValueError(f"{path} is not a jaxquant checkpoint: it has no {DESCRIPTION}")
    file = path / DESCRIPTION
    try:
        value = json.loads(file.read_text())
        version = int(value["version"])
        said = value.pop("sha256", None)
        found = _sha256_of(value)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {_line(error)}") from error
    if version > VERSION:
        raise ValueError(
            f"{path} has format version {version}, this jaxquant reads up to {VERSION}; upgrade it"
        )
    if said != found:
        raise ValueError(f"{file} is damaged: it differs from what was saved")
    if lacks := {"recipe", "metadata", "leaves", "arrays", "files"} - set(value):
        raise ValueError(f"{file} is damaged: it lacks {', '.join(sorted(lacks))}")
    for name, kind in (("metadata", dict), ("leaves", list), ("arrays", dict), ("files", dict)):
        if not isinstance(value[name], kind):
            raise ValueError(
                f"{file} is damaged: {name} is expected to be a {kind.__name__}, got "
                f"{type(value[name]).__name__}"
            )
    return value


def _sha256_of(description: Json) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _flatten(params: PyTree) -> tuple[list[Json], dict[str, Array]]:
    """Return the description of every leaf, and all arrays by name."""
    leaves: list[Json] = []
    arrays: dict[str, Array] = {}
    for path, leaf in path_leaves(params):
        if isinstance(leaf, QTensor):
            static = {f: to_json(getattr(leaf, f)) for f in STATIC}
            data = leaf.format.to_disk(leaf.data, leaf.stored_rows)
            kept = dataclasses.replace(leaf, data=data).named
            if data is not leaf.data:  # packed more tightly than for products
                static["kept"] = True
            named = {f"{_stored(path)}:{part}": a for part, a in kept.items()}
            leaves.append({"path": path, "parts": list(kept), **static})
        else:
            leaf, said = as_numbers(leaf)
            _check_leaf(path, leaf)
            named = {_stored(path): leaf}
            leaves.append({"path": path, **said})
        arrays.update(named)
    if empty := [name for name, a in arrays.items() if a.size == 0]:
        raise ValueError(f"array {empty[0]!r} is empty; Orbax stores no empty arrays, drop it")
    if not arrays:
        raise ValueError("the tree holds no arrays; there is nothing to save")
    return leaves, arrays


def _stored(path: str) -> str:
    """Return a leaf's name on disk: ":", before the name of a part, and empty keys are escaped."""
    keys = path.replace("%", "%25").replace(":", "%3A").split("/")
    return "/".join(key or "%" for key in keys)  # Orbax 0.12.0 stores no empty key


def _taken(arrays: dict[str, Array | None], path: str, part: str = "") -> PyTree:
    """Take an array, once, by its name on disk or, as in earlier versions, by its bare path."""
    name = f"{_stored(path)}{part}"
    name = name if name in arrays else f"{path}{part}"
    if arrays[name] is None:
        raise ValueError(f"{name!r} is of two leaves")
    array, arrays[name] = arrays[name], None
    return array


def _check_leaf(path: str, leaf: PyTree) -> None:
    if is_standin(leaf):
        raise ValueError(
            f"{path!r} is a {type(leaf).__name__}; a checkpoint holds arrays and QTensors: "
            f"jaxquant.freeze makes them"
        )
    numbers = isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind not in "OSUmM"
    if not numbers or leaf.dtype.names:
        raise ValueError(
            f"{path!r} is an array of {leaf.dtype}; a checkpoint holds numbers and random keys"
        )


def _unflatten(leaves: list[Json], arrays: dict[str, Array | None], empty: list[str]) -> Json:
    tree: Json = {}
    for path in empty:
        _node(tree, path.split("/"))
    for leaf in leaves:
        path = leaf["path"]
        *parents, last = path.split("/")
        node = _node(tree, parents)
        if "parts" in leaf:
            named = {part: _taken(arrays, path, f":{part}") for part in leaf["parts"]}
            static = {field: from_json(leaf[field]) for field in STATIC if field in leaf}
            # Earlier versions stored a text.
            static["activations"] = Activations.of(static.get("activations"))
            w = QTensor(data={}, **static).with_named(named)
            if "kept" in leaf:
                w = dataclasses.replace(w, data=w.format.from_disk(w.data, w.stored_rows))
            node[last] = w
        else:
            node[last] = from_numbers(_taken(arrays, path), leaf)
    return tree


def _node(tree: Json, names: list[str]) -> Json:
    for name in names:
        tree = tree.setdefault(name, {})
    return tree


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        out[path.relative_to(folder).as_posix()] = found
    return out


def _line(error: Exception) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
