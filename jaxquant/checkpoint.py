"""Checkpoints: one self-describing directory, arrays by Orbax, the rest in one JSON file."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxquant.activations import Activations
from jaxquant.paths import path_leaves
from jaxquant.recipe import Recipe
from jaxquant.serialize import from_json, to_json
from jaxquant.standin import is_standin
from jaxquant.tensor import QTensor

VERSION = 1
DESCRIPTION = "jaxquant.json"
ARRAYS = "arrays"
# Of a QTensor.
STATIC = (
    "format", "view", "logical_dtype", "method", "input", "output", "shared", "activations",
)  # fmt: skip


class Checkpoint(NamedTuple):
    """What a directory holds: the tree, the recipe that made it (or None), and metadata."""

    params: Any
    recipe: Recipe | None
    metadata: dict[str, Any]


def check_target(directory: str | Path, overwrite: bool = False) -> Path:
    """The path, if a checkpoint may be written there.

    Raises:
      ValueError: it exists and is not an empty directory, and `overwrite` is off; or the folder
        it would be made in is none, or not writable.
    """
    path = Path(directory).resolve()  # through a link, to what it names
    if path.is_dir() and overwrite and any(path.iterdir()) and not is_checkpoint(path):
        raise ValueError(f"{path} is not a jaxquant checkpoint; it will not be overwritten")
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not (overwrite and path.is_dir()):
        raise ValueError(f"{path} exists and is not empty; pass overwrite (--overwrite) or another")
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {parent} is not a writable directory")
    return path


def is_checkpoint(directory: str | Path) -> bool:
    """Whether the directory holds a jaxquant checkpoint."""
    return (Path(directory) / DESCRIPTION).is_file()


def save(
    directory: str | Path,
    params: Any,
    *,
    recipe: Recipe | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write nested dicts of arrays and `QTensor`s; aside first, then renamed into place.

    Args:
      directory: made by this call; may exist if empty, or a checkpoint and `overwrite`.
      metadata: JSON values to give back on load (a model's configuration, its tokenizer).
    Raises:
      ValueError: the target is taken, or the tree holds other containers than dicts.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    target = check_target(directory, overwrite)
    leaves, arrays = _flatten(params)
    made = [p for p in target.parents if not p.exists()]
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        aside.mkdir(parents=True)
        _check_space(aside, sum(a.nbytes for a in arrays.values()))
        # In a thread that is waited for, come what may: Orbax, interrupted half-way, leaves its
        # own threads writing, and the folder would come back after it is removed below.
        with ThreadPoolExecutor(1) as waited:
            waited.submit(_write, aside / ARRAYS, arrays).result()
        description = {
            "format": "jaxquant",
            "version": VERSION,
            "recipe": None if recipe is None else recipe.to_json(),
            "metadata": metadata or {},
            "leaves": leaves,
            "arrays": {n: {"shape": a.shape, "dtype": a.dtype.name} for n, a in arrays.items()},
            "files": _digests(aside / ARRAYS),
        }
        description["sha256"] = _sha256_of(description)
        (aside / DESCRIPTION).write_text(json.dumps(description))
        _swap(aside, target)
    except Exception as error:
        raise OSError(f"could not write {target}: {_line(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for folder in made:  # innermost first; those that now hold something stay
            with contextlib.suppress(OSError):
                folder.rmdir()


def _write(directory: Path, arrays: dict[str, Any]) -> None:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(directory, args=ocp.args.StandardSave(arrays))


def _check_space(folder: Path, needed: int) -> None:
    """Orbax compresses, so this asks for a little more than it will take; but on a disk that fills
    it prints tracebacks from threads of its own, which nobody can catch."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"No space left: {needed:,} bytes are needed, {free:,} are free")


def _swap(new: Path, target: Path) -> None:
    """Put `new` at `target`; what was there goes only once the new one is in its place."""
    old = new.with_suffix(".old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load(directory: str | Path) -> Checkpoint:
    """Read a checkpoint; nothing else is needed.

    Raises:
      ValueError: no checkpoint, one of a newer version, or a damaged one.
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
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            arrays = reader.restore(path / ARRAYS, args=ocp.args.StandardRestore(
                {name: jax.ShapeDtypeStruct(tuple(d["shape"]), d["dtype"])
                 for name, d in description["arrays"].items()}
            ))  # fmt: skip
    except Exception as error:
        raise ValueError(f"{path} is damaged: {_line(error)}") from error
    params = _unflatten(description["leaves"], arrays)
    return Checkpoint(params, stored_recipe(path), description["metadata"])


def stored_recipe(directory: str | Path) -> Recipe | None:
    """The recipe that made a checkpoint, if it says; arrays are not read.

    Raises:
      ValueError: no checkpoint, one of a newer version, or a damaged one.
    """
    recipe = _description(Path(directory).absolute())["recipe"]
    return None if recipe is None else Recipe.from_json(recipe)


def nbytes(directory: str | Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file())


def _description(path: Path) -> dict[str, Any]:
    if not is_checkpoint(path):
        raise ValueError(f"{path} is not a jaxquant checkpoint: it has no {DESCRIPTION}")
    try:
        value = json.loads((path / DESCRIPTION).read_text())
        version = int(value["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / DESCRIPTION} is damaged: {_line(error)}") from error
    if version > VERSION:
        raise ValueError(
            f"{path} has format version {version}, this jaxquant reads up to {VERSION}; upgrade it"
        )
    if value.pop("sha256", None) != _sha256_of(value):
        raise ValueError(f"{path / DESCRIPTION} is damaged: it differs from what was saved")
    if lacks := {"recipe", "metadata", "leaves", "arrays", "files"} - set(value):
        raise ValueError(f"{path / DESCRIPTION} is damaged: it lacks {', '.join(sorted(lacks))}")
    return value


def _sha256_of(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _flatten(params: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(description of every leaf, all arrays by name)."""
    _only_dicts(params)
    leaves: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for path, leaf in path_leaves(params):
        if isinstance(leaf, QTensor):
            static = {f: to_json(getattr(leaf, f)) for f in STATIC}
            kept = leaf.data
            if hasattr(leaf.format, "to_disk"):  # closer than what a product reads
                kept = leaf.format.to_disk(kept, leaf.stored_rows)
                static["kept"] = True
            named = {f"{path}:{part}": a for part, a in kept.items()}
            leaves.append({"path": path, "parts": list(kept), **static})
        else:
            named = {path: leaf}
            leaves.append({"path": path})
        arrays.update(named)
    if empty := [name for name, a in arrays.items() if a.size == 0]:
        raise ValueError(f"array {empty[0]!r} is empty; Orbax stores no empty arrays, drop it")
    if not arrays:
        raise ValueError("the tree holds no arrays; there is nothing to save")
    return leaves, arrays


def _only_dicts(tree: Any) -> None:
    if is_standin(tree) or hasattr(tree, "dtype"):
        return
    if not isinstance(tree, dict):
        raise ValueError(
            f"a checkpoint holds nested dicts of arrays, got {type(tree).__name__}; "
            f"convert first (nnx.to_pure_dict, for one)"
        )
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise ValueError(f'keys must be strings without "/", got {key!r}')
        _only_dicts(value)


def _unflatten(leaves: list[dict[str, Any]], arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for leaf in leaves:
        path = leaf["path"]
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if "parts" in leaf:
            data = {part: arrays[f"{path}:{part}"] for part in leaf["parts"]}
            static = {field: from_json(leaf[field]) for field in STATIC if field in leaf}
            # Once a text.
            static["activations"] = Activations.of(static.get("activations"))
            w = QTensor(data=data, **static)
            if "kept" in leaf:
                w = dataclasses.replace(w, data=w.format.from_disk(data, w.stored_rows))
            node[last] = w
        else:
            node[last] = arrays[path]
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
