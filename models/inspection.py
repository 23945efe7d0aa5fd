"""What a module's output loses by rounding some of its weights: AWQ's judge of scales.

Queries, keys and values are judged by all of attention, gate and up by the whole MLP, on the hidden
states of the model as it was. Other weights are judged by their own products (`jaxquant.inputs`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.paths import path_leaves, replace_leaves
from models.llama import blockwise, parts
from models.registry import Model

MODULES = {"attn": ("q", "k", "v"), "mlp": ("gate", "up")}  # inspected, by what


@dataclasses.dataclass(frozen=True, eq=False)
class Inspector:
    """An `inputs.Inspection` of a Llama model with its layers in a stack.

    Attributes:
      model: as it was.
      hidden: the input of every layer, [L, N, t, d].
      relative: errors of a token's output over its energy, so that a sink is one token of many.
    """

    model: Model
    hidden: jax.Array
    relative: bool = True

    @staticmethod
    def of(model: Model, sequences: np.ndarray, relative: bool = True) -> "Inspector":
        """By token sequences [N, t]; memory is L N t d floats."""
        cut = blockwise(model.config, model.dtype)

        @jax.jit
        def states(params: Any, tokens: jax.Array) -> jax.Array:
            step = lambda h, layer: (cut.block(layer, h), h)
            return jax.lax.scan(step, cut.embed(params, tokens), params["layers"])[1]

        each = [states(model.params, jnp.asarray(s)[None]) for s in sequences]
        return Inspector(model, jnp.concatenate(each, axis=1), relative)

    def __call__(self, weights: dict[str, jax.Array], index: int) -> jax.Array | None:
        """The error of the module that these weights are in; None if they are in no such module."""
        for module, names in MODULES.items():
            wanted = {f"layers/{module}/{name}/kernel" for name in names}
            if set(weights) <= wanted:
                layer = jax.tree.map(lambda a: a[index], self.model.params["layers"])
                new = {path.removeprefix("layers/"): w for path, w in weights.items()}
                return _error(self.model.config, module, self.relative, layer, new,
                              self.hidden[index])  # fmt: skip
        return None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _error(
    config: Any, module: str, relative: bool, layer: Any, new: dict[str, jax.Array], h: jax.Array
) -> jax.Array:
    """Of one layer: the mean squared error of the module's output, weights replaced."""
    attend, feed = parts(config)
    if module == "mlp":
        h = h + attend(layer, h)
    run = attend if module == "attn" else feed
    shapes = dict(path_leaves(layer))
    changed = replace_leaves(layer, {p: w.reshape(shapes[p].shape) for p, w in new.items()})
    want = run(layer, h)
    lost = jnp.sum((run(changed, h) - want) ** 2, axis=-1)
    return jnp.mean(lost / jnp.sum(want**2, axis=-1) if relative else lost)
