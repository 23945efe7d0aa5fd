"""An NNX model with a convolution, attention and norms: 4 bits, W8A8, saved, served elsewhere.

`python nnx_model.py make DIR`, then, in another process, `python nnx_model.py serve DIR`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.conv = nnx.Conv(32, 32, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.conv(self.norm(x))
        x = x + self.attention(x)
        return self.head(self.batch_norm(x))


def call(net, tokens):
    return net(tokens)


def make(folder):
    want = call(net, tokens)
    four = jq.Recipe([("*conv/kernel", jq.rtn(8, "channel")), ("*kernel", jq.rtn(4, "channel")),
                      ("*", jq.KEEP)])  # fmt: skip
    made = {
        "four": jq.quantize(net, four, jq.sites(call, net, tokens)),
        "eight": jq.quantize(net, jq.smoothquant(), jq.calibrate(call, net, [tokens])),
    }
    for name, qnet in made.items():
        got = nnx.jit(jq.quantized(call))(qnet, tokens)
        error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
        print(f"{name}: error {error:.4f}, {jq.bits_per_weight(qnet):.2f} bits per weight")
        print(jq.summary(nnx.state(qnet)))
        print(jq.explain(call, qnet, tokens))
        jq.save(f"{folder}/{name}", nnx.state(qnet))
        np.save(f"{folder}/{name}.npy", got)


def serve(folder):
    graph, state = nnx.split(net)
    for name in ("four", "eight"):
        qnet = nnx.merge(graph, jq.load(f"{folder}/{name}", like=state))
        got = nnx.jit(jq.quantized(call))(qnet, tokens)
        print(f"{name}: served {np.array_equal(got, np.load(f'{folder}/{name}.npy'))}")
        assert "QTensor" in repr(qnet)
    try:
        qnet(tokens)
    except TypeError as error:
        print(error)


net = Net(nnx.Rngs(0))
tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
{"make": make, "serve": serve}[sys.argv[1]](sys.argv[2])
