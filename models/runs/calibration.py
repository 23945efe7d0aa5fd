"""Resumable input statistics of a language model, computed one sequence at a time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.calibration.statistics import Weighting
from jaxquant.durable.store import Finished
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.architectures.cache import AnyCache
from jaxquant_models.architectures.llama import Llama, check_tokens
from jaxquant_models.architectures.prefix import after_prefix
from jaxquant_models.readers.model import Model

CALIBRATION = "calibration"  # key under which the partial sums are saved


def calibrate_model(
    model: Model,
    sequences: np.ndarray,
    *,
    weighting: Weighting = "gradient",
    gram: bool = True,
    output: Sequence[str] = (),
    sample: int = 0,
    progress: Callable[[int], None] | None = None,
    finished: Finished | None = None,
    name: str = CALIBRATION,
) -> jq.Stats:
    """Return input statistics over token sequences [N, length], without the tokens of a prefix.

    Sequences are processed one at a time. The loss is the mean cross-entropy of the next token.
    Blocks are rematerialized, so that memory beyond the parameters is about twice that of the
    statistics.

    Args:
      model: the model.
      sequences: token ids, int [N, length].
      weighting, gram, output, sample, progress, finished, name: as in `jaxquant.calibrate`.
    Raises:
      ValueError: a token id has no row in the embedding; raised before anything is computed.
    """
    check_tokens(sequences, model.config.vocab_size)
    llama = Llama(model.config, model.dtype, remat=True)

    def forward(params: PyTree, tokens: jax.Array, *cache: AnyCache) -> jax.Array:
        got = llama.apply({"params": params}, tokens, *cache)
        return got[0] if cache else got

    def batch(sequence: np.ndarray) -> tuple:
        tokens = jnp.asarray(sequence)[None]
        return (
            after_prefix(llama, model.params, tokens, model.prefix) if model.prefix else (tokens,)
        )

    return jq.calibrate(
        forward, model.params, (batch(s) for s in sequences),
        loss=lambda logits, batch: next_token_loss(logits, batch[0]),
        weighting=weighting, gram=gram, output=output, sample=sample, progress=progress,
        finished=finished, name=name,
    )  # fmt: skip
