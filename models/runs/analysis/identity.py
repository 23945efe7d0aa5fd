"""Stage: what the model is."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jaxquant as jq
from jaxquant.core.tree import tree_bytes
from jaxquant_models.readers import registry
from jaxquant_models.readers.packages import packaged_file
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.schemas.report import Identity, TensorRow


def identity(subjects: Subjects, tensors: Sequence[TensorRow]) -> Identity:
    """Return the section of the report that says what MODEL is.

    Args:
      subjects: the models and the text.
      tensors: the rows of the tensors.
    """
    request, params = subjects.request, subjects.model.params
    size = jq.size(params)
    fields = dataclasses.asdict(subjects.model.config)
    plain = {k: v for k, v in fields.items() if isinstance(v, int | float | bool | str)}
    return Identity(
        model=request.model,
        against=request.against,
        text=request.text,
        tokens=int(subjects.chunks.size),
        architecture=plain,
        parameters=size.weights,
        bytes=tree_bytes(params),
        bytes_on_disk=bytes_on_disk(request.model),
        bits_per_weight=jq.bits_per_weight(params),
        bits_over_all=size.bits_per_weight,
        methods=_methods(tensors),
    )


def _methods(tensors: Sequence[TensorRow]) -> dict[str, int]:
    """Return the number of matrices by method; a GGUF file has types for methods."""
    found: dict[str, int] = {}
    for row in tensors:
        found[row.method] = found.get(row.method, 0) + math.prod(row.shape[:-2])
    return found


def bytes_on_disk(spec: str) -> int | None:
    """Return the bytes of the files of a model; None if they cannot be read.

    Args:
      spec: as in `readers.registry.load`.
    """
    try:
        named = registry.NAMED.get(spec)
        path = Path(spec) if named is None else packaged_file(named)
        if path.is_file():
            return path.stat().st_size
        files = [Path(at, name) for at, _, names in os.walk(path) for name in names]
        return sum(file.stat().st_size for file in files)
    except (OSError, ValueError):
        return None
