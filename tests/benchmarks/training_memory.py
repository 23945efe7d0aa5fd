"""Bytes of a training step, forward only and by derivatives, against bytes of inference.

Run: python -m tests.benchmarks.training_memory
Of compiled programs (`memory_analysis`: arguments, outputs that are no argument's memory, and
temporaries) on this machine's backend, for SmolLM2-135M and, ahead of time, never run, for a Llama
of 13B at the lightweight setting of ZeroQAT: 2 bits in groups of 128, queries and values latent in
float16. Losses are of one sequence at a time. Parameters are donated: a step writes over them.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import LAYER_MATRICES, Llama
from jaxquant_models.readers.model import Model
from tests.benchmarks.record import Record, add_option

SMALL = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, tie_embeddings=True)
LARGE = LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128)
LIGHT = "layers/attn/[qv]/kernel"
KEEP = ("*", jq.KEEP)


def shapes(config, recipe, trained=None):
    """The tree of a quantized model, never made; latent by the recipe of what trains."""
    model = Llama(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    named = Model("", config, params, None)
    sites = named.sites()

    def make(params):
        packed = jq.quantize(params, recipe, sites)
        return packed if trained is None else jq.thaw(packed, trained)

    tree = jax.eval_shape(make, params)

    def stored(path, a):
        """As on a device that serves: what is kept, and what trains, in float16."""
        large = a.dtype == jnp.float32 and a.ndim >= 2 and "scale" not in jax.tree_util.keystr(path)
        return jax.ShapeDtypeStruct(a.shape, jnp.float16 if large else a.dtype)

    return jax.tree_util.tree_map_with_path(stored, tree)


def loss_of(config, dtype, remat=False):
    """The loss of a tree on tokens [batch, length], one sequence at a time."""
    run = Llama(config, dtype, remat=remat)
    one = jq.quantized(lambda p, t: next_token_loss(run.apply({"params": p}, t[None]), t[None]))
    return lambda p, tokens: jnp.mean(jax.lax.map(lambda t: one(p, t), tokens))


def held(program, *arguments, donate=()):
    """Bytes that a compiled program holds."""
    m = jax.jit(program, donate_argnums=donate).lower(*arguments).compile().memory_analysis()
    output = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + output + m.temp_size_in_bytes


def descent(loss, how):
    """A step of AdamW, blocks recomputed in the backward pass."""

    def step(train, state, rest, tokens):
        whole = lambda train: loss(eqx.combine(train, rest), tokens)
        value, slope = jax.value_and_grad(whole)(train)
        updates, state = how.optimizer(train).update(slope, state, train)
        return jax.tree.map(jnp.add, train, updates), state, value

    return step


def rows(config, dtype, method, batch, length, light):
    """(what, bytes) of every program."""
    recipe = jq.Recipe([(LAYER_MATRICES, method), KEEP])
    moves = jq.Recipe([(LIGHT if light else LAYER_MATRICES, method), KEEP])
    packed, latent = shapes(config, recipe), shapes(config, recipe, moves)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss, kinds = loss_of(config, dtype), ("weight", "scale")
    yield "inference, packed", held(loss, packed, tokens)
    yield "inference, latent", held(loss, latent, tokens)
    how = jq.training.Zeroth(
        epsilon=0.5, drawing=jq.estimators.Drawing(signs=True, relative=True), kinds=kinds
    )
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    yield "ZeroQAT step", held(jq.training.zo_step(loss, how), latent, key, rate, tokens, donate=0)
    qat = jq.training.QAT()
    train, rest = eqx.partition(latent, qat.trained(latent))
    state = jax.eval_shape(qat.optimizer(train).init, train)
    yield (
        "QAT step",
        held(
            descent(loss_of(config, dtype, remat=True), qat),
            train,
            state,
            rest,
            tokens,
            donate=(0, 1),
        ),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_option(parser)
    columns = ("model", "program", "MB", "to inference of the same", "to packed")
    table, kept = Table(*columns), Record(parser.parse_args().json, *columns)
    for name, *case in (
        ("SmolLM2, 4 bits", SMALL, jnp.float32, jq.lsq(4, 64), 4, 512, False),
        ("SmolLM2, 2 bits, q, v", SMALL, jnp.float32, jq.lsq(2, 64), 4, 512, True),
        ("13B, 2 bits, q, v", LARGE, jnp.float16, jq.lsq(2, 128), 16, 512, True),
    ):
        found = dict(rows(*case))
        for what, size in found.items():
            same, packed = (size / found[f"inference, {x}"] for x in ("latent", "packed"))
            row = (name, what, f"{size / 1e6:,.0f}", f"{same:.3f}", f"{packed:.3f}")
            table.add_row(*row)
            kept.add(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
