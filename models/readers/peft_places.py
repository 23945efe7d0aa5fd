"""Where the matrices of a model are, by the modules that PEFT names; and the digest of a base."""

import hashlib
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.adapters.adapted import Adapted
from jaxquant.adapters.lora import base_of
from jaxquant.core.paths import path_leaves
from jaxquant.formats.dense import Dense
from jaxquant.ptq.layer_stacks import is_apart
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.readers.huggingface import TENSORS
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.weights import tensor_names

Tree = TypeVar("Tree")


class Place(NamedTuple):
    """A matrix in all layers.

    Attributes:
      modules: names of its modules, such as "model.layers.0.self_attn.q_proj", layer by layer.
      leaves: paths of the leaves that hold it: one for every layer, or one for all.
      stacked: whether one leaf holds the matrices of all layers.
    """

    modules: list[str]
    leaves: list[str]
    stacked: bool

    @property
    def short(self) -> str:
        """The last part of the name of its modules, such as "q_proj"."""
        return self.modules[0].rpartition(".")[2]

    def stack(self, each: list[Tree]) -> list[Tree]:
        """Return what belongs to the leaves.

        Args:
          each: a tree of arrays for every module.
        """
        return [jax.tree.map(lambda *a: jnp.stack(a), *each)] if self.stacked else each

    def split(self, each: list[Tree]) -> list[Tree]:
        """Return what belongs to the modules.

        Args:
          each: a tree of arrays for every leaf.
        """
        if not self.stacked:
            return each
        return [jax.tree.map(lambda a, i=i: a[i], each[0]) for i in range(len(self.modules))]


def places_of(model: Model) -> list[Place]:
    """Return the places of all matrices of a model.

    Args:
      model: the model.
    Raises:
      ValueError: the model has experts.
    """
    if model.config.n_experts:
        raise ValueError(
            "a PEFT folder holds no adapters of experts; leave out --peft and --adapter"
        )
    found = []
    for path, names in tensor_names(Llama(model.config), TENSORS).items():
        start, _, rest = path.partition("/")
        layers = start == "layers"
        apart = layers and is_apart(model.params, start)
        leaves = [f"{start}/{i}/{rest}" for i in range(len(names))] if apart else [path]
        if path.endswith("/kernel"):
            modules = [name.removesuffix(".weight") for name in names]
            found.append(Place(modules, leaves, layers and not apart))
    return found


def digest_of_base(model: Model) -> str:
    """Return the SHA-256 of the matrices of a model, without adapters.

    It depends neither on whether layers are stacked, nor on how inputs are rounded. Unpacked
    matrices count as checkpoints store them, in float16.

    Args:
      model: the model, with or without adapters.
    """
    digest, leaves = hashlib.sha256(), dict(path_leaves(model.params))
    for place in places_of(model):
        held = place.split([_base_arrays(leaves[leaf]) for leaf in place.leaves])
        for module, arrays in zip(place.modules, held, strict=True):
            digest.update(module.encode())
            for name, a in sorted(arrays.items()):
                digest.update(f"{name} {a.dtype} {a.shape}".encode())
                digest.update(np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()


def _base_arrays(w: PyTree) -> dict[str, np.ndarray]:
    """Return the arrays of a matrix that its adapter relies on."""
    if not isinstance(w, jq.QTensor):
        return {"floats": _half(w)}
    format = w.format.format if isinstance(w.format, Adapted) else w.format
    data = base_of(w.data)
    if format == Dense() and w.input is None and w.output is None:
        return {"floats": _half(data["codes"])}
    arrays = w.arrays._replace(data=data, activations={})
    return {name: np.asarray(a) for name, a in w.with_arrays(arrays).named.items()}


def _half(a: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(a).astype(np.float16)
