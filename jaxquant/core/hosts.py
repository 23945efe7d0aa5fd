"""Operations that the processes (hosts) of a distributed program carry out together.

In a program of a single process, each of them is the corresponding operation of that process.
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
PIECE = 1 << 28  # bytes of one broadcast


def several() -> bool:
    """Return whether the program runs in more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process is host 0, which writes files for all."""
    return jax.process_index() == 0


def on_host(a: Any) -> np.ndarray:
    """Return a whole array as a NumPy array, even if this process holds only a part of it.

    All processes must call it.

    Args:
      a: the array, of any shape and dtype.
    """
    if isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(a, tiled=True))
    return np.asarray(a)


def whole(tree: PyTree) -> PyTree:
    """Return a tree whose arrays are whole: unchanged in a single process, else of `on_host`.

    All processes must call it.

    Args:
      tree: tree of arrays.
    """
    return jax.tree.map(on_host, tree) if several() else tree


def first(fn: Callable[[], T]) -> T:
    """Run `fn` on host 0 only, and return its result on every host.

    All processes must call it.

    Args:
      fn: function that returns a JSON value.
    Raises:
      Exception: on host 0, whatever `fn` raised. The other hosts raise ValueError if that was a
        ValueError, and otherwise OSError.
    """
    if not several():
        return fn()
    text = ""
    failed: BaseException | None = None
    if is_first():
        try:
            text = json.dumps({"value": fn()})
        except Exception as error:
            text = json.dumps({"error": isinstance(error, ValueError), "text": str(error)})
            failed = error
    result = json.loads(_broadcast(text.encode()))
    if failed is not None:
        raise failed
    if "error" in result:
        kind = ValueError if result["error"] else OSError
        raise kind(f"on the first host: {result['text']}")
    return result["value"]


def everywhere(fn: Callable[[], None]) -> None:
    """Run `fn` on every process, and raise an error on all of them if it fails on any.

    All processes must call it.

    Args:
      fn: the function; the processes may wait for each other in it.
    Raises:
      Exception: whatever `fn` raised on this process.
      OSError: `fn` failed on other processes only.
    """
    failed: Exception | None = None
    try:
        fn()
    except Exception as error:
        failed = error
    if several():
        every = multihost_utils.process_allgather(np.int32(failed is not None)).reshape(-1)
        if failed is None and every.any():
            raise OSError(f"host {int(np.argmax(every))} failed; see the error in its output")
    if failed is not None:
        raise failed


@contextlib.contextmanager
def led(path: AbstractContextManager[Path]) -> Iterator[Path]:
    """Enter a context manager on host 0 only, and yield its path on all hosts.

    All processes must call it.

    Args:
      path: the context manager; only that of host 0 is entered.
    """
    if not several():
        with path as found:
            yield found
        return
    with contextlib.ExitStack() as held:
        yield Path(first(lambda: str(held.enter_context(path))))


def arrays(of: Callable[[], Mapping[str, Any] | None]) -> dict[str, np.ndarray] | None:
    """Run `of` on host 0 only, and return its arrays on every host.

    All processes must call it.

    Args:
      of: function that returns a mapping from names to arrays, or None.
    Returns:
      A dict of NumPy arrays, or None if `of` returned None.
    Raises:
      Exception: as in `first`.
    """
    found: dict[str, np.ndarray] | None = None

    def outline() -> dict[str, Any] | None:
        nonlocal found
        given = of()
        if given is None:
            return None
        found = {name: np.asarray(a) for name, a in given.items()}
        return {name: [list(a.shape), a.dtype.name] for name, a in found.items()}

    described = first(outline)
    if described is None:
        return None
    data = b"" if found is None else b"".join(a.tobytes() for a in found.values())
    data, out, at = _broadcast(data), {}, 0
    for name, (shape, dtype) in described.items():
        count = int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize
        out[name] = np.frombuffer(data[at : at + count], jnp.dtype(dtype)).reshape(shape)
        at += count
    return out


def agree(**values: Any) -> None:
    """Raise ValueError on every process unless all processes pass equal values.

    All processes must call it.

    Args:
      **values: the values that must be equal, by name. They are compared as JSON, and what JSON
        does not know by `repr`.
    Raises:
      ValueError: a value differs between hosts; the message names it and the hosts.
    """
    if not several():
        return
    text = lambda value: json.dumps(value, sort_keys=True, default=repr)
    mine = [hashlib.sha256(text(value).encode()).digest() for value in values.values()]
    every = multihost_utils.process_allgather(np.frombuffer(b"".join(mine), np.uint8))
    every = every.reshape(jax.process_count(), len(values), -1)
    for i, name in enumerate(values):
        differs = [p for p in range(len(every)) if (every[p, i] != every[0, i]).any()]
        if differs:
            raise ValueError(
                f"{name} differs between hosts: that of host {', '.join(map(str, differs))} is not "
                "that of host 0; run the same command on all hosts"
            )


def wait(name: str) -> None:
    """Wait until all processes have called this function with the same name.

    Args:
      name: name of the point in the program at which the processes wait for each other.
    """
    if several():
        multihost_utils.sync_global_devices(name)


def _broadcast(data: bytes) -> bytes:
    """Return the bytes that the first process passed."""
    send = lambda a: np.asarray(multihost_utils.broadcast_one_to_all(a))
    # The size travels as bytes, because JAX truncates integers to 32 bits.
    size = int.from_bytes(send(np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)), "little")
    mine = np.frombuffer(data, np.uint8)
    parts = []
    for start in range(0, size, PIECE):
        length = min(PIECE, size - start)
        one = mine[start : start + length] if is_first() else np.zeros(length, np.uint8)
        parts.append(send(one).tobytes())
    return b"".join(parts)
