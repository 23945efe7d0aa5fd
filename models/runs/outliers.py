"""The activation outliers of a language model on a text."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.theory.outliers import Outliers, outliers
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.hidden_states import HiddenStates, hidden_states
from jaxquant_models.architectures.llama import Llama, stacked
from jaxquant_models.readers.model import Model


def outliers_of(model: Model, tokens: np.ndarray) -> Outliers:
    """Return the outliers on token ids [t], with dequantized weights and unrounded activations.

    Args:
      model: the model, quantized or not.
      tokens: token ids, int [t].
    """
    params = stacked(jq.dequantize(model.params))
    llama = Llama(model.config, model.dtype, remat=True)
    ids = jnp.asarray(tokens)
    found = hidden_program(model.config, jnp.dtype(model.dtype))(params, ids)
    return outliers(
        lambda params, tokens: llama.apply({"params": params}, tokens),
        params,
        ids[None],
        hidden=found.residual,
        attention=found.attention,
        texts=[model.tokenizer.decode([int(i)]) for i in tokens],
    )


@functools.lru_cache(maxsize=4)
def hidden_program(
    config: LlamaConfig, dtype: np.dtype
) -> Callable[[PyTree, jax.Array], HiddenStates]:
    """Return `hidden_states`, compiled once for an architecture.

    Args:
      config: the architecture.
      dtype: dtype of activations.
    """
    return jax.jit(hidden_states(config, dtype))
