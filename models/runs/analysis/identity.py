"""Stage: what the model is."""

import dataclasses
import os
from pathlib import Path

import jaxquant as jq
from jaxquant.core.tree import tree_bytes
from jaxquant_models.readers import registry
from jaxquant_models.readers.packages import packaged_file
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.schemas.report import Identity


def identity(subjects: Subjects) -> Identity:
    """Return the section of the report that says what MODEL is.

    Args:
      subjects: the models and the text.
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
        methods=_methods(subjects),
    )


def _methods(subjects: Subjects) -> dict[str, int]:
    """Return the number of matrices by method."""
    found: dict[str, int] = {}
    for path, w in jq.core.path_leaves(subjects.model.params):
        if len(w.shape) < 2 or not path.endswith(("kernel", "embedding")):
            continue
        name = (w.method or "quantized") if isinstance(w, jq.QTensor) else "none"
        count = 1
        for n in w.shape[:-2]:
            count *= n
        found[name] = found.get(name, 0) + count
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
