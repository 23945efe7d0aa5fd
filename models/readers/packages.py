"""Models distributed as files inside Python packages, and packages that are not installed.

This module imports nothing that may be missing.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

OWN = ("jaxquant", "jaxquant_models", "pallas_kernels")


class Packaged(NamedTuple):
    """A model distributed as a file inside a Python package.

    Attributes:
      module: name of the module.
      file: path of the file or folder inside it.
      install: command that installs the package, for error messages.
    """

    module: str
    file: str
    install: str


def packaged_file(model: Packaged) -> Path:
    """Return the path of the model, found without importing its package.

    Importing could fail, since the package's code requires other packages.

    Args:
      model: the model.
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


def missing_package(error: ModuleNotFoundError) -> str:
    """Return what to install, or "" if the module belongs to jaxquant itself.

    Args:
      error: the error of an import.

    >>> missing_package(ModuleNotFoundError("No module named 'gguf'", name="gguf"))
    "the package 'gguf' is not installed; run: pip install 'jaxquant[models]'"
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", *OWN):
        return ""
    return f"the package {package!r} is not installed; run: pip install 'jaxquant[models]'"
