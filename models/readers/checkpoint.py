"""Language models in jaxquant's checkpoints: read, and written with what it takes to run them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree
from pydantic import JsonValue

import jaxquant as jq
from jaxquant.storage import checkpoint
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.schemas.files import CheckpointMetadata
from jaxquant_models.schemas.strict import checked

Stored = TypeVar("Stored")


def read_checkpoint(folder: str | Path, dtype: DTypeLike, widen: bool) -> Model:
    """The model that a checkpoint holds.

    Args:
      dtype: of activations.
      widen: kept matrices become of this dtype too, faster token by token; else they stay in the
        dtype they are stored in, so that bytes are those of the checkpoint.
    Raises:
      ValueError: the checkpoint is damaged, or holds no language model.
    """
    params, _, metadata = checkpoint.load(folder)
    held = checked(
        CheckpointMetadata,
        metadata,
        f"{folder} is a checkpoint of no language model: its metadata",
    )
    config = LlamaConfig.from_json(held.config)
    tokenizer = Tokenizer.from_json(held.tokenizer, f"the tokenizer of {folder}")
    tokenizer.check_rows(config.vocab_size)
    if widen:
        wide = lambda w: w if _packed(w) else w.astype(dtype)
        params = jax.tree.map(wide, params, is_leaf=_packed)
    return Model(str(folder), config, params, tokenizer, dtype, held.prefix)


def save_model(
    directory: str | Path,
    model: Model,
    recipe: jq.Recipe | None,
    overwrite: bool = False,
    metadata: Mapping[str, JsonValue] | None = None,
) -> None:
    """Write a checkpoint; kept matrices are stored in float16, vectors in float32.

    Args:
      recipe: what made the model, if a recipe did.
      metadata: JSON values to store beside those that `read_checkpoint` needs.
    Raises:
      ValueError: a weight, packed or not, that training or rounding left not finite; named.
    """
    params = as_stored(model.params, lambda w, dtype: w.astype(dtype))
    _check_finite(params)
    needed = {
        "config": model.config.to_json(),
        "tokenizer": model.tokenizer.to_json(),
        "prefix": model.prefix,
    }
    whole = {**needed, **(metadata or {})}
    checkpoint.save(directory, params, recipe=recipe, metadata=whole, overwrite=overwrite)


def as_stored(params: PyTree, cast: Callable[[jax.Array, np.dtype], Stored]) -> PyTree[Stored]:
    """cast(leaf, dtype) of every kept leaf: float16 for a matrix that fits, else its own dtype."""

    def one(path: tuple[Any, ...], w: Any) -> Any:
        if _packed(w):
            return w
        vector = path[-1].key in ("scale", "bias")  # of rank 2 in a stack of layers
        large = not vector and jnp.max(jnp.abs(w)) > np.finfo(np.float16).max
        return cast(w, w.dtype if vector or large else np.dtype(np.float16))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_packed)


def _check_finite(params: PyTree) -> None:
    for path, w in jq.path_leaves(params):
        floats = [a for a in jax.tree.leaves(w) if jnp.issubdtype(a.dtype, jnp.floating)]
        if not all(bool(jnp.all(jnp.isfinite(a.astype(jnp.float32)))) for a in floats):
            raise ValueError(
                f"{path}: values that are not finite (NaN or infinity) are not saved; use another "
                f"method, more bits, or a smaller learning rate"
            )


def _packed(w: object) -> bool:
    return isinstance(w, jq.QTensor)
