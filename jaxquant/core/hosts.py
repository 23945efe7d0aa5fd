"""What the processes of one distributed program (hosts) do together.

With a single process, everything here is what that process does alone.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

T = TypeVar("T")


def several() -> bool:
    """Return whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process is the one that writes for all."""
    return jax.process_index() == 0


def on_host(a: Any) -> np.ndarray:
    """Return a whole array as NumPy, also where this process holds only a part of it.

    All processes must call it.

    Args:
      a: the array.
    """
    if isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(a, tiled=True))
    return np.asarray(a)


def whole(tree: PyTree) -> PyTree:
    """Return a tree with whole arrays: as it is in a single process, else with those of `on_host`.

    All processes must call it.

    Args:
      tree: tree of arrays.
    """
    return jax.tree.map(on_host, tree) if several() else tree


def first(fn: Callable[[], T]) -> T:
    """Return what `fn` returns on the first process; it runs there only.

    All processes must call it.

    Args:
      fn: function that returns a JSON value.
    Raises:
      ValueError, OSError: what `fn` raised on the first process, on every process.
    """
    if not several():
        return fn()
    said: dict[str, Any] = {}
    failed: BaseException | None = None
    if is_first():
        try:
            said = {"value": fn()}
        except (ValueError, OSError) as error:
            said, failed = {"error": type(error).__name__, "text": str(error)}, error
    said = json.loads(_broadcast(json.dumps(said).encode()))
    if failed is not None:
        raise failed
    if "error" in said:
        kind = ValueError if said["error"] == "ValueError" else OSError
        raise kind(f"on the first host: {said['text']}")
    return said["value"]


@contextlib.contextmanager
def led(path: AbstractContextManager[Path]) -> Iterator[Path]:
    """Enter a context on the first process only, and yield its path on all of them.

    Args:
      path: the context.
    """
    if not several():
        with path as found:
            yield found
        return
    with contextlib.ExitStack() as held:
        yield Path(first(lambda: str(held.enter_context(path))))


def arrays(of: Callable[[], Mapping[str, Any] | None]) -> dict[str, np.ndarray] | None:
    """Return the arrays, or None, that `of` returns on the first process; it runs there only.

    Args:
      of: function that returns arrays by name, or None.
    """
    found: dict[str, np.ndarray] | None = None

    def outline() -> dict[str, Any] | None:
        nonlocal found
        given = of()
        if given is None:
            return None
        found = {name: np.asarray(a) for name, a in given.items()}
        return {name: [list(a.shape), a.dtype.name] for name, a in found.items()}

    said = first(outline)
    if said is None:
        return None
    data = b"" if found is None else b"".join(a.tobytes() for a in found.values())
    data, out, at = _broadcast(data), {}, 0
    for name, (shape, dtype) in said.items():
        count = int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize
        out[name] = np.frombuffer(data[at : at + count], jnp.dtype(dtype)).reshape(shape)
        at += count
    return out


def agree(**values: Any) -> None:
    """Raise ValueError on every process unless all processes pass equal values.

    Args:
      **values: what must be equal, by name; compared by `repr`.
    """
    if not several():
        return
    mine = [hashlib.sha256(repr(value).encode()).digest() for value in values.values()]
    every = multihost_utils.process_allgather(np.frombuffer(b"".join(mine), np.uint8))
    every = every.reshape(jax.process_count(), len(values), -1)
    for i, name in enumerate(values):
        differs = [p for p in range(len(every)) if (every[p, i] != every[0, i]).any()]
        if differs:
            raise ValueError(
                f"{name} differs between hosts: that of host {', '.join(map(str, differs))} is not "
                "that of host 0; run the same command on all of them"
            )


def wait(name: str) -> None:
    """Return once all processes have called it.

    Args:
      name: what is waited for.
    """
    if several():
        multihost_utils.sync_global_devices(name)


def _broadcast(data: bytes) -> bytes:
    """Return the bytes that the first process passed."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = np.zeros(size, np.uint8)
    if is_first():
        sent[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes() if size else b""
