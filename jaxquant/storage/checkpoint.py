"""Checkpoints: one self-describing directory, with arrays stored by Orbax and one JSON file."""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jaxtyping import Array, PyTree

from jaxquant.core import hosts
from jaxquant.core.paths import path_leaves
from jaxquant.core.tensor import QTensor
from jaxquant.durable.publish import aside, check_parent, publish, restore
from jaxquant.lossless.arrays import codable, encode_array
from jaxquant.recipes.recipe import Recipe
from jaxquant.storage.containers import check_like, filled, outlined, placed, some
from jaxquant.storage.description import (
    FILE,
    Json,
    digests,
    first_line,
    is_checkpoint,
    read_description,
    write_description,
)
from jaxquant.storage.kept_arrays import STORED_AS, kept_as, restored
from jaxquant.storage.leaves import described, rebuilt, shardings_of
from jaxquant.storage.outlines import WIDE, outline, outline_in
from jaxquant.storage.parts import PARTS, Parts, check_parts, joined, linked, parts_of

ARRAYS = "arrays"


def check_target(directory: str | Path, overwrite: bool = False) -> Path:
    """Return the resolved path of a directory if a checkpoint may be written there.

    Args:
      directory: the directory to write.
      overwrite: whether an existing checkpoint may be replaced. Default: False.
    Raises:
      ValueError: the directory is not empty and `overwrite` is False; it contains anything but a
        checkpoint; it is a file; or its parent is not a writable directory.
    """
    path = Path(directory).resolve()  # follow symbolic links
    restore(path)
    held = set(os.listdir(path)) if path.is_dir() else set()
    if held and overwrite:
        if not is_checkpoint(path) or not (path / ARRAYS).is_dir():
            raise ValueError(f"{path} is not a jaxquant checkpoint; it will not be overwritten")
        own = {FILE, ARRAYS} | ({PARTS} & read_description(path).keys())
        if others := sorted(held - own):
            raise ValueError(
                f"{path} holds a checkpoint and also {some(others)}, which would be lost; "
                "it will not be overwritten: move the other files, or write elsewhere"
            )
    elif held or (path.exists() and not path.is_dir()):
        raise ValueError(
            f"{path} exists and is not an empty directory; pass overwrite=True "
            "(--overwrite), or write elsewhere"
        )
    check_parent(path)
    return path


def save(
    directory: str | Path,
    tree: PyTree,
    *,
    recipe: Recipe | None = None,
    metadata: Json | None = None,
    overwrite: bool = False,
    parts: Parts | None = None,
    lossless: bool = False,
) -> None:
    """Write a tree of arrays and `QTensor`s atomically.

    If the process is killed, the directory holds either its previous contents or the new
    checkpoint; the next `save` to the same directory removes leftover temporary files.

    In a program of several processes (`jax.distributed`), all of them must call `save` with the
    same arguments. Each process writes its own shards, to a file system that all of them share.

    Args:
      directory: the directory to write, which is created if it is missing. It may exist only if it
        is empty or, with `overwrite`, if it is a checkpoint.
      tree: any JAX pytree: parameters, a Flax NNX `State`, an Equinox module, a whole training
        state. For an NNX model, pass `nnx.state(model)`, which holds each shared `Variable` only
        once (`nnx.split(model)` works too). Leaves are arrays of any numeric dtype, random keys,
        Python numbers, strings, None and QTensors, packed or latent. Functions in the tree are not
        stored; `load` returns None in their place, unless its `like` has them.
      recipe: the recipe that made the tree, to store with it; `storage.stored_recipe` reads it.
      metadata: JSON values to store with it (a model's configuration, its tokenizer);
        `storage.stored_metadata` reads them.
      overwrite: whether to replace an existing checkpoint. Default: False.
      parts: {name: directories} for further entries of `tree`, which must then be a dict, that were
        saved a few layers at a time, because they may not fit in memory. Each directory is a
        checkpoint of the same number of consecutive layers; its leaves are arrays whose leading
        axis is that of the layers, or `QTensor`s of such arrays. `load` joins them along that axis,
        and raises ValueError if they do not match. The new checkpoint shares the files of the parts
        by hard links, or copies them if the file system does not support these. Default: none.
      lossless: whether all arrays are stored in fewer bytes, from which they come back bit for bit
        (`jaxquant.lossless`): about 10.7 bits per bfloat16 number. Weights in the formats of
        `jaxquant.lossless` are always stored so. Arrays that are split over several processes are
        not. Default: False.
    Raises:
      ValueError: the directory exists and may not be replaced (another process may have written it
        in the meantime); its parent is not a writable directory; the tree has no leaves, or it has
        a leaf or a key that cannot be stored; the metadata is not JSON; `parts` is not as described
        above; or the arguments differ between processes.
      OSError: the disk is full or not writable, or the processes do not share it; no incomplete
        checkpoint remains.

    >>> import tempfile, jaxquant as jq
    >>> params = jq.quantize({"w": jnp.eye(64), "b": jnp.zeros(64)}, jq.rtn(bits=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, {"params": params, "step": 100})
    ...     back = load(folder)
    >>> back["step"], type(back["params"]["w"]).__name__
    (100, 'QTensor')
    """
    target = Path(hosts.first(lambda: str(check_target(directory, overwrite))))
    outline, leaves, arrays, specs = _flatten(tree, lossless)
    held = parts_of(tree, parts or {})
    description = {
        "recipe": None if recipe is None else recipe.to_json(),
        "metadata": _as_json(metadata or {}),
        "tree": outline,
        "leaves": leaves,
        "arrays": specs,
        **held,
    }
    hosts.agree(directory=str(directory), tree=description, overwrite=overwrite)
    try:
        with hosts.led(aside(target)) as new:
            _fill(new, description, arrays, parts or {})
            hosts.first(lambda: _publish(new, target, overwrite))
    except OSError as error:
        raise OSError(f"could not write {target}: {first_line(error)}") from error


def _publish(new: Path, target: Path, overwrite: bool) -> None:
    try:
        if os.path.lexists(target):
            check_target(target, overwrite)  # it may have changed meanwhile
        publish(new, target, replace=overwrite)
    except FileExistsError:
        raise ValueError(
            f"{target} was created by another process in the meantime; it was not overwritten"
        ) from None


def _flatten(
    tree: PyTree, lossless: bool
) -> tuple[Any, list[Json], dict[str, Array], dict[str, Json]]:
    """Return the outline of a tree, the description of every leaf, and all arrays by name.

    Arrays are as they are stored, and described as they are in the tree.
    """
    outline, leaves = outlined(tree)
    if not leaves:
        raise ValueError("the tree holds no leaves; there is nothing to save")
    entries: list[Json] = []
    arrays: dict[str, Array] = {}
    specs: dict[str, Json] = {}
    for path, leaf in leaves.items():
        one, its = described(path, leaf)
        entries.append(one)
        exact = isinstance(leaf, QTensor) and leaf.format.exact
        for name, a in its.items():
            specs[name] = {"shape": a.shape, "dtype": a.dtype.name}
            arrays[name] = a
            if (lossless or exact) and codable(a):
                stream: Any = encode_array(np.asarray(a))
                arrays[name], specs[name]["coded"] = stream, stream.nbytes
    return outline, entries, arrays, specs


def _as_json(metadata: Json) -> PyTree:
    """Return the values as JSON returns them when they are read back."""
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be JSON values: {first_line(error)}") from None


def _fill(folder: Path, description: Json, arrays: dict[str, Array], parts: Parts) -> None:
    def begin() -> None:
        folder.mkdir()
        linked(parts, folder)
        _check_space(folder, sum(a.nbytes for a in arrays.values()))

    hosts.first(begin)
    hosts.everywhere(lambda: _check_shared(folder))

    def write() -> None:
        # This runs in a thread, and the program always waits for it: when Orbax is interrupted, its
        # own threads keep writing, and would recreate the folder after it has been removed.
        with ThreadPoolExecutor(1) as waited:
            waited.submit(_write, folder / ARRAYS, arrays).result()

    try:
        hosts.everywhere(write)
    except Exception as error:
        raise OSError(first_line(error)) from error
    hosts.first(
        lambda: write_description(folder, {**description, "files": digests(folder / ARRAYS)})
    )


def _check_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(
            f"host 0 created {folder}, but this host cannot see it; save to a file system that all "
            "hosts share"
        )


def _write(directory: Path, arrays: dict[str, Array]) -> None:
    """Write all arrays except the empty ones, which Orbax does not store."""
    kept = {name: _storable(a) for name, a in arrays.items() if a.size}
    if not kept:
        if hosts.is_first():
            directory.mkdir()
        return
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(directory, args=ocp.args.StandardSave(kept))


def _storable(a: Any) -> Any:
    own = hosts.several() and isinstance(a, jax.Array) and a.is_fully_addressable
    a = np.asarray(a) if own or isinstance(a, np.generic) else a  # host 0 writes these
    return a.astype(STORED_AS[a.dtype.name]) if a.dtype.name in STORED_AS else a


def _check_space(folder: Path, needed: int) -> None:
    """Raise OSError if the disk lacks space for the uncompressed arrays.

    Orbax needs a little less, but on a full disk its threads print uncatchable tracebacks.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"No space left: {needed:,} bytes are needed, {free:,} are free")


def load(directory: str | Path, *, like: PyTree = None) -> PyTree:
    """Read the tree of a checkpoint.

    Each array is placed on the devices from which it was saved, or on the default device if this
    process does not have them. Arrays that are sharded over several devices in `like` get those
    shardings. Arrays of 64 bits per number, and complex128 ones, are returned as NumPy arrays
    unless `jax_enable_x64` is on.

    In a program of several processes (`jax.distributed`), all of them must call `load`. Each
    process reads its own shards of the arrays that are sharded in `like`, and the whole of the
    other arrays, which it places on its default device.

    Args:
      directory: the checkpoint.
      like: a tree of arrays or abstract values (`jax.eval_shape`) with the same paths and shapes as
        the saved tree. The result has the containers of `like`, and the dtypes that were saved,
        even if those of `like` differ. For
        a quantized checkpoint, `like` may be the unquantized tree: `QTensor`s then replace its
        weights, and shardings of these weights have no effect. If None (the default), the result
        consists of dicts, lists and tuples; other containers become dicts of their fields.
    Returns:
      The tree.
    Raises:
      ValueError: there is no checkpoint; the checkpoint is damaged or was written in a newer format
        version; `like` has different paths or shapes; or a sharding in `like` does not divide its
        array evenly.
      PermissionError: the files may not be read.
      MemoryError, jax.errors.JaxRuntimeError: the arrays do not fit in memory.

    >>> import tempfile
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, nnx.state(model))
    ...     state = load(folder, like=nnx.state(model))
    >>> nnx.update(model, state)
    """
    path = Path(directory).absolute()

    def check() -> None:
        if like is not None:
            check_like(like, dict(path_leaves(outline(path))))
        # Checked before Orbax opens the files, because its errors are long and come from threads.
        check_files(path, parts=False)  # parts: when they are loaded

    hosts.first(check)
    description, places = read_description(path), shardings_of(like)
    try:
        arrays = dict(_read(path / ARRAYS, description["arrays"], places))
        paths = [entry["path"] for entry in description["leaves"]]
        leaves = [rebuilt(entry, arrays) for entry in description["leaves"]]
        tree = filled(outline_in(description, paths), leaves)
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # of this machine, such as too little memory; the checkpoint is not damaged
    except Exception as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error
    if PARTS in description:
        tree = tree | joined(path, description[PARTS], load)
        return tree if like is None else placed(like, dict(path_leaves(tree)))
    return tree if like is None else placed(like, dict(zip(paths, leaves, strict=True)))


def check_files(directory: str | Path, parts: bool = True) -> Json:
    """Check the files of a checkpoint's arrays, and return the description of the checkpoint.

    Args:
      directory: the checkpoint.
      parts: whether the files of its parts are checked too. Default: True.
    Raises:
      ValueError: there is no checkpoint, or it is damaged or was written in a newer format version.
    """
    path = Path(directory).absolute()
    description = read_description(path)
    found = digests(path / ARRAYS)
    for name, digest in description["files"].items():
        if found.get(name) != digest:
            state = "differs from what was saved" if name in found else "is missing"
            raise ValueError(f"{path} is damaged: {ARRAYS}/{name} {state}")
    if parts and PARTS in description:
        check_parts(path, description[PARTS], check_files)
    return description


def _read(
    directory: Path, specs: Mapping[str, Json], places: Mapping[tuple, Sharding]
) -> dict[str, Any]:
    """Read all arrays of `_write`; of those in `places`, only the shards of this process."""
    found: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    enabled = jnp.result_type(float) == np.float64  # jax_enable_x64
    here = jnp.zeros(()).sharding  # for arrays whose devices are not in this process
    own = here if hosts.several() else None
    for name, d in specs.items():
        shape, dtype = tuple(d["shape"]), d["dtype"]
        as_numpy = dtype in WIDE and not enabled  # JAX would cut these to 32 bits
        if "coded" in d:
            wanted[name] = jax.ShapeDtypeStruct(*kept_as(d), sharding=own)
        elif 0 in shape:
            found[name] = (np if as_numpy else jnp).zeros(shape, dtype)
        elif as_numpy:
            wanted[name] = np.empty(shape, dtype)
        else:
            place = places.get((name, shape), own)
            wanted[name] = jax.ShapeDtypeStruct(*kept_as(d), sharding=place)
    if not wanted:
        return found
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        args = ocp.args.StandardRestore(wanted, fallback_sharding=here)
        arrays = reader.restore(directory, args=args)
    for name, a in arrays.items():
        d = specs[name]
        a = restored(name, a, d)
        if "coded" in d and not (d["dtype"] in WIDE and not enabled):
            place = places.get((name, tuple(d["shape"])))
            a = jnp.asarray(a) if place is None else jax.device_put(a, place)
        found[name] = a
    return found


def nbytes(directory: str | Path) -> int:
    """Return the total size of the files in a checkpoint's directory, in bytes."""
    return sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file())
