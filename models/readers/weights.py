"""The named tensors of a file as stacked parameters: all of them, or those of one layer."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxquant.core.fields import shown
from jaxquant.core.host_arrays import aligned, taken
from jaxquant_models.architectures.bert import BertConfig
from jaxquant_models.architectures.config import LlamaConfig

CHECKED = 2**22  # number of weights that are checked at a time
SMALL = 2**20  # number of weights that `check_room` always allows


@functools.cache
def param_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by path, such as "layers/attn/q/kernel".

    Nothing is computed or allocated.

    Args:
      model: a module whose input is int tokens [b, t].
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(model.init, key, tokens)["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def param_outline(model: nn.Module, dtype: DTypeLike) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the parameter tree of a model with shapes in place of arrays.

    Args:
      model: as in `param_shapes`.
      dtype: floating dtype of the parameters.
    """
    return _tree({p: jax.ShapeDtypeStruct(s, dtype) for p, s in param_shapes(model).items()})


def tensor_names(model: nn.Module, templates: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for every parameter path, the names of its tensors in the file, in order.

    Args:
      model: a model of tokens.
      templates: parameter path -> tensor name, in which "{}" stands for the index along the first
        axis of the parameter, the layer's number. A second one stands for the index along the next
        axis, the expert's number; without it, a tensor holds all experts.
    """
    shapes = param_shapes(model)
    places = lambda path: np.ndindex(*shapes[path][: templates[path].count("{}")])
    return {path: [templates[path].format(*i) for i in places(path)] for path in shapes}


def tensor_shapes(model: nn.Module, templates: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a file must have; matrices are [..., out, in].

    Args:
      model, templates: as in `tensor_names`.
    """
    found = {}
    for path, names in tensor_names(model, templates).items():
        shape = _of_tensor(path, param_shapes(model)[path], templates)
        turned = (*shape[:-2], *shape[:-3:-1])
        found |= dict.fromkeys(names, turned if path.endswith("/kernel") else shape)
    return found


class Weights:
    """The weights of a model file, each read when it is asked for.

    Attributes:
      shapes: shape of every parameter by path; those of the stack of layers begin with L.

    Args:
      model: the model.
      templates: as in `tensor_names`.
      present: shape of every tensor in the file that is expected to be used.
      read: function from name to array; matrices are [..., out, in], as files store them.
      ahead: tells the system that a tensor is read next; None if it cannot be told.
    Raises:
      ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        templates: Mapping[str, str],
        present: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        ahead: Callable[[str], None] | None = None,
    ) -> None:
        self._ahead, self._templates = ahead, templates
        self.shapes = param_shapes(model)
        self._names = tensor_names(model, templates)
        self._read = read
        _check_names({n for group in self._names.values() for n in group}, set(present))
        _check_shapes(tensor_shapes(model, templates), present)  # before anything is allocated

    def outline(self, dtype: DTypeLike) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the parameter tree with shapes in place of arrays; nothing is read.

        Args:
          dtype: floating dtype of the parameters.
        """
        return _tree({p: jax.ShapeDtypeStruct(s, dtype) for p, s in self.shapes.items()})

    def whole(self, dtype: DTypeLike) -> PyTree:
        """Return the parameter tree, one tensor at a time in memory besides it.

        Args:
          dtype: floating dtype of the result.
        Raises:
          ValueError: a tensor is not floating-point, not finite, or cannot be read.
        """
        params = {}
        # Largest first, so that the largest temporaries exist while little else is in memory.
        for path in sorted(self.shapes, key=lambda path: -math.prod(self.shapes[path])):
            params[path] = self._joined(path, self._names[path], self.shapes[path], dtype)
        return _tree(params)

    def layer(self, i: int, dtype: DTypeLike) -> PyTree:
        """Return the stack of layers cut down to one: every leaf is [1, ...].

        Args:
          i: number of the layer.
          dtype, errors: as in `whole`.
        """
        stack = [path for path in self.shapes if path.startswith("layers/")]
        return _tree({p.removeprefix("layers/"): self._one(p, i, dtype) for p in stack})

    def prefetch(self, i: int) -> None:
        """Tell the system that a layer is read next.

        Args:
          i: number of the layer.
        """
        for path in self._names:
            if self._ahead is not None and path.startswith("layers/"):
                for name in self._of_layer(path, i):
                    self._ahead(name)

    def outer(self, dtype: DTypeLike) -> PyTree:
        """Return the parameter tree without the stack of layers.

        Args:
          dtype, errors: as in `whole`.
        """
        others = [path for path in self.shapes if not path.startswith("layers/")]
        return _tree({path: self._one(path, 0, dtype) for path in others})

    def digest(self) -> str:
        """Return the SHA-256 of all tensors as the file holds them."""
        found = hashlib.sha256()
        for path, names in sorted(self._names.items()):
            for name in names:
                value = np.ascontiguousarray(self._read(name))
                found.update(f"{path} {name} {value.dtype} {value.shape}".encode())
                found.update(value.reshape(-1).view(np.uint8).data)
        return found.hexdigest()

    def _one(self, path: str, i: int, dtype: DTypeLike) -> jax.Array:
        if not path.startswith("layers/"):
            return self._joined(path, self._names[path], self.shapes[path], dtype)
        shape = (1, *self.shapes[path][1:])
        return self._joined(path, self._of_layer(path, i), shape, dtype)

    def _of_layer(self, path: str, i: int) -> list[str]:
        """Return the names of the tensors of a layer: one, or one for each expert."""
        names = self._names[path]
        count = len(names) // self.shapes[path][0]
        return names[i * count : (i + 1) * count]

    def _joined(
        self, path: str, names: list[str], shape: tuple[int, ...], dtype: DTypeLike
    ) -> jax.Array:
        """Read the tensors one by one into an array of this shape, which JAX takes over."""
        stack = aligned(shape, dtype)
        slots = stack.reshape(len(names), *_of_tensor(path, self.shapes[path], self._templates))
        for slot, name in zip(slots, names, strict=True):
            value = self._read(name)
            _fill(slot, value.swapaxes(-1, -2) if path.endswith("/kernel") else value, name)
        return taken(stack)


def _of_tensor(path: str, shape: tuple[int, ...], templates: Mapping[str, str]) -> tuple[int, ...]:
    """Return the shape that a tensor of the file has in the parameter."""
    return shape[templates[path].count("{}") :]


def _tree(flat: dict[str, Any]) -> PyTree:
    return traverse_util.unflatten_dict(flat, sep="/")


def _fill(slot: np.ndarray, value: np.ndarray, name: str) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"tensor {name} must be floating-point, got {value.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # reported just below
        slot[...] = value
    parts = np.array_split(slot.reshape(-1), slot.size // CHECKED + 1)  # views
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"tensor {name} has NaN or infinite values in {slot.dtype}")


def check_room(config: LlamaConfig | BertConfig, nbytes: int, where: str) -> None:
    """Raise ValueError if weight files of `nbytes` bytes cannot hold the configuration's weights.

    One bit per weight is assumed. The check runs before anything of the configured sizes is built.
    Models of few weights pass; their missing tensors are reported by name instead.

    Args:
      config: the architecture.
      nbytes: total size of the weight files.
      where: name of the configuration in the message.
    """
    if config.weights > 8 * nbytes + SMALL:
        raise ValueError(
            f"{where} describes at least {config.weights:,} weights ({config.n_layers} layers of "
            f"width {config.d_model}), which {nbytes:,} bytes of weight files cannot hold"
        )


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        if present[name] != shape:
            raise ValueError(
                f"tensor {name} must have shape {list(shape)}, got {list(present[name])}"
            )


def _check_names(wanted: set[str], present: set[str]) -> None:
    for kind, names in (("missing", wanted - present), ("unknown", present - wanted)):
        if names:
            listed = ", ".join(name if name.isprintable() and len(name) < 80 else shown(name)
                               for name in sorted(names)[:5])  # fmt: skip
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{kind} tensors for this architecture: {listed}{more}")
