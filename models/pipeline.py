"""A language model through the spine: calibrate, quantize, save, load."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant import checkpoint
from jaxquant.evaluate import chunk
from models import registry
from models.config import LlamaConfig
from models.llama import Llama
from models.registry import Model
from models.tokenizer import Tokenizer

CONTEXT = 512  # tokens of one calibration sequence


def load_any(spec: str | os.PathLike[str]) -> Model:
    """A model by name, a GGUF file, a Hugging Face folder, or a jaxquant checkpoint."""
    if not checkpoint.is_checkpoint(spec):
        return registry.load(spec)
    params, _, metadata = checkpoint.load(spec)
    try:
        config = LlamaConfig.from_json(metadata["config"])
        tokenizer = Tokenizer.from_json(metadata["tokenizer"])
    except KeyError as error:
        raise ValueError(f"{spec} is a checkpoint of no language model: it lacks {error}") from None
    wide = jax.tree.map(_widened, params, is_leaf=lambda w: isinstance(w, jq.QTensor))
    return Model(str(spec), config, wide, tokenizer)


def _widened(w: Any) -> Any:
    return w if isinstance(w, jq.QTensor) else w.astype(jnp.float32)


def recipe_of(method: jq.Method) -> jq.Recipe:
    """The matrices of every layer by one method; embedding, head and norms as they are."""
    return jq.Recipe([("layers/*kernel", method), ("*", jq.KEEP)])


def calibrate(
    model: Model,
    text: str,
    tokens: int,
    *,
    weighting: str = "gradient",
    progress: Callable[[int], None] | None = None,
) -> jq.Stats:
    """Statistics on the first `tokens` tokens of a text, in sequences of 512.

    The loss is the mean cross-entropy of the next token; blocks are rematerialised, so memory is
    the grams, twice, beside the parameters.
    """
    batches = chunk(model.tokenizer.encode(text), CONTEXT, max(1, tokens // CONTEXT))
    llama = Llama(model.config, model.dtype, remat=True)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return llama.apply({"params": params}, x)

    return jq.calibrate(
        forward,
        model.params,
        (jnp.asarray(b)[None] for b in batches),
        loss=next_token_loss,
        weighting=weighting,
        progress=progress,
    )


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, nats."""
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))


def needs_statistics(recipe: jq.Recipe) -> bool:
    """Whether any rule's rounder reads second moments."""
    return any(m.rounder.needs_gram for _, m in recipe.rules if isinstance(m, jq.Method))


def plan(model: Model, recipe: jq.Recipe) -> jq.Plan:
    """The resolved recipe; everything that can be wrong with it is wrong here."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jq.resolve(recipe, model.params, jq.sites(model.apply_fn, model.params, tokens))


def quantized_model(
    model: Model, recipe: jq.Recipe, stats: jq.Stats | None, **options: Any
) -> Model:
    """The model with packed parameters; kept matrices are rounded to float16's precision."""
    found = stats
    if found is None:
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        found = jq.sites(model.apply_fn, model.params, tokens)
    return dataclasses.replace(model, params=jq.quantize(model.params, recipe, found, **options))


def save(directory: str | Path, model: Model, recipe: jq.Recipe, overwrite: bool = False) -> None:
    """Checkpoint of a quantized model; kept matrices are stored in float16, vectors in float32."""

    def slim(w: Any) -> Any:
        return (
            w if isinstance(w, jq.QTensor) or w.ndim < 2 or _too_large(w) else w.astype("float16")
        )

    params = jax.tree.map(slim, model.params, is_leaf=lambda w: isinstance(w, jq.QTensor))
    metadata = {"config": model.config.to_json(), "tokenizer": model.tokenizer.to_json()}
    checkpoint.save(directory, params, recipe=recipe, metadata=metadata, overwrite=overwrite)


def _too_large(w: Any) -> bool:
    return bool(jnp.max(jnp.abs(w)) > np.finfo(np.float16).max)
