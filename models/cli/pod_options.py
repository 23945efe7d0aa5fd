"""The options of `jaxquant plan` for a slice of a TPU pod."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import jaxquant as jq
from jaxquant.storage import is_checkpoint
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.named import ARCHITECTURES
from jaxquant_models.cli.quantize_request import request_of
from jaxquant_models.readers.huggingface_config import config_from_hf, read_config_json
from jaxquant_models.readers.registry import is_kind, open_model
from jaxquant_models.runs.pod_mesh import mesh_of_text
from jaxquant_models.runs.pod_request import PodRequest
from pallas_kernels.cost.topologies import slice_of

BATCH, CONTEXT = 64, 8192  # defaults of --batch and --context
UNQUANTIZED = 16  # bits of bfloat16
NOT_PLANNED = {
    "heal_steps": "--heal", "heal_layers": "--heal-layers", "heal_codes": "--heal-codes",
    "heal_text": "--heal-text", "learn_steps": "--learn", "rotate_residual": "--rotate-residual",
    "rotate_steps": "--rotate-steps", "exact_prefix": "--exact-prefix",
    "heal_batch": "--heal-batch", "effort": "--effort", "calibration": "--calibration",
    "calibration_tokens": "--calibration-tokens", "weighting": "--weighting", "seed": "--seed",
}  # fmt: skip
OF_METHODS = {
    "method": "--method", "recipe_file": "--recipe", "train": "--train",
    "target_bits": "--target-bits", "group_size": "--group-size",
    "symmetric": "--symmetric and --asymmetric", "activations": "--activations",
    "act_order": "--act-order and --no-act-order", "settings": "--set",
}  # fmt: skip
# Defaults of the options of `quantize`.
DEFAULTS = {name: of.default for name, of in inspect.signature(request_of).parameters.items()}
METHODS = {"": "rtn", "qlora": "nf4", "qat": "lsq"}  # default of --method, by --train

OPTIONS = (
    click.option(
        "--topology",
        default=None,
        metavar="NAME",
        help="Plan how MODEL runs on a slice of a TPU pod, such as v5e:4x4 or v5p:8x8x8, instead "
        "of planning its quantization on this machine. MODEL may then also be the name of an "
        f"architecture ({', '.join(ARCHITECTURES)}) or a config.json file of Hugging Face. The "
        "default of --method is rtn, nf4 with --train qlora, and lsq with --train qat; --bits 16 "
        "leaves all weights in bfloat16. No weights and no TPU are needed. If the package libtpu "
        "is installed, its compiler compiles the program; otherwise, a formula estimates the "
        "temporary memory and the communication of the compiled program.",
    ),
    click.option(
        "--mesh",
        default=None,
        metavar="AXES",
        help="Names and sizes of the axes of the device mesh, such as data=2,model=8; the product "
        "of the sizes must be the number of devices. The axis model splits attention heads, hidden "
        "units and the vocabulary; expert splits the experts of a mixture of experts; data splits "
        "the batch, and also every weight along its remaining axis. By default, model is as large "
        "as the key-value heads and the packed weights allow. Requires --topology.",
    ),
    click.option(
        "--batch",
        type=click.IntRange(1),
        default=None,
        help=f"Number of sequences in a step. The default is {BATCH}. Requires --topology.",
    ),
    click.option(
        "--context",
        type=click.IntRange(1),
        default=None,
        help="Number of tokens for which the cache has room in each sequence; with --prefill or "
        f"--train, number of tokens per sequence. The default is {CONTEXT}, or the maximum number "
        "of positions of MODEL if that is smaller. Requires --topology.",
    ),
    click.option(
        "--train",
        type=click.Choice(("qlora", "qat")),
        default=None,
        help="Plan a training step instead of a decoding step. The step trains LoRA adapters of "
        "rank 16 on quantized weights (qlora), or floating-point weights that are rounded in every "
        "product (qat). Requires --topology.",
    ),
    click.option(
        "--prefill",
        is_flag=True,
        help="Plan the step that reads prompts of --context tokens each, instead of a decoding "
        "step. Requires --topology.",
    ),
)


def pod_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for slices to a command; their values are arguments of `pod_request`.

    Args:
      command: the function of the command.
    """
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def check_without_topology(**options: Any) -> None:
    """Raise ValueError if an option for slices is given without `--topology`.

    Args:
      **options: the values of the options by name; None and False mean that one was not given.
    """
    if given := [name for name, value in options.items() if value]:
        raise ValueError(
            f"--{given[0]} needs --topology: add a slice, such as --topology v5e:4x4, or leave out "
            f"--{given[0]}"
        )


def pod_request(
    model: str, *, topology: str, mesh: str | None, batch: int | None, context: int | None,
    train: str | None, prefill: bool, **quantization: Any,
) -> PodRequest:  # fmt: skip
    """Return the request described by the options.

    Args:
      model: the name of an architecture, a config.json file or its folder, or a model as in
        `readers.registry.open_model`.
      topology, mesh, batch, context, train, prefill: the values of `OPTIONS`.
      **quantization: the values of the options of `quantize_options`.
    Raises:
      ValueError: options contradict each other, or a value is out of range.
    """
    if train and prefill:
        raise ValueError("--prefill and --train plan different steps; give only one of them")
    at, config = slice_of(topology), config_of(model)
    return PodRequest(
        config,
        _recipe(train or "", quantization),
        train or ("prefill" if prefill else "decode"),
        BATCH if batch is None else batch,
        min(CONTEXT, config.max_position) if context is None else context,
        at,
        () if mesh is None else mesh_of_text(mesh),
    )


def config_of(model: str) -> LlamaConfig:
    """Return the architecture of this name, or the architecture of a model; no weights are read.

    Args:
      model: as in `pod_request`.
    Raises:
      ValueError: there is no such architecture and no such model, or the model is already
        quantized.
    """
    if model.lower() in ARCHITECTURES:
        return ARCHITECTURES[model.lower()]
    path = Path(model)
    if is_kind(is_checkpoint, path):
        raise ValueError(
            f"{model} is already quantized, but --topology plans how to quantize a model: give the "
            f"unquantized one, or one of the architectures {', '.join(ARCHITECTURES)}"
        )
    if path.name == "config.json" and is_kind(Path.is_file, path):
        return config_from_hf(read_config_json(path.parent))
    if is_kind(Path.is_dir, path) and (path / "config.json").is_file():
        return config_from_hf(read_config_json(path))
    try:
        return open_model(model).outline.config
    except ValueError as error:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{error}; it is not one of the architectures {known} either") from None


def _recipe(train: str, options: dict[str, Any]) -> jq.Recipe:
    """Return the recipe of the options; without --method and --recipe, that of `METHODS`."""
    for flag in _given(options, NOT_PLANNED):
        raise ValueError(f"a plan with --topology does not consider {flag}: leave it out")
    if options.get("bits") == UNQUANTIZED:
        for flag in _given({**options, "train": train}, OF_METHODS):
            raise ValueError(f"--bits 16 leaves weights as they are: leave out {flag}")
        return jq.Recipe([("*", jq.KEEP)])
    if options.get("target_bits") is not None:
        raise ValueError(
            "--target-bits needs the weights of a model, which --topology does not read: give "
            "--method and --bits instead"
        )
    if options.get("method") is None and options.get("recipe_file") is None:
        options = options | {"method": METHODS[train]}
        if train == "qlora":
            options["settings"] = (*options["settings"], "double_quant=true")
    recipe = request_of(**options).recipe
    if recipe is None:
        raise ValueError("give --method or --recipe with --topology")
    return recipe


def _given(options: dict[str, Any], flags: dict[str, str]) -> Iterator[str]:
    """Yield the flags that are given; a pair of opposite flags is None if neither is given."""
    for name, flag in flags.items():
        value = options.get(name)
        given = value and value != DEFAULTS.get(name)
        if given or (" and " in flag and value is False):
            yield flag
