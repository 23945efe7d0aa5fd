"""Assembles a file's named tensors into stacked parameters, one tensor in memory at a time."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxquant.core.fields import shown
from jaxquant_models.architectures.bert import BertConfig
from jaxquant_models.architectures.config import LlamaConfig

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


def tensor_names(model: nn.Module, templates: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for every parameter path, the names of its tensors in the file, in layer order.

    Args:
      model: a model of tokens whose layers are a stack of `config.n_layers`.
      templates: parameter path -> tensor name, in which "{}" stands for the layer's number.
    """
    depth = lambda path: model.config.n_layers if path.startswith("layers/") else 1
    return {p: [templates[p].format(i) for i in range(depth(p))] for p in param_shapes(model)}


def assemble(
    model: nn.Module,
    names: Mapping[str, list[str]],
    present: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike,
) -> PyTree:
    """Return the parameter tree assembled from the tensors of a file.

    Args:
      model: the model.
      names: the result of `tensor_names`.
      present: shape of every tensor in the file that is expected to be used.
      read: function from name to array; matrices are [out, in], as files store them.
      dtype: floating dtype of the result.
    Returns:
      Nested dict of jax arrays, the inner "params" of the model.
    Raises:
      ValueError: a tensor is missing, unknown, of another shape or kind, or not finite; the message
        names it.
    """
    shapes = param_shapes(model)
    _check_names({n for group in names.values() for n in group}, set(present))
    _check_shapes(shapes, names, present)  # before anything is allocated
    params = {}
    # Largest first, so that the largest temporaries exist while little else is in memory.
    for path in sorted(names, key=lambda path: -math.prod(shapes[path])):
        stack = np.empty(shapes[path], dtype)
        slots = stack if path.startswith("layers/") else stack[None]
        for slot, name in zip(slots, names[path], strict=True):
            value = read(name)
            _fill(slot, value.T if path.endswith("/kernel") else value, name)
        params[path] = jax.device_put(stack)
    return traverse_util.unflatten_dict(params, sep="/")


def _fill(slot: np.ndarray, value: np.ndarray, name: str) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"tensor {name} must be floating-point, got {value.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # reported just below
        slot[...] = value
    if not np.isfinite(slot).all():
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
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, list[str]],
    present: Mapping[str, tuple[int, ...]],
) -> None:
    for path, group in names.items():
        shape = shapes[path][1:] if path.startswith("layers/") else shapes[path]
        expected = shape[::-1] if path.endswith("/kernel") else shape
        for name in group:
            if present[name] != expected:
                raise ValueError(
                    f"tensor {name} must have shape {list(expected)}, got {list(present[name])}"
                )


def _check_names(wanted: set[str], present: set[str]) -> None:
    for kind, names in (("missing", wanted - present), ("unknown", present - wanted)):
        if names:
            listed = ", ".join(name if name.isprintable() and len(name) < 80 else shown(name)
                               for name in sorted(names)[:5])  # fmt: skip
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{kind} tensors for this architecture: {listed}{more}")
