"""Measured decode of SmolLM2-135M beside the least time that its bytes allow on this CPU.

Run: python -m tests.benchmarks.memory_wall. A bound above a measured time would be an error, and
ends the program with one. Weights are those that `generate` runs, layers apart; the bandwidth is
the fastest reading of as many bytes as the weights have, since a small model stays in the cache in
part, measured before and after the decoding. A token's time is that of the decode steps of one run
(without its prefill) over their number, in the fastest of several runs: a difference of two runs
would fall below the truth whenever the shorter one was disturbed. The bound's context is the mean
of those steps, which is fair because a maximum of times linear in the context is convex in it.
"""

import argparse
import dataclasses

import jax.numpy as jnp

import jaxquant as jq
from jaxquant.theory.serving_roofline import critical_batch, decode
from jaxquant.theory.this_machine import this_machine
from jaxquant.theory.workload import Attention, workload
from jaxquant_models import load
from jaxquant_models.runs.generate import Session
from jaxquant_models.runs.recipes import recipe_of
from tests.benchmarks.record import Record, add_option

REPEATS, PROMPT, TOKENS = 5, [1] * 8, 128
CONTEXT = len(PROMPT) + (TOKENS - 2) // 2  # the prefill makes the first token


def variants(model):
    sites = jq.sites(model.apply_fn, model.params, jnp.ones((1, 8), jnp.int32))
    yield "float32", jq.ptq.unstack(model.params, "layers")
    for bits in (4, 2):
        packed = jq.quantize(model.params, recipe_of(jq.rtn(bits=bits)), sites)
        apart = jq.ptq.unstack(packed, "layers")
        yield f"packed {bits}-bit", apart
        yield f"packed {bits}-bit, int8", jq.ptq.with_activations(apart, "int8")


def seconds_per_token(model, params):
    """The least time of a decode step, the mean over those of one run."""
    run = jq.quantized(model.apply_cached)

    def once():
        session = Session(run, params, model.config)
        made = sum(len(part) for part in session.stream(PROMPT, TOKENS))
        assert made == 1 + session.decode.tokens == TOKENS, "the text ended early"
        return session.decode.seconds / session.decode.tokens

    once()  # compiles
    return min(once() for _ in range(REPEATS))


def faster(one, other):
    """The machine with the larger figures of two measurements."""
    larger = {f: max(getattr(one, f), getattr(other, f)) for f in ("bandwidth", "flops", "ops")}
    return dataclasses.replace(one, **larger)


def main():
    parser = argparse.ArgumentParser()
    add_option(parser)
    options = parser.parse_args()
    rows = Record(
        options.json, "weights", "MB read", "GB/s", "bound, per token", "measured", "ratio",
        "bound by", "critical batch",
    )  # fmt: skip
    model, failed = load("smollm2-135m"), []
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))
    c = model.config
    attention = Attention(c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, "float32")
    for name, params in variants(model):
        work = workload(params, attention, last=["embed/embedding"])
        before = this_machine(work.weight_bytes)
        measured = seconds_per_token(model, params)
        machine = faster(before, this_machine(work.weight_bytes))
        bound, batch = decode(work, machine, 1, CONTEXT), critical_batch(work, machine, CONTEXT)
        rows.add(
            name, bound.bytes / 1e6, machine.bandwidth / 1e9, f"{1e3 * bound.seconds:.2f} ms",
            f"{1e3 * measured:.2f} ms", measured / bound.seconds, bound.wall,
            "none" if batch is None else f"{batch:.2g}",
        )  # fmt: skip
        print(*rows.rows[-1], sep="  ", flush=True)
        if measured < bound.seconds:
            failed.append(name)
    if failed:
        raise SystemExit(f"the bound exceeds what is measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
