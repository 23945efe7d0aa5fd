"""Models that Python packages carry as files."""

import importlib.util
from pathlib import Path
from typing import NamedTuple


class Packaged(NamedTuple):
    """A model that a Python package carries as a file."""

    module: str
    file: str
    install: str


def packaged_file(model: Packaged) -> Path:
    """Where the model lies; found without importing its package, whose code wants other packages.

    Raises:
      ValueError: the package is not installed, or lacks the file.
    """
    found = importlib.util.find_spec(model.module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"package {model.module} is not installed; run: {model.install}")
    path = Path(found.submodule_search_locations[0]) / model.file
    if not path.exists():
        raise ValueError(f"package {model.module} lacks {model.file}; run: {model.install}")
    return path
