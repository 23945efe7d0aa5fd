"""The two files of a PEFT folder: the tensors by module, checked; and an atomic write of both."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxquant.core.fields import shown
from jaxquant.durable.publish import aside, check_parent, publish, restore
from jaxquant_models.readers.peft_factors import Factors
from jaxquant_models.readers.peft_places import Place
from jaxquant_models.readers.safetensors import Tensors
from jaxquant_models.schemas.peft import PeftConfig
from jaxquant_models.schemas.strict import checked, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
BASE, RUN = "jaxquant_base", "jaxquant_run"  # keys of the metadata
Found = dict[str, dict[str, str]]  # module -> part -> name of its tensor


def read_config(folder: Path, places: list[Place]) -> PeftConfig:
    """Return the configuration of a PEFT folder.

    Args:
      folder: the folder.
      places: the matrices of the model.
    Raises:
      ValueError: the folder is not one of PEFT, the file is damaged or describes another kind of
        adapter, or it names modules that the model lacks.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is not a PEFT folder: it holds no {CONFIG}")
    config = checked(PeftConfig, read_json(path), str(path))
    known = {name for place in places for name in place.modules}
    for target in config.named:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            raise ValueError(
                f"{path}: target_modules names {shown(target)}, which the model does not have; it "
                f"has {', '.join(place.short for place in places)}"
            )
    return config


class Adapters:
    """The tensors of a PEFT folder, by the modules that have all of theirs.

    Args:
      folder: the folder.
      config: its configuration.
      places: the matrices of the model.
    Raises:
      ValueError: the file is missing or damaged, holds tensors of other modules or kinds, or lacks
        some of a module or of a layer.

    Attributes:
      places: the matrices that have adapters.
    """

    def __init__(self, folder: Path, config: PeftConfig, places: list[Place]) -> None:
        self._config, self._file = config, _weights(folder)
        self._found = _found(self._file, {name for place in places for name in place.modules})
        self.places = [place for place in places if set(place.modules) & set(self._found)]
        for place in self.places:
            for module in place.modules:
                self._check(module)

    def _check(self, module: str) -> None:
        own, where = self._found.get(module, {}), self._file.path
        for part, suffix in PARTS.items():
            needed = part != "magnitude" or self._config.use_dora
            if needed and part not in own:
                raise ValueError(
                    f"{where} lacks the tensor {PREFIX}{module}.{suffix}: an adapter must be "
                    "whole, and on the same modules of all layers"
                )
            if part in own and not needed:
                raise ValueError(f"{where} holds {own[part]}, but use_dora is false in {CONFIG}")

    def read(self, module: str, k: int, n: int) -> Factors:
        """Return the factors of one matrix.

        Args:
          module: the module.
          k, n: the shape of its matrix, as the model has it.
        Raises:
          ValueError: a tensor has another shape or kind, or is not finite.
        """
        rank, found = self._config.r, {}
        expected = {"a": (rank, k), "b": (n, rank), "magnitude": (n,)}
        for part, name in self._found[module].items():
            where, shape = f"{self._file.path}: the tensor {name}", self._file.shapes[name]
            if shape != expected[part]:
                raise ValueError(
                    f"{where} must have shape {list(expected[part])}, as r is {rank} and the "
                    f"matrix [{n}, {k}], got {list(shape)}"
                )
            a = self._file.read(name)
            if not jnp.issubdtype(a.dtype, jnp.floating):
                raise ValueError(f"{where} must be floating-point, got {a.dtype}")
            with np.errstate(over="ignore", invalid="ignore"):  # reported just below
                found[part] = a.T.astype(np.float32)
            if not np.isfinite(found[part]).all():
                raise ValueError(f"{where} has NaN or infinite values")
        return Factors(found["a"], found["b"], found.get("magnitude"))


def _weights(folder: Path) -> Tensors:
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{path} is missing; adapter_model.bin is a pickle, which is not read: save the "
            "adapter again as safetensors"
        )
    return Tensors(path)


def _found(file: Tensors, known: set[str]) -> Found:
    """Return the tensors of a file by module and part."""
    found: Found = {}
    for tensor in sorted(file.shapes):
        for part, suffix in PARTS.items():
            module = tensor.removeprefix(PREFIX).removesuffix(f".{suffix}")
            if tensor == f"{PREFIX}{module}.{suffix}" and module in known:
                found.setdefault(module, {})[part] = tensor
                break
        else:
            raise ValueError(
                f"{file.path} holds the tensor {shown(tensor)}, which is no LoRA factor of a "
                "matrix that the model has"
            )
    if not found:
        raise ValueError(f"{file.path} holds no tensors, so there is no adapter")
    return found


def recorded(folder: str | Path) -> dict[str, str]:
    """Return what jaxquant stored in a PEFT folder: the digest of the base, and the run.

    Args:
      folder: any folder.
    Returns:
      Values by name (`BASE`, `RUN`); none if another program wrote the folder, or if there is none.
    """
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def check_peft_target(folder: str | Path, overwrite: bool = False) -> Path:
    """Return the resolved path if a PEFT folder may be written there.

    Args:
      folder: where to write.
      overwrite: whether an existing PEFT folder may be replaced.
    Raises:
      ValueError: it exists, is not an empty directory, and `overwrite` is off; it contains anything
        but a PEFT folder; or its parent is not a writable directory.
    """
    path = Path(folder).resolve()
    restore(path)
    held = set(os.listdir(path)) if path.is_dir() else set()
    if (held and not overwrite) or (path.exists() and not path.is_dir()):
        raise ValueError(
            f"{path} exists and is not an empty directory; pass overwrite=True (--overwrite), or "
            "write elsewhere"
        )
    if held and (CONFIG not in held or held - {CONFIG, WEIGHTS}):
        raise ValueError(
            f"{path} does not hold {CONFIG} and {WEIGHTS} alone, so it will not be overwritten: "
            "move the other files, or write elsewhere"
        )
    check_parent(path)
    return path


def write_peft(
    target: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], facts: dict[str, str],
    overwrite: bool,
) -> None:  # fmt: skip
    """Write a PEFT folder atomically.

    Args:
      target: the path from `check_peft_target`.
      config: the contents of adapter_config.json.
      tensors: the tensors by name.
      facts: metadata of the tensors' file.
      overwrite: whether to replace an existing PEFT folder.
    Raises:
      ValueError: the folder appeared in the meantime.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside(target) as new:
            new.mkdir(parents=True)
            (new / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt", **facts})
            check_peft_target(target, overwrite)  # it may have changed meanwhile
            publish(new, target, replace=overwrite)
    except FileExistsError:
        raise ValueError(
            f"{target} was created by another process in the meantime; it was not overwritten"
        ) from None
