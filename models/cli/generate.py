"""The command `jaxquant generate`."""

from typing import Any

import click
import jax

import jaxquant as jq
from jaxquant_models.cli.console import emit, line, usage_errors
from jaxquant_models.cli.model_options import activations_option, kv_format, kv_options, load_with
from jaxquant_models.cli.options import SEED
from jaxquant_models.cli.sizes import kv_sizes
from jaxquant_models.runs.generate import generate as generate_ids
from jaxquant_models.runs.serving import serving_model


@click.command()
@click.argument("model")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-tokens", type=click.IntRange(0), default=64, show_default=True,
              help="Most tokens to generate.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Sampling temperature; 0 takes the likeliest token.")  # fmt: skip
@click.option("--seed", type=SEED, default=0, help="Seed of the sampling.")
@activations_option
@kv_options
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def generate(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    activations: str | None,
    as_json: bool,
    **kv_cache: Any,
) -> None:
    """Continue a prompt with MODEL.

    MODEL is smollm2-135m, a .gguf file, a Hugging Face folder, or a checkpoint of jaxquant.
    """
    with usage_errors():
        kv = kv_format(kv_cache)
    source = serving_model(load_with(activations, model), line)
    new = generate_ids(
        jq.quantized(source.apply_cached),
        source.params,
        source.config,
        source.bos_ids + source.tokenizer.encode(prompt),
        max_tokens,
        temperature,
        jax.random.key(seed),
        kv=kv,
    )
    text = source.tokenizer.decode(new)
    if as_json:
        report = {"prompt": prompt, "text": text, "tokens": len(new)}
        emit({**report, **kv_sizes(kv, source.config)}, as_json)
    else:
        click.echo(prompt + text)
