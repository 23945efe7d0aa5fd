"""The command `jaxquant generate`."""

from typing import Any

import click
import jax

import jaxquant as jq
from jaxquant_models.cli.console import emit, line, usage_errors
from jaxquant_models.cli.model_options import (
    activations_option,
    adapter_option,
    kv_format,
    kv_options,
    load_with,
    sampling_options,
    with_adapters,
)
from jaxquant_models.cli.sizes import kv_sizes
from jaxquant_models.cli.speed import speed_line, speed_of
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.chat import chat_ids, chat_model
from jaxquant_models.runs.generate import Session
from jaxquant_models.runs.serving import serving_model


@click.command()
@click.argument("model")
@click.option(
    "--prompt", required=True, help="Text to continue or, with --chat, the message to answer."
)
@click.option(
    "--chat",
    "as_chat",
    is_flag=True,
    help="Treat the prompt as a user message, wrapped in the chat template of MODEL, and print "
    "only the answer.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@sampling_options
@adapter_option
@activations_option
@kv_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def generate(
    model: str,
    prompt: str,
    as_chat: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
    adapters: tuple[str, ...],
    activations: str | None,
    as_json: bool,
    **kv_cache: Any,
) -> None:
    """Continue a prompt with MODEL; with --chat, answer it.

    MODEL is the name smollm2-135m, a .gguf file, a Hugging Face model folder, or a checkpoint
    written by jaxquant. Speed, compilation time and memory use are printed on stderr, or included
    in the report with --json. Of several adapters, each has a text of its own.
    """
    with usage_errors():
        kv = kv_format(kv_cache)
    models = _models(activations, model, adapters)
    source, ids = _asked(models[0][1], prompt, as_chat)
    apply_cached = jq.quantized(source.apply_cached)  # compiled once for all adapters
    for about, params in ((about, one.params) for about, one in models):
        session = Session(apply_cached, params, source.config, kv=kv)
        parts = session.stream(ids, max_tokens, temperature, jax.random.key(seed))
        new = [token for part in parts for token in part]
        text = source.tokenizer.decode(new)
        speed = speed_of(session, params)
        if as_json:
            report = {**about, "prompt": prompt, "text": text, "tokens": len(new)}
            emit({**report, **kv_sizes(kv, source.config), **speed}, as_json)
            continue
        if len(adapters) > 1:
            click.echo(f"adapter: {about['adapter']}")
        click.echo(text if as_chat else prompt + text)
        line(speed_line(speed))
    if not new and max_tokens and not as_chat and source.tokenizer.chat is not None:
        line(f"{model} ended the text at once; it is trained to chat: try --chat")


def _models(
    activations: str | None, spec: str, adapters: tuple[str, ...]
) -> list[tuple[dict[str, str], Model]]:
    """Return the model, or the model with each of the adapters, ready to serve."""
    found = with_adapters(load_with(activations, spec), adapters)
    return [(about, serving_model(one, line)) for about, one in found]


def _asked(source: Model, prompt: str, as_chat: bool) -> tuple[Model, list[int]]:
    """Return the model with its stop tokens, and the tokens of the prompt."""
    if not as_chat:
        return source, source.bos_ids + source.tokenizer.encode(prompt)
    source = chat_model(source)
    return source, chat_ids(source, [{"role": "user", "content": prompt}])
