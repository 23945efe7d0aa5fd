"""The JSON file of a checkpoint: written last, and verified before anything else is read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxquant.durable.publish import restore
from jaxquant.recipes.recipe import Recipe

Json = dict[str, Any]  # a JSON object
# The latest. Version 4 has arrays that are coded without loss and version 3 has parts; what has
# neither is written as version 2.
VERSION = 4
FILE = "jaxquant.json"


def is_checkpoint(directory: str | Path) -> bool:
    """Return whether the directory holds a jaxquant checkpoint.

    If an overwrite was killed after moving a checkpoint away, that one is put back first.

    Args:
      directory: the directory, which need not exist.
    """
    path = Path(directory)
    if not os.path.lexists(path):
        restore(path.absolute())
    return (path / FILE).is_file()


def write_description(folder: Path, description: Json) -> None:
    """Write the file, with a digest of its contents.

    Args:
      folder: the checkpoint's directory.
      description: JSON values by name.
    """
    coded = any("coded" in spec for spec in description["arrays"].values())
    version = VERSION if coded else 3 if "parts" in description else 2
    description = {"format": "jaxquant", "version": version, **description}
    description["sha256"] = sha256_of(description)
    (folder / FILE).write_text(json.dumps(description))


def read_description(path: Path) -> Json:
    """Read and verify the file.

    Args:
      path: the checkpoint's directory.

    Raises:
      ValueError: there is no checkpoint, or it is damaged or was written in a newer format version.
    """
    if not is_checkpoint(path):
        raise ValueError(f"{path} is not a jaxquant checkpoint: it has no {FILE}")
    file = path / FILE
    try:
        value = json.loads(file.read_text())
        version = int(value["version"])
        recorded = value.pop("sha256", None)
        found = sha256_of(value)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {first_line(error)}") from error
    if version > VERSION:
        raise ValueError(
            f"{path} has format version {version}, this jaxquant reads up to {VERSION}; upgrade it"
        )
    if recorded != found:
        raise ValueError(f"{file} is damaged: it differs from what was saved")
    if lacks := {"recipe", "metadata", "leaves", "arrays", "files"} - set(value):
        raise ValueError(f"{file} is damaged: it lacks {', '.join(sorted(lacks))}")
    for name, kind in (("metadata", dict), ("leaves", list), ("arrays", dict), ("files", dict)):
        if not isinstance(value[name], kind):
            raise ValueError(
                f"{file} is damaged: {name} is expected to be a {kind.__name__}, got "
                f"{type(value[name]).__name__}"
            )
    return value


def stored_recipe(directory: str | Path) -> Recipe | None:
    """Return the recipe that was saved with a tree, or None; no arrays are read.

    Args:
      directory: the checkpoint.

    Raises:
      ValueError: there is no checkpoint, or it is damaged or was written in a newer format version.
    """
    path = Path(directory).absolute()
    recipe = read_description(path)["recipe"]
    try:
        return None if recipe is None else Recipe.from_json(recipe)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / FILE} is damaged: recipe: {first_line(error)}") from error


def stored_metadata(directory: str | Path) -> Json:
    """Return the metadata that were saved with a tree; no arrays are read.

    Args:
      directory: the checkpoint.

    Raises:
      ValueError: there is no checkpoint, or it is damaged or was written in a newer format version.
    """
    return read_description(Path(directory).absolute())["metadata"]


def sha256_of(description: Json) -> str:
    """Return the digest of a JSON object."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path.

    Args:
      folder: the folder.
    """
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        out[path.relative_to(folder).as_posix()] = found
    return out
