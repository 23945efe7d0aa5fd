"""The tensors of a model as its files store them: not converted, and each read when asked for."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.tensor import QTensor
from jaxquant.storage import is_checkpoint
from jaxquant.storage.one_by_one import stored_leaves
from jaxquant_models.readers import encoder, registry
from jaxquant_models.readers.gguf_file import Tensor, open_gguf
from jaxquant_models.readers.huggingface import INDEX, tensor_files
from jaxquant_models.readers.packages import Packaged, packaged_file
from jaxquant_models.readers.safetensors import DTYPES, Tensors

NAMED: Mapping[str, Packaged] = {**registry.NAMED, **encoder.NAMED}
_PLAIN: dict[str, DTypeLike] = {
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": ml_dtypes.bfloat16,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor of a file, unread.

    Attributes:
      name: its name in the file, or its path in a checkpoint.
      read: function that returns it: an array in its own dtype (uint8 [bytes] if NumPy has no such
        dtype), a quantized GGUF tensor, or a `QTensor`. Arrays of files are memory-mapped.
      inputs: the axis of a matrix along which a product sums: -1 in files, -2 in checkpoints.
    """

    name: str
    read: Callable[[], np.ndarray | Tensor | QTensor]
    inputs: int = -1


def stored_tensors(spec: str | os.PathLike[str]) -> list[StoredTensor]:
    """Return the tensors of a model in the order of their files; only headers are read.

    Args:
      spec: a name in `NAMED`, a `.gguf` or `.safetensors` file, a folder of safetensors files (with
        an index, or all that lie in it), or a jaxquant checkpoint.
    Raises:
      ValueError: the model does not exist, has no tensors, or a file is damaged.
    """
    path = packaged_file(NAMED[str(spec)]) if str(spec) in NAMED else Path(spec)
    if not registry.is_kind(Path.exists, path):
        raise ValueError(f"no model {str(spec)!r:.200}: not a path, and not one of {sorted(NAMED)}")
    found = _opened(path)
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return found


def _opened(path: Path) -> list[StoredTensor]:
    if is_checkpoint(path):
        return [StoredTensor(leaf.path, leaf.read, -2) for leaf in stored_leaves(path)]
    if path.suffix == ".gguf":
        tensors = open_gguf(path)[1].values()
        return [StoredTensor(t.name, lambda t=t: _of_gguf(t)) for t in tensors]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files and not (path / INDEX).exists():
            raise ValueError(
                f"{path} is neither a jaxquant checkpoint nor a folder with safetensors files"
            )
        if (path / INDEX).exists():
            return _of_safetensors(tensor_files(path))
        opened = [Tensors(file) for file in files]
        return [one for file in opened for one in _of_safetensors(dict.fromkeys(file.shapes, file))]
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is neither a .gguf nor a .safetensors file, nor a folder of them")
    single = Tensors(path)
    return _of_safetensors(dict.fromkeys(single.shapes, single))


def _of_safetensors(files: Mapping[str, Tensors]) -> list[StoredTensor]:
    def read(name: str) -> np.ndarray:
        file = files[name]
        return file.read(name) if file.dtypes[name] in DTYPES else file.raw(name)

    return [StoredTensor(name, lambda name=name: read(name)) for name in files]


def _of_gguf(tensor: Tensor) -> np.ndarray | Tensor:
    if tensor.kind.name not in _PLAIN:
        return tensor
    return tensor.data.view(_PLAIN[tensor.kind.name]).reshape(tensor.shape)
