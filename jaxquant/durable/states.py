"""States of long work as a store keeps them: the arrays of a tree, and what the work began with."""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def as_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """Copies of the leaves of a tree, by their number; the inverse of `as_tree`.

    >>> as_arrays({"a": jnp.ones(2), "b": 3})
    {'0': array([1., 1.], dtype=float32), '1': array(3)}
    """
    return {str(i): np.array(a) for i, a in enumerate(jax.tree.leaves(tree))}


def as_tree(arrays: Mapping[str, Array | np.ndarray], like: PyTree) -> PyTree:
    """The tree whose leaves were kept; `arrays` may hold others beside them.

    Args:
      arrays: what `as_arrays` gave.
      like: a tree of the same structure.

    >>> as_tree(as_arrays({"a": jnp.ones(2)}), {"a": 0})
    {'a': Array([1., 1.], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))])


def mark(text: str, tree: PyTree) -> np.ndarray:
    """A digest of what decides a result; what is kept under another mark is of other work.

    Args:
      text: settings, in words.
      tree: arrays; all of their bytes are read.
    Returns:
      16 bytes, uint8.
    """
    digest = hashlib.blake2b(f"{text}{jax.tree.structure(tree)}".encode(), digest_size=16)
    for leaf in jax.tree.leaves(tree):
        a = np.asarray(leaf)
        digest.update(f"{a.dtype}{a.shape}".encode())
        digest.update(a.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
