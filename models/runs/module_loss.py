"""What a module's output loses by rounding some of its weights: AWQ's judge of scales.

Queries, keys and values are judged by all of attention, gate and up by the whole MLP, on the hidden
states of the model as it was. Other weights are judged by their own products (see
`ptq.shared_transforms`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant_models.architectures.blocks import attention_and_mlp, blockwise
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.readers.model import Model

MODULES = {"attn": ("q", "k", "v"), "mlp": ("gate", "up")}  # the weights that each judges


class ModuleLoss:
    """The `inspect` of `jaxquant.quantize` for a Llama with its layers in a stack."""

    def __init__(self, model: Model, sequences: np.ndarray, relative: bool = True) -> None:
        """Run the model on token sequences; memory is L N t d floats, the inputs of all layers.

        Args:
          sequences: token ids [N, t].
          relative: whether the error of a token's output is divided by its energy, so that a sink
            is one token of many.
        """
        self.config, self.layers, self.relative = model.config, model.params["layers"], relative
        parts = blockwise(model.config, model.dtype)

        @jax.jit
        def layer_inputs(params: PyTree, tokens: jax.Array) -> jax.Array:
            step = lambda h, layer: (parts.block(layer, h), h)
            return jax.lax.scan(step, parts.embed(params, tokens), params["layers"])[1]

        each = [layer_inputs(model.params, jnp.asarray(s)[None]) for s in sequences]
        self.hidden = jnp.concatenate(each, axis=1)

    def __call__(self, weights: dict[str, jax.Array], index: int) -> jax.Array | None:
        """The error of the module that these weights are in; None if they are in no such module."""
        for module, names in MODULES.items():
            if set(weights) <= {f"layers/{module}/{name}/kernel" for name in names}:
                layer, h, want = self._module(module, index)
                new = {path.removeprefix("layers/"): w for path, w in weights.items()}
                return _error(self.config, module, self.relative, layer, new, h, want)
        return None

    @functools.lru_cache(maxsize=1)  # noqa: B019, of a few for all candidates of one search
    def _module(self, module: str, index: int) -> tuple[PyTree, jax.Array, jax.Array]:
        """A layer, the input of one of its modules, and what that adds."""
        layer = jax.tree.map(lambda a: a[index], self.layers)
        return layer, *_run(self.config, module, layer, self.hidden[index])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    config: LlamaConfig, module: str, layer: PyTree, h: jax.Array
) -> tuple[jax.Array, jax.Array]:
    attend, feed = attention_and_mlp(config)
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
    """The mean squared error of the module's output, weights replaced."""
    run = attention_and_mlp(config)[module == "mlp"]
    shapes = dict(path_leaves(layer))
    changed = replace_leaves(layer, {p: w.reshape(shapes[p].shape) for p, w in new.items()})
    lost = jnp.sum((run(changed, h) - want) ** 2, axis=-1)
    return jnp.mean(lost / jnp.sum(want**2, axis=-1) if relative else lost)
