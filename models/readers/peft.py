"""PEFT folders: LoRA adapters as adapter_config.json and adapter_model.safetensors.

PEFT names a matrix by its module, and stores A as [rank, in] and B as [out, rank]. It scales their
product by lora_alpha / r, or by lora_alpha / sqrt(r) with use_rslora. The digest of the base is in
the metadata of the tensors' file, which PEFT ignores; an unknown key of the configuration would
make it warn.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxquant as jq
from jaxquant.adapters.adapted import is_adapted
from jaxquant.adapters.lora import LoRA
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.peft_factors import Factors, factors_of, lora_of, with_factors
from jaxquant_models.readers.peft_files import (
    BASE,
    PARTS,
    PREFIX,
    RUN,
    Adapters,
    check_peft_target,
    read_config,
    recorded,
    write_peft,
)
from jaxquant_models.readers.peft_places import Place, digest_of_base, places_of


def load_peft(folder: str | Path, model: Model, *, any_base: bool = False) -> Model:
    """Put the LoRA adapters of a PEFT folder on a model.

    The modules that the file holds get adapters; all others stay as they are. Weights in floating
    point are kept unrounded beside their adapters. The model must run inside `jaxquant.quantized`.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      model: the model, with weights in floating point or packed, and without adapters.
      any_base: whether an adapter that jaxquant trained may be put on another base than its own.
    Returns:
      The model with adapters (float32). The norms of DoRA are those of the packed weights.
    Raises:
      ValueError: the folder is not one of PEFT, holds another kind of adapter, or a file is missing
        or damaged; the model lacks a module or has other shapes; some layers lack an adapter that
        others have; the adapter was made for another base; or the model has adapters already.
    """
    folder, places = Path(folder), places_of(model)
    config = read_config(folder, places)
    if any(is_adapted(w) for _, w in path_leaves(model.params)):
        raise ValueError(
            f"{model.name} has adapters already, so {folder} cannot be put on it: give the model "
            "without them, or merge them first (jaxquant merge)"
        )
    file = Adapters(folder, config, places)
    before = dict(path_leaves(model.params))
    factors = {place.short: _factors(file, place, before) for place in file.places}
    if not any_base:
        _check_base(folder, model)
    adapter = LoRA(
        config.r, float(config.lora_alpha), config.lora_dropout,
        rslora=config.use_rslora, dora=config.use_dora,
    )  # fmt: skip
    targets = [leaf for place in file.places for leaf in place.leaves]
    plain = not all(isinstance(before[path], jq.QTensor) for path in targets)
    stats = model.sites() if plain else None
    params = jq.adapt(model.params, adapter, targets=targets, stats=stats)
    started, new = dict(path_leaves(params)), {}
    for place in file.places:
        for leaf, one in zip(place.leaves, factors[place.short], strict=True):
            try:
                new[leaf] = with_factors(started[leaf], one)
            except ValueError as error:
                raise ValueError(f"{leaf}: {error}") from None
    return dataclasses.replace(model, params=replace_leaves(params, new))


def _factors(file: Adapters, place: Place, leaves: dict[str, Any]) -> list[Factors]:
    """Return the factors for every leaf of a place."""
    k, n = leaves[place.leaves[0]].shape[-2:]
    return place.stack([file.read(module, k, n) for module in place.modules])


def _check_base(folder: Path, model: Model) -> None:
    kept = recorded(folder).get(BASE)
    if kept and kept != (mine := digest_of_base(model)):
        raise ValueError(
            f"the adapter in {folder} was made for another base than {model.name}: the digest of "
            f"its matrices is {kept[:12]}, not {mine[:12]}; give the model that the adapter was "
            "trained on, packed in the same way"
        )


def save_peft(
    folder: str | Path, model: Model, base: str = "", *, overwrite: bool = False, run: str = ""
) -> None:
    """Write the LoRA adapters of a model as a PEFT folder, atomically.

    PEFT can put them on the model with unpacked weights, too, which then computes what was trained
    up to the rounding of the base. This does not hold for `jaxquant.adapters.LoRA` with an `init`
    other than "zero", which complements the packed weights.

    Args:
      folder: where to write it; created if missing. It may exist only if it is empty or, with
        `overwrite`, if it is a PEFT folder.
      model: the model, with adapters.
      base: name of the model without adapters, as PEFT shall load it. Default: the model's own.
      overwrite: whether to replace an existing PEFT folder.
      run: the run that made the adapters, to store with them; `recorded` returns it.
    Raises:
      ValueError: the model has no adapters, others than LoRA, adapters that differ in more than
        their values, or adapters on some layers only; an adapter is not finite; or the folder may
        not be replaced.
    """
    target = check_peft_target(folder, overwrite)
    leaves = dict(path_leaves(model.params))
    places = _adapted_places(model, leaves)
    config = _config_of(places, leaves, base or model.name)
    tensors = {
        f"{PREFIX}{module}.{PARTS[part]}": np.ascontiguousarray(a.T, np.float32)
        for place in places
        for module, factors in zip(place.modules, _of_modules(place, leaves), strict=True)
        for part, a in factors._asdict().items()
        if a is not None
    }
    for name, a in tensors.items():
        if not np.isfinite(a).all():
            raise ValueError(f"{name} holds values that are not finite; nothing was written")
    write_peft(target, config, tensors, {BASE: digest_of_base(model), RUN: run}, overwrite)


def _adapted_places(model: Model, leaves: dict[str, Any]) -> list[Place]:
    """Return the places with adapters, which must have them in all layers."""
    adapted = {path for path, w in leaves.items() if is_adapted(w)}
    places = [place for place in places_of(model) if adapted & set(place.leaves)]
    known = {leaf for place in places for leaf in place.leaves}
    if missing := sorted(known - adapted):
        raise ValueError(
            f"{missing[0]} has no adapter, but other layers have one there: put adapters on the "
            "same weights of all layers"
        )
    if others := sorted(adapted - known):
        raise ValueError(f"{others[0]} is no matrix of a layer, so PEFT has no name for its LoRA")
    if not places:
        raise ValueError(f"{model.name} has no adapters to save; see jaxquant.adapt")
    return places


def _of_modules(place: Place, leaves: dict[str, Any]) -> list[Factors]:
    """Return the factors of every module of a place, as NumPy arrays."""
    return place.split([jax.tree.map(np.asarray, factors_of(leaves[p])) for p in place.leaves])


def _config_of(places: list[Place], leaves: dict[str, Any], base: str) -> dict[str, Any]:
    """Return the contents of adapter_config.json."""
    found = {path: _settings(path, leaves[path]) for place in places for path in place.leaves}
    first, settings = next(iter(found.items()))
    for path, other in found.items():
        if other != settings:
            raise ValueError(
                f"the adapters on {first} and {path} differ: {settings} and {other}; a PEFT folder "
                "holds adapters of one rank, scaling and kind here"
            )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": [place.short for place in places],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **settings,
    }


def _settings(path: str, w: jq.QTensor) -> dict[str, Any]:
    """Return the fields of adapter_config.json that an adapter determines."""
    try:
        _, lora = lora_of(w)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    alpha = float(2 * lora.rank if lora.alpha is None else lora.alpha)
    alpha = alpha if lora.init == "zero" else float(lora.rank)  # whose scaling is 1
    return {
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
    }
