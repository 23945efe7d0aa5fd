"""Options of the commands that run a model: rounding of activations, keys and values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import click

import jaxquant as jq
from jaxquant.formats.kv_cache import ROPE, KVFormat
from jaxquant_models.cli.console import usage_errors
from jaxquant_models.cli.options import SEED
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.peft import load_peft
from jaxquant_models.runs.measuring import return_freed_memory

adapter_option = click.option(
    "--adapter", "adapters", multiple=True, metavar="DIR",
    help="LoRA adapter to put on the weights of MODEL: a PEFT folder with adapter_config.json and "
    "adapter_model.safetensors. A folder that jaxquant wrote fits only the MODEL that it was "
    "trained on, packed in the same way. This option may be given several times; the command then "
    "runs MODEL with each adapter in turn.",
)  # fmt: skip
activations_option = click.option(
    "--activations", default=None, metavar="FORM",
    help="Format to which the inputs of matmuls with quantized weights are rounded: float (no "
    "rounding), float8, int8/256 (one scale per 256 channels) or int2 to int8 (one scale per "
    "token), for example int4 or int4,asymmetric,clip=0.9, where clip is the fraction of the range "
    "that is kept. The default is the format stored in the checkpoint.",
)  # fmt: skip


def load_with(activations: str | None, spec: str, widen: bool = True) -> Model:
    """Load a model whose packed weights round their inputs as the option says.

    Args:
      activations: the value of `--activations`; None leaves it to the checkpoint.
      spec, widen: as in `readers.registry.load`.
    """
    with usage_errors():
        jq.Activations.of(activations)
    model = registry.load(spec, widen=widen)
    return_freed_memory()  # of the parts of a checkpoint, which are read one by one
    if activations is None:
        return model
    return dataclasses.replace(model, params=jq.ptq.with_activations(model.params, activations))


def with_adapters(model: Model, folders: Sequence[str]) -> list[tuple[dict[str, str], Model]]:
    """Return the model with the adapter of each folder, and what a report says of the folder.

    The models share the weights without adapters.

    Args:
      model: the model.
      folders: the values of `--adapter`; without any, the model is returned as it is.
    Raises:
      ValueError: a folder holds no adapter for this model.
    """
    if not folders:
        return [({}, model)]
    return [({"adapter": folder}, load_peft(folder, model)) for folder in folders]


def sampling_options(command: Callable) -> Callable:
    """Add the options of sampling, `--temperature` and `--seed`, to a command.

    Args:
      command: the function of the command.
    """
    command = click.option("--seed", type=SEED, default=0, show_default=True,
                           help="Random seed for sampling.")(command)  # fmt: skip
    return click.option(
        "--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
        help="Sampling temperature; 0 always takes the most likely token.",
    )(command)  # fmt: skip


def kv_options(command: Callable) -> Callable:
    """Add the options of the key-value cache to a command; `kv_format` reads them.

    Args:
      command: the function of the command.
    """
    default = KVFormat()
    for name, kind, text in (
        (
            "channels",
            int,
            f"Number of channels of a value vector that share a scale; it must divide the head "
            f"dimension. The default is {default.channels}.",
        ),
        (
            "group",
            int,
            f"Number of consecutive tokens whose keys share one scale per channel. The default "
            f"is {default.group}.",
        ),
        (
            "keys",
            click.Choice(ROPE),
            f"Whether keys are quantized before RoPE (pre) or after it (post). The default is "
            f"{default.rope}.",
        ),
        (
            "sinks",
            int,
            f"Number of tokens at the start of a sequence (attention sinks) whose keys and values "
            f"are not quantized. The default is {default.sinks}.",
        ),
        (
            "window",
            int,
            f"Minimum number of most recent tokens whose keys and values are not quantized, a "
            f"multiple of --kv-group. The default is {default.window}.",
        ),
        (
            "bits",
            int,
            "Quantize the key-value cache to 2, 3, 4 or 8 bits; the other --kv options refine "
            "this. By default the cache is not quantized.",
        ),
    ):
        command = click.option(f"--kv-{name}", type=kind, default=None, help=text)(command)
    return command


def kv_format(options: dict[str, Any]) -> KVFormat | None:
    """Return the cache format described by the options of `kv_options`, or None.

    Args:
      options: option name -> value.
    Raises:
      ValueError: options are given without `--kv-bits`, or are out of range.
    """
    given = {name.removeprefix("kv_"): v for name, v in options.items() if v is not None}
    if given and "bits" not in given:
        raise ValueError(f"--kv-{min(given)} needs --kv-bits; give both")
    if "keys" in given:
        given["rope"] = given.pop("keys")
    return KVFormat(**given) if given else None
