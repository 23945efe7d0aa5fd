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
PIECE = 1 << 28  # bytes that are broadcast at a time


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
      Exception: what `fn` raised, on the first process; on the others a ValueError if that was
        one, else an OSError.
    """
    if not several():
        return fn()
    said: dict[str, Any] = {}
    failed: BaseException | None = None
    if is_first():
        try:
            said = {"value": fn()}
        except Exception as error:
            said, failed = {"error": isinstance(error, ValueError), "text": str(error)}, error
    said = json.loads(_broadcast(json.dumps(said).encode()))
    if failed is not None:
        raise failed
    if "error" in said:
        kind = ValueError if said["error"] else OSError
        raise kind(f"on the first host: {said['text']}")
    return said["value"]


def everywhere(fn: Callable[[], None]) -> None:
    """Run `fn` on every process, and raise on all of them where it failed on one.

    Args:
      fn: the function, in which the processes may wait for each other.
    Raises:
      Exception: what `fn` raised on this process.
      OSError: it failed on other processes only.
    """
    failed: Exception | None = None
    try:
        fn()
    except Exception as error:
        failed = error
    if several():
        every = multihost_utils.process_allgather(np.int32(failed is not None)).reshape(-1)
        if failed is None and every.any():
            raise OSError(f"host {int(np.argmax(every))} failed; see its error")
    if failed is not None:
        raise failed


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
    send = lambda a: np.asarray(multihost_utils.broadcast_one_to_all(a))
    # As bytes, because JAX cuts integers to 32 bits.
    size = int.from_bytes(send(np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)), "little")
    mine = np.frombuffer(data, np.uint8)
    parts = []
    for start in range(0, size, PIECE):
        length = min(PIECE, size - start)
        one = mine[start : start + length] if is_first() else np.zeros(length, np.uint8)
        parts.append(send(one).tobytes())
    return b"".join(parts)
