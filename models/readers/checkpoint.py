"""Reading and writing of jaxquant checkpoints that hold a language model and its tokenizer."""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree
from pydantic import JsonValue

import jaxquant as jq
from jaxquant.storage import outline as storage_outline
from jaxquant.storage import stored_metadata
from jaxquant.storage.checkpoint import check_files, load, save
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.readers.chat_template import ChatTemplate
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.schemas.files import CheckpointMetadata
from jaxquant_models.schemas.strict import checked

Stored = TypeVar("Stored")


def read_checkpoint(
    folder: str | Path, dtype: DTypeLike, widen: bool, tables: bool = True
) -> Model:
    """Return the model stored in a checkpoint.

    Args:
      folder: the checkpoint.
      dtype: dtype of activations.
      widen: whether unquantized matrices are converted to dtype too, which is faster token by
        token. If False they stay in the dtype they are stored in, so that the model takes as many
        bytes as the checkpoint.
      tables: whether that includes an embedding that is not also the output matrix. No product
        reads it.
    Raises:
      ValueError: the checkpoint is damaged, or holds no language model.
    """
    params, held = load(folder), _metadata(folder)
    config = LlamaConfig.from_json(held.config)
    chat = held.chat and ChatTemplate.from_json(held.chat, f"the chat template of {folder}")
    tokenizer = Tokenizer.from_json(held.tokenizer, f"the tokenizer of {folder}", chat)
    tokenizer.check_rows(config.vocab_size)
    params = _widened(params, dtype, tables) if widen else params
    return Model(str(folder), config, params, tokenizer, dtype, held.prefix)


def _widened(params: PyTree, dtype: DTypeLike, tables: bool) -> PyTree:
    wide = lambda w: w if _packed(w) else w.astype(dtype)
    kept = {"embed": params["embed"]} if "head" in params and not tables else {}
    rest = {name: of for name, of in params.items() if name not in kept}
    return jax.tree.map(wide, rest, is_leaf=_packed) | kept


def checkpoint_outline(folder: str | Path) -> PyTree:
    """Return the parameters of a checkpoint with shapes in place of arrays; its files are checked.

    Args:
      folder: the checkpoint.
    Raises:
      ValueError: the checkpoint is damaged, or holds no language model.
    """
    check_files(folder)
    _metadata(folder)
    return storage_outline(folder)


def _metadata(folder: str | Path) -> CheckpointMetadata:
    where = f"{folder} is not a checkpoint of a language model: its metadata"
    return checked(CheckpointMetadata, stored_metadata(folder), where)


def save_model(
    directory: str | Path,
    model: Model,
    recipe: jq.Recipe | None,
    overwrite: bool = False,
    metadata: Mapping[str, JsonValue] | None = None,
    layers: Sequence[Path] = (),
    *,
    lossless: bool = False,
) -> None:
    """Write a checkpoint; unquantized matrices are stored in float16, vectors in their own dtype.

    Args:
      directory: where to write it.
      model: the model.
      recipe: the recipe that made the model, or None.
      overwrite: whether to replace an existing checkpoint.
      metadata: JSON values to store besides those that `read_checkpoint` needs.
      layers: directories that `save_layer` wrote, for a model whose params lack the layers.
      lossless: whether all arrays are stored in fewer bytes without loss (`jaxquant.save`);
        unquantized matrices in bfloat16 then keep their dtype. Default: False.
    Raises:
      ValueError: a weight, packed or not, is not finite after training or rounding; the message
        names it.
    """
    params = storable(model.params, lossless)
    needed = {
        "config": model.config.to_json(),
        "tokenizer": model.tokenizer.to_json(),
        "prefix": model.prefix,
    }
    if model.tokenizer.chat is not None:
        needed["chat"] = model.tokenizer.chat.to_json()
    whole = {**needed, **(metadata or {})}
    parts = {"layers": layers} if layers else None
    save(
        directory, params, recipe=recipe, metadata=whole, overwrite=overwrite, parts=parts,
        lossless=lossless,
    )  # fmt: skip


def save_layer(directory: Path, layer: PyTree, lossless: bool = False) -> None:
    """Write one layer, as `save_model` would.

    Args:
      directory: where to write it; a layer that is there is replaced.
      layer: the stack of layers cut down to one: every leaf is [1, ...].
      lossless: as in `save_model`.
    Raises:
      ValueError: as in `save_model`; the message names the path within the layer.
    """
    save(directory, storable(layer, lossless), overwrite=True, lossless=lossless)


def layer_is_saved(place: Path) -> bool:
    """Return whether `save_layer` has written a layer; a damaged one is removed, with a warning.

    Args:
      place: its directory.
    """
    if not place.exists():
        return False
    try:
        check_files(place)
        return True
    except ValueError as error:
        warnings.warn(f"{error}; the layer is made again", stacklevel=2)
        shutil.rmtree(place)
        return False


def storable(params: PyTree, lossless: bool = False) -> PyTree:
    """Return the parameters in the dtypes in which `save_model` stores them.

    Args:
      params: inner "params" tree.
      lossless: as in `save_model`.
    Raises:
      ValueError: as in `save_model`.
    """
    keeps = lambda w: lossless and w.dtype == jnp.bfloat16
    params = as_stored(params, lambda w, dtype: w if keeps(w) else w.astype(dtype))
    _check_finite(params)
    return params


def as_stored(params: PyTree, cast: Callable[[jax.Array, np.dtype], Stored]) -> PyTree[Stored]:
    """Return the parameters with cast(leaf, dtype) applied to every unquantized leaf.

    dtype is float16 for matrices whose values it can represent; otherwise it is the leaf's own
    dtype.

    Args:
      params: inner "params" tree; packed leaves are returned unchanged. Abstract matrices are taken
        to fit in float16.
      cast: function of a leaf and its storage dtype.
    """

    def one(path: tuple[Any, ...], w: Any) -> Any:
        if _packed(w):
            return w
        vector = path[-1].key in ("scale", "bias")  # has rank 2 in a stack of layers
        known = isinstance(w, jax.Array)
        large = not vector and known and _largest(w) > np.finfo(np.float16).max
        return cast(w, w.dtype if vector or large else np.dtype(np.float16))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_packed)


def _check_finite(params: PyTree) -> None:
    for path, w in jq.core.path_leaves(params):
        floats = [a for a in jax.tree.leaves(w) if jnp.issubdtype(a.dtype, jnp.floating)]
        if not all(map(_finite, floats)):
            raise ValueError(
                f"{path} holds values that are not finite (NaN or infinity), so the model "
                "was not saved; use another method, more bits, or a smaller learning rate"
            )


@jax.jit  # one program, which needs no memory for what is in between
def _largest(w: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(w))


@jax.jit
def _finite(a: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(a.astype(jnp.float32)))


def _packed(w: object) -> bool:
    return isinstance(w, jq.QTensor)
