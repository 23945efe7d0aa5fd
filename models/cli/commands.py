"""The command `jaxquant`: quantize, eval, generate, inspect."""

from jaxquant_models.cli import interrupts

if __name__ == "__main__":
    interrupts.arm()  # before anything heavy is imported

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click
import jax
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.evaluate import check_sizes, evaluate
from jaxquant.formats.kv_cache import ROPE, KVFormat
from jaxquant_models.architectures.states import FIRST_QUERY
from jaxquant_models.cli.console import SEED, bar, emit, line, usage
from jaxquant_models.cli.quantize import quantize
from jaxquant_models.cli.train import finetune, train_bitnet
from jaxquant_models.readers.registry import Model
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs import outliers, pipeline
from jaxquant_models.runs.generate import generate as generate_ids


@click.group()
@click.version_option(jq.__version__)
def cli() -> None:
    """Quantize language models, and run and measure them."""


cli.add_command(quantize)
cli.add_command(finetune)
cli.add_command(train_bitnet)


ACTIVATIONS = click.option(
    "--activations", default=None, metavar="FORM",
    help="How inputs of packed weights are rounded: float, float8, int8, int8/256, int4, "
    "int4,asymmetric,clip=0.9, ...; default: as the checkpoint says.",
)  # fmt: skip


def _loaded(model: str, activations: str | None, widen: bool = True) -> Model:
    with usage():
        jq.Activations.of(activations)
    source = pipeline.load_any(model, widen)
    if activations is None:
        return source
    return dataclasses.replace(source, params=jq.with_activations(source.params, activations))


def _serving(source: Model) -> Model:
    """The model with entropy-coded weights in words; says on stderr what they take."""
    params, said = pipeline.serving(source.params)
    if said:
        line(said)
    return dataclasses.replace(source, params=params)


def kv_options(command: Callable) -> Callable:
    """Adds what says how keys and values are kept, for `_kv_format`; defaults are the format's."""
    default = KVFormat()
    for name, kind, text in (
        ("channels", int, f"Channels of one scale of values; default {default.channels}."),
        ("group", int, f"Tokens of one scale of keys; default {default.group}."),
        ("keys", click.Choice(ROPE), f"Rounded before or after RoPE; default {default.rope}."),
        ("sinks", int, f"First tokens kept as they are; default {default.sinks}."),
        ("window", int, f"Recent tokens kept as they are; default {default.window}."),
        ("bits", int, "Keys and values are kept in so many bits; default: as they are."),
    ):
        command = click.option(f"--kv-{name}", type=kind, default=None, help=text)(command)
    return command


def _kv_format(options: dict[str, Any]) -> KVFormat | None:
    """The format that the options of `kv_options` ask for, if any."""
    given = {name.removeprefix("kv_"): v for name, v in options.items() if v is not None}
    if given and "bits" not in given:
        raise ValueError(f"--kv-{min(given)} is for --kv-bits; give both")
    if "keys" in given:
        given["rope"] = given.pop("keys")
    return KVFormat(**given) if given else None


def _kv_sizes(kv: KVFormat | None, model: Model) -> dict[str, float]:
    if kv is None:
        return {}
    c = model.config
    per_token = kv.bytes_per_token(c.n_layers, c.n_kv_heads, c.head_dim)
    return {"kv_bits_per_value": kv.bits_per_value, "kv_bytes_per_token": per_token}


@cli.command("eval")
@click.argument("model")
@click.option("--text", required=True, help="Text FILE or builtin.")
@click.option("--ctx", type=int, default=512, show_default=True)
@click.option("--chunks", type=int, default=None)
@click.option("--against", default=None, help="Teacher for KL and agreement.")
@ACTIVATIONS
@kv_options
@click.option(
    "--strict/--no-strict",
    default=None,
    help="With --kv-bits: every token sees all keys and values rounded, but for sinks and the last "
    "--kv-window (default); or those that would be rounded by then, decoding token by token.",
)
@click.option("--json", "as_json", is_flag=True)
def evaluate_command(
    model: str,
    text: str,
    ctx: int,
    chunks: int | None,
    against: str | None,
    activations: str | None,
    strict: bool | None,
    as_json: bool,
    **kv_cache: Any,
) -> None:
    """Perplexity of MODEL on a text."""
    with usage():
        check_sizes(ctx, chunks)  # before anything is loaded
        kv = _kv_format(kv_cache)
        if kv is None and strict is not None:
            raise ValueError("--strict and --no-strict are for --kv-bits; give both")
    content = read_text(text)
    student = _loaded(model, activations, widen=False)
    sizes = _sizes(student.params)  # as stored
    student = _serving(student)
    pieces = pipeline.pieces(student, content, ctx, chunks)
    teacher = None
    if against is not None:
        other = pipeline.load_any(against)
        if other.tokenizer.encode(content[:10_000]) != student.tokenizer.encode(content[:10_000]):
            raise ValueError(f"{against} and {model} have different tokenizers; KL is undefined")
        teacher = (jq.quantized(other.apply_fn), _serving(other).params)
    logits = jq.quantized(
        student.apply_fn if kv is None else student.apply_kv(kv, strict is not False)
    )
    with bar("evaluating", len(pieces)) as step:
        result = evaluate(logits, student.params, pieces, against=teacher, progress=step)
    report = {k: v for k, v in dataclasses.asdict(result).items() if v is not None}
    emit({**report, **sizes, **_kv_sizes(kv, student)}, as_json)


@cli.command()
@click.argument("model")
@click.option("--prompt", required=True)
@click.option("--max-tokens", type=click.IntRange(0), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--seed", type=SEED, default=0)
@ACTIVATIONS
@kv_options
@click.option("--json", "as_json", is_flag=True)
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
    """Continue a prompt with MODEL."""
    with usage():
        kv = _kv_format(kv_cache)
    source = _serving(_loaded(model, activations))
    ids = pipeline.beginning(source) + source.tokenizer.encode(prompt)
    new = generate_ids(
        jq.quantized(source.apply_cached),
        source.params,
        source.config,
        ids,
        max_tokens,
        temperature,
        jax.random.key(seed),
        kv=kv,
    )
    text = source.tokenizer.decode(new)
    if as_json:
        report = {"prompt": prompt, "text": text, "tokens": len(new)}
        emit({**report, **_kv_sizes(kv, source)}, as_json)
    else:
        click.echo(prompt + text)


@cli.command()
@click.argument("model")
@click.option(
    "--outliers",
    "of_outliers",
    is_flag=True,
    help="Of activations on a text instead: by channel, by token, massive, sinks.",
)
@click.option("--text", default=None, help="Text FILE or builtin, for --outliers.")
@click.option(
    "--tokens",
    type=click.IntRange(FIRST_QUERY + 1),
    default=None,
    help="How many of the text; default 512.",
)
@click.option("--plot", default=None, metavar="FILE", help="Heat map, .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True)
def inspect(
    model: str,
    of_outliers: bool,
    text: str | None,
    tokens: int | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Bytes and bits of every tensor of MODEL, or with --outliers its activations on a text."""
    with usage():
        if of_outliers and text is None:
            raise ValueError("--outliers looks at activations: give --text FILE, or builtin")
        if not of_outliers and (text, tokens, plot) != (None, None, None):
            raise ValueError("--text, --tokens and --plot are for --outliers; give it too")
        if plot is not None:
            outliers.check_plot(plot)
    if text is not None:
        _inspect_outliers(model, text, tokens or pipeline.CONTEXT, plot, as_json)
        return
    params = pipeline.load_any(model, widen=False).params
    rows = [_row(p, w) for p, w in jq.path_leaves(params)]
    sizes = _sizes(params)
    if as_json:
        emit({**sizes, "tensors": rows}, True)
        return
    table = Table("path", "shape", "method", "format", "bits/weight", "bytes")
    for r in rows:
        shape = "x".join(map(str, r["shape"]))
        size_text = f"{r['bytes']:,}"
        bits_text = f"{r['bits_per_weight']:.3f}"
        table.add_row(r["path"], shape, r["method"], r["format"], bits_text, size_text)
    _console().print(table)
    over = "quantized matrices" if any(r["method"] != "none" for r in rows) else "matrices"
    click.echo(
        f"{sizes['bytes']:,} bytes; {sizes['bits_per_weight']:.3f} bits per weight over the {over}"
    )
    click.echo(str(jq.size(params)))


def _inspect_outliers(model: str, text: str, tokens: int, plot: str | None, as_json: bool) -> None:
    content = read_text(text)
    source = _serving(pipeline.load_any(model))
    found = outliers.outliers_of(source, pipeline.pieces(source, content, tokens, 1)[0])
    if plot is not None:
        outliers.plot(found, plot)
    if as_json:
        emit(found.to_json(), True)
        return
    for part in (outliers.table(found), outliers.heat_map(found)):
        _console().print(part)
    click.echo("\n" + "\n".join(found.findings()))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def _row(path: str, w: Any) -> dict[str, Any]:
    packed = isinstance(w, jq.QTensor)
    return {
        "path": path,
        "shape": list(w.shape),
        "method": w.method if packed else "none",
        "format": repr(w.format) if packed else str(w.dtype),
        "bits_per_weight": 8 * w.nbytes / w.size,
        "bytes": w.nbytes,
    }


def _sizes(params: Any) -> dict[str, Any]:
    total = sum(w.nbytes for _, w in jq.path_leaves(params))
    whole = jq.size(params).bits_per_weight
    return {
        "bits_per_weight": jq.bits_per_weight(params),
        "bits_over_all_weights": whole,
        "bytes": total,
    }


def main(args: list[str] | None = None) -> None:
    """Entry point: exit status 0, 1 (failed), 2 (bad usage) or 130 (told to stop).

    An error is one line. Without arguments they, and the process, are the command's own.
    """
    warnings.showwarning = lambda message, *_, **__: line(f"warning: {message}")
    own = args is None
    # A job told to stop cleans up after itself, as one interrupted from the keyboard does.
    with interrupts.working(own):
        try:
            sys.exit(cli.main(args, prog_name="jaxquant", standalone_mode=False) or 0)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, interrupts.Interrupted):
            _interrupted(own)
        except click.Abort as error:  # what click makes of an EOFError, too
            if isinstance(error.__cause__, EOFError):
                _fail(f"unexpected end of a file: {error.__cause__}", 1)
            _interrupted(own)
        except Exception as error:  # a user gets a line whatever it is; JAXQUANT_DEBUG=1 says where
            if os.environ.get("JAXQUANT_DEBUG"):
                raise
            expected = isinstance(error, ValueError | OSError) and str(error)
            _fail(str(error) if expected else f"{type(error).__name__}: {error}", 1)


def _interrupted(own: bool) -> None:
    if own:
        interrupts.leave()  # threads that are still at work would be waited for
    _fail(interrupts.message(), interrupts.STATUS)


def _fail(message: str, status: int) -> None:
    text = " ".join(message.split())
    click.echo(f"error: {text}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
