"""The leaves of a checkpoint, each read when it is asked for; they need not fit in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxquant.storage.checkpoint import ARRAYS, check_files
from jaxquant.storage.description import Json, first_line
from jaxquant.storage.kept_arrays import kept_as, restored
from jaxquant.storage.leaves import rebuilt, stored_name
from jaxquant.storage.parts import PARTS


class Leaf(NamedTuple):
    """A leaf of a checkpoint that has not been read.

    Attributes:
      path: its path; layers that are stored in parts have the number of the part in it.
      read: function that returns the leaf: a NumPy array or a `QTensor`.
    """

    path: str
    read: Callable[[], Any]


def stored_leaves(directory: str | Path) -> list[Leaf]:
    """Return the leaves of a checkpoint that hold arrays, unread; the files are checked.

    Args:
      directory: the checkpoint.
    Returns:
      The leaves in the order of the tree, those of parts last. Python numbers, strings and random
      keys are left out.
    Raises:
      ValueError: there is no checkpoint, or it is damaged or was written in a newer format version.

    >>> import tempfile, jaxquant as jq
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jq.save(folder, {"w": np.ones((2, 3), np.float32), "step": 3})
    ...     [leaf] = stored_leaves(folder)
    ...     leaf.path, leaf.read().shape
    ('w', (2, 3))
    """
    path = Path(directory).absolute()
    return list(_leaves(path, check_files(path), ""))


def _leaves(folder: Path, description: Json, prefix: str) -> Iterator[Leaf]:
    for entry in description["leaves"]:
        if "type" not in entry and "key" not in entry:
            read = lambda entry=entry: _read(folder, description["arrays"], entry)
            yield Leaf(prefix + entry["path"], read)
    for name, digests in description.get(PARTS, {}).items():
        for i in range(len(digests)):
            part = folder / PARTS / name / str(i)
            yield from _leaves(part, check_files(part), f"{prefix}{name}/{i}/")


def _read(folder: Path, specs: Json, entry: Json) -> Any:
    """Return one leaf, by its arrays alone."""
    beginnings = {stored_name(entry["path"]), entry["path"]}
    names = [*beginnings, *(f"{b}:{part}" for b in beginnings for part in entry.get("parts", ()))]
    mine = {name: specs[name] for name in names if name in specs}
    try:
        return rebuilt(entry, _arrays(folder / ARRAYS, mine))
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise ValueError(f"{folder} is damaged: {first_line(error)}") from error


def _arrays(directory: Path, specs: Json) -> dict[str, Any]:
    empty = {name: d for name, d in specs.items() if 0 in d["shape"]}
    found: dict[str, Any] = {n: np.zeros(d["shape"], d["dtype"]) for n, d in empty.items()}
    wanted: dict[str, Any] = {}
    for name in specs.keys() - empty.keys():
        shape, dtype = kept_as(specs[name])
        wanted[name] = np.broadcast_to(np.zeros((), dtype), shape)
    if not wanted:
        return found
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        arrays = reader.restore(directory, args=args)
    return found | {name: restored(name, a, specs[name]) for name, a in arrays.items()}
