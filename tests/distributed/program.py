"""What every host of the tests runs: quantize, save, restore, evaluate and generate a small Llama.

    python -m tests.distributed.program PORT COUNT INDEX FOLDER COMMAND...

The commands: "quantize" or "quantize:BITS"; "die", at which host 1 is killed while it quantizes;
"score"; "stack"; "leave:HOST", which kills that host; "wait"; "fail"; "early",
at which host 1 fails before anyone uses JAX; and "exit:STATUS".
"""

import atexit
import dataclasses
import json
import os
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant_models.architectures import llama
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.shardings import model_sharding
from jaxquant_models.runs.generate import generate

CONFIG = LlamaConfig(
    vocab_size=128, d_model=128, d_ff=256, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=32
)
MODEL = llama.Llama(CONFIG)


def logits(p, t):
    return llama.apply(MODEL, p, t)


def cached(p, t, cache):
    return llama.apply(MODEL, p, t, cache)


def tokens():
    return np.asarray(np.random.default_rng(0).integers(0, 128, (8, 32)), np.int32)


def main(port, count, index, folder, commands, wait=20):
    """Run as one of `count` hosts, which start within `wait` seconds."""
    early = "early" in commands
    with jq.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        index,
        initialization_timeout=wait,
        heartbeat_timeout_seconds=10,
    ):
        if early and index:
            raise ValueError("bad configuration")
        if early:
            time.sleep(60)
        devices = np.array(jax.devices()).reshape(-1, 1)
        mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        found = {}
        for command in commands:
            name, _, value = command.partition(":")
            if name == "quantize":
                quantize(mesh, Path(folder), int(value or 4), "die" in " ".join(commands))
            if name == "score":
                found |= score(mesh, Path(folder))
            if name == "stack":
                found |= stack(mesh)
            if name == "leave" and index == int(value):
                os.kill(os.getpid(), 9)
            if name == "wait":
                time.sleep(60)
            if name == "fail":
                raise ConnectionResetError("Connection reset by the user's own peer")
            if name == "exit":
                sys.exit(int(value))
        if index == 0:
            print(json.dumps(found))


def logged(out, err, *given):
    """Run `main` in a process of its own that writes its output and errors to two files."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the work
    try:
        main(*given)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        atexit._run_exitfuncs()  # as any program does at its end, but not multiprocessing's


def quantize(mesh, folder, bits, dies):
    """Calibrate on the hosts' parts of the batch, round, and save."""
    params = jax.jit(MODEL.init)(jax.random.key(0), tokens()[:1])["params"]
    at = model_sharding(params, CONFIG, mesh)
    params = jax.device_put(jax.tree.map(np.asarray, params), at)
    batch = NamedSharding(mesh, P("data"))
    given = jax.make_array_from_callback((8, 32), batch, lambda part: tokens()[part])
    stats = jq.calibrate(logits, params, [given])
    recipe = jq.Recipe([("layers/*kernel", jq.gptq(bits, 32)), ("*", jq.KEEP)])

    def rounded(done):
        if jax.process_index() == 0:
            print(done.path, "now" if done.seconds else "before", file=sys.stderr, flush=True)
        if dies and jax.process_index() == 1 and done.index == 5:
            os.kill(os.getpid(), 9)

    with jq.distributed.shared_store(folder / "work", {"bits": bits}) as finished:
        q = jq.quantize(params, recipe, stats, progress=rounded, finished=finished)
        jq.save(folder / "packed", {"params": q}, overwrite=True)


def stack(mesh):
    """Round a stack of which every host holds some of the layers, and only rounds these."""
    key = jax.random.key(0)
    layers, x = (np.asarray(jax.random.normal(key, shape)) for shape in ((4, 64, 32), (4, 16, 64)))
    fn = lambda p, x: jnp.einsum("lmk,lkn->lmn", x, p["w"])
    stats = jq.calibrate(fn, {"w": layers}, [x])
    split = jax.device_put(layers, NamedSharding(mesh, P("data")))
    method = dataclasses.replace(jq.gptq(3, 32), input=jq.transforms.Rotation())  # draws signs
    q = jq.quantize({"w": split}, method, stats)["w"]
    if q.data["codes"].addressable_shards[0].data.shape[0] * len(jax.devices()) != 4:
        raise SystemExit(f"a host holds {q.data['codes'].addressable_shards[0].data.shape}")
    digest = jax.jit(lambda q: jnp.einsum("lkn,n,l->", q.dequantize(), jnp.arange(32.0), powers))
    powers = 3.0 ** jnp.arange(4)
    return {"stack": float(digest(q))}


def score(mesh, folder):
    """Restore to this mesh, each host its own shards, and use the model."""
    outline = jq.storage.outline(folder / "packed")["params"]
    at = model_sharding(outline, CONFIG, mesh)
    like = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), outline, at
    )
    q = jq.load(folder / "packed", like={"params": like})["params"]
    codes = q["layers"]["mlp"]["up"]["kernel"].data["codes"]
    part = codes.addressable_shards[0].data.shape
    if part[1] * len(jax.devices()) != codes.shape[1]:
        raise SystemExit(f"a host holds {part} of {codes.shape}")
    run = jq.quantized(logits, shardings=at, data_axes=("data",))
    step = jq.quantized(cached, shardings=at, data_axes=("data",))
    found = jq.evaluate(run, q, tokens())
    ids = generate(step, q, CONFIG, [1, 2, 3], max_tokens=8)
    weights = [(p, w) for p, w in jq.core.path_leaves(q) if isinstance(w, jq.QTensor)]
    digest = {p: float(jnp.sum(jnp.abs(w.dequantize()))) for p, w in weights}
    return {"perplexity": found.perplexity, "ids": ids, "weights": digest}


if __name__ == "__main__":
    port, count, index = map(int, sys.argv[1:4])
    main(port, count, index, sys.argv[4], sys.argv[5:])
