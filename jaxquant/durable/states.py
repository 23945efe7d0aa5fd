"""States of long runs as a store keeps them: the arrays of a tree, and a digest of the inputs."""

import hashlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.durable.store import Arrays, Finished

BEGUN = "begun"  # beside what is kept: the mark of what it was made from


def as_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """Copy the leaves of a tree to NumPy arrays named by their number; the inverse of `as_tree`.

    Args:
      tree: a tree of arrays, numbers and random keys.

    >>> as_arrays({"a": jnp.ones(2), "b": 3})
    {'0': array([1., 1.], dtype=float32), '1': array(3)}
    """
    return {str(i): np.array(_data(a)) for i, a in enumerate(jax.tree.leaves(tree))}


def as_tree(arrays: Mapping[str, Array | np.ndarray], like: PyTree) -> PyTree:
    """Rebuild the tree whose leaves were stored; random keys (`jax.random.key`) come back as keys.

    Args:
      arrays: the result of `as_arrays`; it may contain other arrays too.
      like: a tree of the same structure, with keys where there were keys, and with arrays in the
        memory of the host where the result is to have such.

    >>> as_tree(as_arrays({"a": jnp.ones(2)}), {"a": 0})
    {'a': Array([1., 1.], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(like)
    found = [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
    for i, leaf in enumerate(leaves):
        if _is_key(leaf):
            found[i] = jax.random.wrap_key_data(found[i], impl=jax.random.key_impl(leaf))
        elif isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == "pinned_host":
            found[i] = jax.device_put(found[i], leaf.sharding)  # a paged state stays paged
    return jax.tree.unflatten(structure, found)


def mark(text: str, tree: PyTree) -> np.ndarray:
    """Return a digest of everything that determines a result, to recognize results of other inputs.

    Args:
      text: the settings.
      tree: the arrays; all of their bytes are read.

    Returns:
      16 bytes, uint8.
    """
    digest = hashlib.blake2b(f"{text}{jax.tree.structure(tree)}".encode(), digest_size=16)
    for leaf in map(_data, jax.tree.leaves(tree)):
        # A device array caches its host copy, so a temporary copy is read instead of the weight.
        elsewhere = isinstance(leaf, jax.Array) and jax.default_backend() != "cpu"
        a = np.ascontiguousarray(jnp.copy(leaf) if elsewhere else leaf)
        digest.update(f"{a.dtype}{a.shape}".encode())
        digest.update(a.reshape(-1).view(np.uint8).data)
    return np.frombuffer(digest.digest(), np.uint8)


class Remembered:
    """Results of one kind of work in a store; what was made from other inputs is made again.

    Args:
      finished: the store; None: nothing is kept, and no input is read.
      text: settings that decide the results, in words.
      tree: the arrays that decide them; its other leaves are not looked at.

    >>> kept = {}
    >>> for weight in (1.0, 1.0, 2.0):
    ...     results = Remembered(kept, "squares", jnp.array(weight))
    ...     found = results.get("w", lambda: print("computing") or {"loss": np.float64(weight**2)})
    ...     print(float(found["loss"]))
    computing
    1.0
    1.0
    computing
    4.0
    """

    def __init__(self, finished: Finished | None, text: str, tree: PyTree) -> None:
        self.finished: Finished = {} if finished is None else finished
        leaves = jax.tree.leaves(tree)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
        self.begun = np.zeros(0, np.uint8) if finished is None else mark(text, arrays)

    def get(self, name: str, compute: Callable[[], Arrays]) -> dict[str, Array | np.ndarray]:
        """Return what is kept under a name, or else compute it and keep it."""
        found = dict(self.finished.get(name, {}))
        if not np.array_equal(found.pop(BEGUN, ()), self.begun) or not found:
            found = dict(compute())
            self.finished[name] = found | {BEGUN: self.begun}
        return found


def _is_key(leaf: Array) -> bool:
    """Return whether a leaf is a `jax.random.key`, which NumPy cannot hold."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)


def _data(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf
