"""The activation outliers of a language model on a text."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.theory.outliers import Outliers, outliers
from jaxquant_models.architectures.hidden_states import hidden_states
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
    found = jax.jit(hidden_states(model.config, model.dtype))(params, ids)
    return outliers(
        lambda params, tokens: llama.apply({"params": params}, tokens),
        params,
        ids[None],
        hidden=found.residual,
        attention=found.attention,
        texts=[model.tokenizer.decode([int(i)]) for i in tokens],
    )
