"""Rotation of the residual stream, folded into every weight that reads or writes the stream.

An RMS norm without a gain commutes with rotations. For an orthonormal Q, a model with the stream
x Q, weights Q^T W where it is read and W Q where it is written is therefore the same function
(SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024; QuaRot, arXiv:2404.00456). No work is left at
run time.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import matches, path_leaves, replace_leaves


@dataclasses.dataclass(frozen=True)
class Residual:
    """How a model uses its residual stream of d channels.

    Attributes:
      writes: globs of the leaves whose last axis is added to the stream or creates it (an
        embedding).
      reads: {path of an RMS norm's gain [..., d]: globs of the matrices [..., d, n] that read the
        norm's output}. Nothing else may read that output.
    """

    writes: Sequence[str]
    reads: Mapping[str, Sequence[str]]

    def split(self, name: str) -> tuple["Residual", "Residual"]:
        """Return the use of the stream within the entry `name` of the tree, and that by the rest.

        Args:
          name: name of the entry, such as "layers"; every glob lies within it or outside of it.
        """
        inside = lambda glob: glob.startswith(f"{name}/")
        parts = []
        for wanted in (True, False):
            writes = [glob for glob in self.writes if inside(glob) is wanted]
            reads = {gain: globs for gain, globs in self.reads.items() if inside(gain) is wanted}
            parts.append(Residual(writes, reads))
        return parts[0], parts[1]


def rotate_residual(params: PyTree, residual: Residual, rotation: Float[Array, "d d"]) -> PyTree:
    """Rotate the residual stream of a model without changing its function; norm gains become ones.

    Args:
      params: tree of floating-point arrays; stacks of layers have the layer axis first, and stacks
        of experts within them the axis of experts next.
      residual: which leaves read and write the stream.
      rotation: orthonormal matrix [d, d].
    Returns:
      The rotated tree, each leaf in its own dtype.
    Raises:
      ValueError: a glob matches nothing, a leaf has another number of channels, or `rotation` is
        not orthonormal.

    >>> from pallas_kernels import hadamard
    >>> p = {"in": jnp.eye(4), "gain": jnp.arange(1.0, 5), "out": jnp.ones((4, 2))}
    >>> norm = lambda h: h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True))
    >>> fn = lambda p, x: (norm(x @ p["in"]) * p["gain"]) @ p["out"]
    >>> stream, turn = Residual(["in"], {"gain": ["out"]}), hadamard.transform(p["in"])
    >>> turned = rotate_residual(p, stream, turn)
    >>> x = jnp.array([[1.0, -2.0, 0.5, 3.0]])
    >>> bool(jnp.allclose(fn(turned, x), fn(p, x), atol=1e-5)), turned["gain"].tolist()
    (True, [1.0, 1.0, 1.0, 1.0])
    """
    check_arguments(rotate_residual, locals())
    d = len(rotation)
    if rotation.shape != (d, d) or not jnp.allclose(rotation @ rotation.T, jnp.eye(d), atol=1e-4):
        raise ValueError("the rotation must be a square matrix with orthonormal rows")
    leaves = dict(path_leaves(params))
    new = dict(leaves)
    exact = lambda a, b: jnp.matmul(a, b, precision="highest")
    for path in _named(leaves, residual.writes):
        _check(path, leaves[path].shape[-1], d)
        new[path] = exact(leaves[path], rotation)
    for gain, globs in residual.reads.items():
        (gain,) = _named(leaves, [gain])
        _check(gain, leaves[gain].shape[-1], d)
        for path in _named(leaves, globs):
            _check(path, leaves[path].shape[-2], d)
            new[path] = exact(rotation.T, _rows(leaves[gain], new[path]) * new[path])
        new[gain] = jnp.ones_like(leaves[gain])
    changed = {p: new[p].astype(leaves[p].dtype) for p in new if new[p] is not leaves[p]}
    return replace_leaves(params, changed)


def _named(leaves: Mapping[str, Array], globs: Sequence[str]) -> list[str]:
    found = [[path for path in leaves if matches(path, glob)] for glob in globs]
    for glob, paths in zip(globs, found, strict=True):
        if not paths:
            raise ValueError(f"{glob!r} matches no leaf of the tree")
    return list(dict.fromkeys(path for paths in found for path in paths))


def _rows(gain: Array, w: Array) -> Array:
    """Return the gain [*batch, d] as factors of the rows of w [*batch, ..., d, n]."""
    more = (1,) * (w.ndim - gain.ndim - 1)  # such as the axis of experts
    return gain.reshape(*gain.shape[:-1], *more, gain.shape[-1], 1)


def _check(path: str, size: int, d: int) -> None:
    if size != d:
        raise ValueError(f"{path}: expected {d} channels of the residual stream, got {size}")
