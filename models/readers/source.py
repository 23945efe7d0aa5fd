"""A language model whose weights are read layer by layer, so that they need not fit in memory."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxquant_models.readers.model import Model


class Readable(Protocol):
    """What weights can be read from; see `readers.weights.Weights`."""

    def whole(self, dtype: DTypeLike) -> PyTree:
        """Return the parameter tree."""

    def layer(self, i: int, dtype: DTypeLike) -> PyTree:
        """Return the stack of layers cut down to one: every leaf is [1, ...]."""

    def prefetch(self, i: int) -> None:
        """Tell the system that layer i is read next."""

    def outer(self, dtype: DTypeLike) -> PyTree:
        """Return the parameter tree without the stack of layers."""

    def digest(self) -> str:
        """Return the SHA-256 of all weights."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A language model whose weights are read when they are asked for.

    Attributes:
      outline: the model with shapes in place of arrays.
      weights: what the weights are read from.
    """

    outline: Model
    weights: Readable

    @staticmethod
    def of(model: Model) -> "Source":
        """Return the source that reads from a model in memory.

        Args:
          model: the model, with stacked layers.
        """
        shape = lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype)
        outline = dataclasses.replace(model, params=jax.tree.map(shape, model.params))
        return Source(outline, Loaded(model.params))

    def with_prefix(self, prefix: int) -> "Source":
        """Return the source of the model whose first tokens keep exact activations.

        Args:
          prefix: number of these tokens.
        """
        return dataclasses.replace(self, outline=dataclasses.replace(self.outline, prefix=prefix))

    def load(self) -> Model:
        """Return the model in memory."""
        return dataclasses.replace(self.outline, params=self.weights.whole(self.outline.dtype))

    def layer(self, i: int) -> PyTree:
        """Return the stack of layers cut down to one: every leaf is [1, ...].

        Args:
          i: number of the layer.
        """
        return self.weights.layer(i, self.outline.dtype)

    def changed(
        self, outline: Model, change: Callable[[PyTree], PyTree], outer: Callable[[PyTree], PyTree]
    ) -> "Source":
        """Return the source of a model whose parameters are changed when they are read.

        Args:
          outline: the changed model, with shapes in place of arrays.
          change: changes the parameters of a layer.
          outer: changes the parameters outside of the layers.
        """
        return Source(outline, Changed(self.weights, change, outer))

    def outer(self) -> PyTree:
        """Return the parameters outside of the layers: embedding, last norm, output matrix."""
        return self.weights.outer(self.outline.dtype)


class Loaded:
    """Weights in memory, in their own dtype.

    Args:
      params: the parameter tree, with stacked layers.
    """

    def __init__(self, params: PyTree) -> None:
        self.params = params

    def whole(self, dtype: DTypeLike) -> PyTree:
        return self.params

    def layer(self, i: int, dtype: DTypeLike) -> PyTree:
        return jax.tree.map(lambda a: a[i : i + 1], self.params["layers"])

    def prefetch(self, i: int) -> None:
        pass

    def outer(self, dtype: DTypeLike) -> PyTree:
        return {name: part for name, part in self.params.items() if name != "layers"}

    def digest(self) -> str:
        found = hashlib.sha256()
        for path, w in jax.tree_util.tree_leaves_with_path(self.params):
            found.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(w).tobytes())
        return found.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Changed:
    """Weights that are changed when they are read.

    Attributes:
      weights: the weights.
      change: changes the parameters of a layer, or of a stack of layers.
      change_outer: changes the parameters outside of the layers.
    """

    weights: Readable
    change: Callable[[PyTree], PyTree]
    change_outer: Callable[[PyTree], PyTree]

    def whole(self, dtype: DTypeLike) -> PyTree:
        params = dict(self.weights.whole(dtype))
        layers = params.pop("layers")
        return {**self.change_outer(params), "layers": self.change(layers)}

    def layer(self, i: int, dtype: DTypeLike) -> PyTree:
        return self.change(self.weights.layer(i, dtype))

    def prefetch(self, i: int) -> None:
        self.weights.prefetch(i)

    def outer(self, dtype: DTypeLike) -> PyTree:
        return self.change_outer(self.weights.outer(dtype))

    def digest(self) -> str:
        return self.weights.digest()
