"""Parts of a checkpoint: stacks of layers that were written a few layers at a time.

A part is itself a checkpoint, in a directory inside that of the whole checkpoint. The description
of the whole holds a digest of each part's description, which holds digests of the part's files.
"""

import dataclasses
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxquant.core.host_arrays import aligned, taken
from jaxquant.core.standin import is_standin
from jaxquant.core.tensor import QTensor
from jaxquant.formats.exact_format import ExactFormat, bits_of
from jaxquant.storage.description import FILE, Json, is_checkpoint

PARTS = "parts"  # key of a description, and name of a directory
Parts = Mapping[str, Sequence[Path]]  # the directories of the parts of each entry of the tree


def parts_of(tree: PyTree, parts: Parts) -> Json:
    """Return the description of the parts: {"parts": {name: digests}}, or {} if there are none.

    Args:
      tree: the rest of the tree.
      parts: the directories of the parts of each entry.
    Raises:
      ValueError: the tree is not a dict, an entry has no parts or is in the tree too, or a
        directory is not a checkpoint.
    """
    if not parts:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"a tree with parts must be a dict, got {type(tree).__name__}")
    if empty := [name for name, paths in parts.items() if not paths]:
        raise ValueError(
            f"the entry {empty[0]!r} has no parts; give at least one directory, or leave it out"
        )
    if both := sorted(set(tree) & set(parts)):
        raise ValueError(
            f"the entry {both[0]!r} is given in the tree and in parts; give it in one of them"
        )
    return {PARTS: {name: [_digest(path) for path in paths] for name, paths in parts.items()}}


def linked(parts: Parts, folder: Path) -> None:
    """Put the parts into a checkpoint that is being written, by hard links if possible.

    Args:
      parts: the directories of the parts of each entry.
      folder: the directory of the checkpoint.
    """
    for name, paths in parts.items():
        for i, path in enumerate(paths):
            shutil.copytree(path, folder / PARTS / name / str(i), copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def check_parts(
    folder: Path, stored: Mapping[str, list[str]], check: Callable[[Path], object]
) -> None:
    """Raise ValueError if a part is missing, damaged or from another run.

    Args:
      folder: the directory of the checkpoint.
      stored: digests of the parts of each entry, from the description.
      check: function that checks the checkpoint in a directory.
    """
    for name, digests in stored.items():
        for i, digest in enumerate(digests):
            part = folder / PARTS / name / str(i)
            _check(part, digest)
            check(part)


def _check(part: Path, digest: str) -> None:
    if not is_checkpoint(part) or _digest(part) != digest:
        state = "differs from what was saved" if part.exists() else "is missing"
        raise ValueError(f"{part} is damaged: it {state}")


def joined(
    folder: Path, stored: Mapping[str, list[str]], load: Callable[[Path], PyTree]
) -> dict[str, PyTree]:
    """Return the entries that are stored in parts, each joined along the leading axis.

    On a CPU, memory holds one part in addition to the result. A leaf whose parts differ in dtype is
    briefly held twice, when it is converted to the wider dtype.

    Args:
      folder: the directory of the checkpoint.
      stored: digests of the parts of each entry, from the description.
      load: function that reads the checkpoint in a directory.
    Returns:
      The tree of each entry, by name.
    Raises:
      ValueError: a part is missing, damaged, from another run, or does not match the other parts.
    """
    return {name: _joined(folder / PARTS / name, digests, load) for name, digests in stored.items()}


def _joined(folder: Path, digests: list[str], load: Callable[[Path], PyTree]) -> PyTree:
    structure: Any = None
    whole: list[_Filling] = []
    names: list[list[str]] = []
    for i, digest in enumerate(digests):
        part = folder / str(i)
        _check(part, digest)
        tree = jax.tree.map(_unsettled, load(part), is_leaf=is_standin)
        names.append([_shared(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_standin)])
        arrays, form = jax.tree.flatten(jax.tree.map(_renamed, tree, is_leaf=is_standin))
        if structure is None:
            structure, whole = form, [_Filling(a, len(digests)) for a in arrays]
        try:
            if form != structure:
                raise ValueError("its leaves are packed in another way")
            for filling, one in zip(whole, arrays, strict=True):
                filling.add(one)
        except ValueError as error:
            raise ValueError(f"{part} cannot be joined with the other parts: {error}") from None
    if structure is None:
        raise ValueError(f"{folder} is damaged: it has no parts")
    filled = jax.tree.unflatten(structure, [filling.array() for filling in whole])
    filled = jax.tree.map(_settled, filled, is_leaf=is_standin)
    leaves, form = jax.tree.flatten(filled, is_leaf=is_standin)
    named = [
        _renamed(leaf, _common(of))
        for leaf, of in zip(leaves, zip(*names, strict=True), strict=True)
    ]
    return jax.tree.unflatten(form, named)


class _Filling:
    """An array that is filled part by part along its leading axis; parts have equal lengths."""

    def __init__(self, part: Any, parts: int) -> None:
        self.of_part = tuple(part.shape)
        self.shape, self.dtype = (parts * len(part), *part.shape[1:]), part.dtype
        self.at, self.kind = 0, type(part)
        abstract = isinstance(part, jax.ShapeDtypeStruct)
        self.whole = None if abstract else aligned(self.shape, self.dtype)

    def add(self, part: Any) -> None:
        if tuple(part.shape) != self.of_part:
            raise ValueError(f"it has shape {list(part.shape)} instead of {list(self.of_part)}")
        kind = np.result_type(self.dtype, part.dtype)
        if kind != self.dtype:  # one layer's values did not fit in float16
            self.dtype = kind
            if self.whole is not None:
                narrow, self.whole = self.whole, aligned(self.shape, kind)
                self.whole[:] = narrow
        if self.whole is not None:
            self.whole[self.at : self.at + len(part)] = part
            self.at += len(part)

    def array(self) -> Any:
        if self.whole is None:
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        whole, self.whole = self.whole, None
        return whole if self.kind is np.ndarray else taken(whole)


def _unsettled(leaf: Any) -> Any:
    """Return an exact weight as plain floats, for its packed arrays have sizes of its own."""
    if not isinstance(leaf, QTensor) or not isinstance(leaf.format, ExactFormat):
        return leaf
    to_disk = lambda data: leaf.format.to_disk(data, leaf.stored_rows)
    data = _computed(to_disk, leaf.data)
    return dataclasses.replace(leaf, data=data, format=leaf.format.unsettled)


def _settled(leaf: Any) -> Any:
    """Return an exact weight packed again; the inverse of `_unsettled`."""
    if not isinstance(leaf, QTensor) or not isinstance(leaf.format, ExactFormat):
        return leaf
    floats = leaf.data["codes"]
    stack = (math.prod(floats.shape[:-2]), *floats.shape[-2:])
    bits: Any = _computed(lambda w: bits_of(w).reshape(stack), floats)
    format = leaf.format.settled(leaf.format.own, bits)
    data = _computed(lambda d: format.from_disk(d, leaf.stored_rows), leaf.data)
    return dataclasses.replace(leaf, data=data, format=format)


def _computed(fn: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """Return fn(tree), or its shapes if the tree holds shapes."""
    abstract = any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(tree))
    return jax.eval_shape(fn, tree) if abstract else fn(tree)


def _shared(leaf: Any) -> str:
    return leaf.shared if isinstance(leaf, QTensor) else ""


def _renamed(leaf: Any, name: str = "") -> Any:
    return dataclasses.replace(leaf, shared=name) if isinstance(leaf, QTensor) else leaf


def _common(names: tuple[str, ...]) -> str:
    """Return a name that weights share only if they share one in every part; "" if one has none."""
    if len(set(names)) == 1:
        return names[0]
    if not all(names):
        return ""
    # A name begins with the number of its weights, and ends with a digest of their arrays.
    digest = hashlib.sha256("".join(names).encode()).hexdigest()[:32]
    return f"{names[0].rpartition(' ')[0]} {digest}"


def _digest(part: Path) -> str:
    """Return the digest of a part's description; raise ValueError if it is not a checkpoint."""
    if not is_checkpoint(part):
        raise ValueError(
            f"{part} is not a jaxquant checkpoint; give a directory that jq.save wrote"
        )
    return hashlib.sha256((part / FILE).read_bytes()).hexdigest()
