"""Checkpoints: one self-describing directory, arrays by Orbax, the rest in one JSON file."""

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
Json = dict[str, Any]  # an object
DESCRIPTION = "jaxquant.json"
ARRAYS = "arrays"
# Of a QTensor.
STATIC = (
    "format", "view", "logical_dtype", "method", "input", "output", "shared", "activations",
)  # fmt: skip


class Checkpoint(NamedTuple):
    """What a directory holds: the tree, the recipe that made it (or None), and metadata.

    The tree is nested dicts, with integer keys where they were, unless `load` was told otherwise.
    """

    params: PyTree
    recipe: Recipe | None
    metadata: Json


def check_target(directory: str | Path, overwrite: bool = False) -> Path:
    """The path, if a checkpoint may be written there.

    Raises:
      ValueError: it exists and is not an empty directory, and `overwrite` is off; it holds
        anything but a checkpoint; or the folder it would be made in is none, or not writable.
    """
    path = Path(directory).resolve()  # through a link, to what it names
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
    """The first names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(map(repr, names[:3])) + (f" and {more} more" if more > 0 else "")


def is_checkpoint(directory: str | Path) -> bool:
    """Whether the directory holds a jaxquant checkpoint.

    One that a killed overwrite has left aside is put back first.
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
    """Write a tree of arrays and `QTensor`s; aside first, then put in place in one step.

    A kill at any moment leaves what was there before, or the new checkpoint; what it leaves
    aside goes with the next `save` to the same place.

    Args:
      directory: made by this call; may exist if empty, or a checkpoint and `overwrite`.
      params: nested dicts, or a Flax NNX `State` (`nnx.state(model)`, quantized or not). Keys are
        names or integers, leaves numbers, QTensors or random keys.
      metadata: JSON values to give back on load (a model's configuration, its tokenizer).
    Raises:
      ValueError: the target is taken, also by another process while this one wrote; the tree
        holds other containers than mappings; or the metadata is not JSON.
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
                check_target(target, overwrite)  # as it is by now
            publish(new, target, replace=overwrite)
    except FileExistsError:
        raise ValueError(f"{target} was made by another process meanwhile; it stays") from None
    except OSError as error:
        raise OSError(f"could not write {target}: {_line(error)}") from error


def _as_json(metadata: Json) -> PyTree:
    """The values as they will be read."""
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be JSON values: {_line(error)}") from None


def _fill(folder: Path, description: Json, arrays: dict[str, Array]) -> None:
    folder.mkdir()
    _check_space(folder, sum(a.nbytes for a in arrays.values()))
    try:
        # In a thread that is waited for, come what may: Orbax, interrupted half-way, leaves its
        # own threads writing, and the folder would come back after it is removed.
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
    """Orbax compresses, so this asks for a little more than it will take; but on a disk that fills
    it prints tracebacks from threads of its own, which nobody can catch."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"No space left: {needed:,} bytes are needed, {free:,} are free")


def load(directory: str | Path, *, like: PyTree = None) -> Checkpoint:
    """Read a checkpoint; nothing else is needed to have nested dicts.

    Args:
      like: a tree of the saved one's paths and shapes, of arrays or abstract, whose containers the
        result takes: of the NNX state of a float model, `nnx.state(nnx.eval_shape(make))` too, the
        `State` and the types of its `Variable`s. Where it has a float weight and a QTensor was
        saved, the result has the QTensor; dtypes are those that were saved.
    Raises:
      ValueError: no checkpoint, one of a newer version, or a damaged one; or `like` has other
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
    # Before Orbax opens anything: what it says of a damaged file is long, and comes in threads.
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
    """The recipe that made a checkpoint, if it says; arrays are not read.

    Raises:
      ValueError: no checkpoint, one of a newer version, or a damaged one.
    """
    path = Path(directory).absolute()
    return _recipe_of(path, _description(path))


def stored_metadata(directory: str | Path) -> Json:
    """What `save` was given as metadata; arrays are not read.

    Raises:
      ValueError: no checkpoint, one of a newer version, or a damaged one.
    """
    return _description(Path(directory).absolute())["metadata"]


def _recipe_of(path: Path, description: Json) -> Recipe | None:
    recipe = description["recipe"]
    try:
        return None if recipe is None else Recipe.from_json(recipe)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / DESCRIPTION} is damaged: recipe: {_line(error)}") from error


def nbytes(directory: str | Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file())


def _description(path: Path) -> Json:
    """The JSON file's values, as they were saved."""
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
    """(description of every leaf, all arrays by name)."""
    leaves: list[Json] = []
    arrays: dict[str, Array] = {}
    for path, leaf in path_leaves(params):
        if isinstance(leaf, QTensor):
            static = {f: to_json(getattr(leaf, f)) for f in STATIC}
            data = leaf.format.to_disk(leaf.data, leaf.stored_rows)
            kept = dataclasses.replace(leaf, data=data).named
            if data is not leaf.data:  # closer than what a product reads
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
    """A leaf's name on disk. ":" divides it from a part's, so within a path "%3A" stands for it."""
    return path.replace("%", "%25").replace(":", "%3A")


def _taken(arrays: dict[str, Array | None], path: str, part: str = "") -> PyTree:
    """By its name on disk, or, as earlier versions named it, by its path alone; each one once."""
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
            # Once a text.
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
    """SHA-256 of every file below a folder, by relative path."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            out[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return out


def _line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
