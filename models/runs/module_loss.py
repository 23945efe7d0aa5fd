"""The error of a module's output when some of its weights are rounded: AWQ's criterion for scales.

Queries, keys and values are evaluated by the output of the attention, gate and up by that of the
MLP, on the hidden states of the original model. Other weights are evaluated by their own products
(see `ptq.shared_transforms`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxquant.calibration.one_block import only
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant_models.architectures.blocks import attention_and_mlp, blockwise
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.readers.model import Model

JUDGED = 4  # number of sequences on which scales are evaluated
MODULES = {"attn": ("q", "k", "v"), "mlp": ("gate", "up")}  # the weights that each evaluates


class ModuleLoss:
    """An `inspect` argument of `jaxquant.quantize` for a Llama with stacked layers.

    Args:
      config: the architecture.
      layer: function from the number of a layer to its parameters, leaves [1, ...].
      hidden: function from the number of a layer to its inputs, [N, t, d].
      relative: whether the error of a token's output is divided by its energy, so that an attention
        sink counts as one token among many.
    """

    def __init__(
        self,
        config: LlamaConfig,
        layer: Callable[[int], PyTree],
        hidden: Callable[[int], jax.Array],
        relative: bool = True,
    ) -> None:
        self.config, self.layer, self.hidden, self.relative = config, layer, hidden, relative
        self._last: tuple[Any, Any] = (None, None)

    @staticmethod
    def of(model: Model, sequences: np.ndarray, relative: bool = True) -> "ModuleLoss":
        """Return the loss of a model in memory, after running it on token sequences.

        The inputs of all layers are kept, which takes L * N * t * d floats.

        Args:
          model: the model.
          sequences: token ids, int [N, t].
          relative: see the class.
        """
        parts, layers = blockwise(model.config, model.dtype), model.params["layers"]

        @jax.jit
        def layer_inputs(params: PyTree, tokens: jax.Array) -> jax.Array:
            step = lambda h, layer: (parts.block(layer, h), h)
            return jax.lax.scan(step, parts.embed(params, tokens), params["layers"])[1]

        each = [layer_inputs(model.params, jnp.asarray(s)[None]) for s in sequences]
        hidden = jnp.concatenate(each, axis=1)
        one = lambda i: jax.tree.map(lambda a: a[i : i + 1], layers)
        return ModuleLoss(model.config, one, lambda i: hidden[i], relative)

    def __call__(self, weights: dict[str, jax.Array], index: int) -> jax.Array | None:
        """Return the error of the module that contains these weights, or None if there is none.

        Args:
          weights: parameter path -> rounded weight.
          index: number of the layer.
        """
        for module, names in MODULES.items():
            if set(weights) <= {f"layers/{module}/{name}/kernel" for name in names}:
                layer, h, want = self._module(module, index)
                new = {path.removeprefix("layers/"): w for path, w in weights.items()}
                return _error(self.config, module, self.relative, layer, new, h, want)
        return None

    def _module(self, module: str, index: int) -> tuple[PyTree, jax.Array, jax.Array]:
        """Return a layer's parameters, and the input and the output of one of its modules.

        Those of the last call are kept, for one search asks for the same ones many times.
        """
        if self._last[0] != (module, index):
            layer = self.layer(index)
            made = layer, *_run(self.config, module, layer, self.hidden(index))
            self._last = (module, index), made
        return self._last[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    config: LlamaConfig, module: str, layer: PyTree, h: jax.Array
) -> tuple[jax.Array, jax.Array]:
    attend, feed = attention_and_mlp(config)
    layer = only(layer)
    if module == "attn":
        return h, attend(layer, h)
    h = h + attend(layer, h)
    return h, feed(layer, h)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _error(
    config: LlamaConfig,
    module: str,
    relative: bool,
    layer: PyTree,
    new: dict[str, jax.Array],
    h: jax.Array,
    want: jax.Array,
) -> jax.Array:
    """Return the mean squared error of the module's output with the weights replaced."""
    run, layer = attention_and_mlp(config)[module == "mlp"], only(layer)
    shapes = dict(path_leaves(layer))
    changed = replace_leaves(layer, {p: w.reshape(shapes[p].shape) for p, w in new.items()})
    lost = jnp.sum((run(changed, h) - want) ** 2, axis=-1)
    return jnp.mean(lost / jnp.sum(want**2, axis=-1) if relative else lost)
