"""Statistics of a language model's inputs, one sequence at a time, resumable."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.calibration.statistics import Probe, Weighting
from jaxquant.durable.store import Finished
from jaxquant.tuning.trainer import next_token_loss
from jaxquant_models.architectures.cache import AnyCache
from jaxquant_models.architectures.llama import Llama, check_tokens
from jaxquant_models.architectures.prefix import after_prefix
from jaxquant_models.readers.model import Model

CALIBRATION = "calibration"  # what the sums so far are kept as
COUNT = ":"  # and, among them, the number of sequences that they are of
SAVE_EVERY = 16  # sequences between two copies of the sums


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
    """Statistics on token sequences [N, length], one at a time; those of a prefix are left out.

    The loss is the mean cross-entropy of the next token; blocks are rematerialised, so memory is
    what is kept, twice, beside the parameters.

    Args:
      weighting, gram, output, sample, progress: as in `jaxquant.calibrate`.
      finished: where the sums so far are kept, every `SAVE_EVERY` sequences, and gone on from.
      name: what they are kept as.
    Raises:
      ValueError: an id without a row in the embedding; before any compute.
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

    def save(count: int, sums: dict[str, Probe]) -> None:
        if finished is not None and (count % SAVE_EVERY == 0 or count == len(sequences)):
            finished[name] = _arrays(count, sums)

    return jq.calibrate(
        forward, model.params, (batch(s) for s in sequences),
        loss=lambda logits, batch: next_token_loss(logits, batch[0]),
        weighting=weighting, gram=gram, output=output, sample=sample, progress=progress,
        save=save, resume=None if finished is None else _sums(finished, name),
    )  # fmt: skip


def _arrays(count: int, sums: dict[str, Probe]) -> dict[str, jax.Array | int]:
    """The arrays that the sums of so many sequences are kept as."""
    arrays = {f"{path}:{f}": a for path, p in sums.items() for f, a in p._asdict().items()}
    return {COUNT: count, **{name: a for name, a in arrays.items() if a is not None}}


def _sums(finished: Finished, name: str) -> tuple[int, dict[str, Probe]] | None:
    """The count and the sums that were kept; None if none were."""
    if name not in finished:
        return None
    arrays = dict(finished[name])
    count = int(arrays.pop(COUNT))
    paths = {key.rpartition(":")[0] for key in arrays}
    probe = lambda path: Probe(*(arrays.get(f"{path}:{field}") for field in Probe._fields))
    return count, {path: probe(path) for path in sorted(paths)}
