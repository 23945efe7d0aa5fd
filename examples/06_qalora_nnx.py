"""QA-LoRA on an NNX module: 3-bit weights learn text in capitals, and the merge loses nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxquant as jq
from jaxquant_models.readers.text import builtin_text

general, other = builtin_text()
general, special = (np.frombuffer(t.encode(), np.uint8) for t in (general, other.upper()))
special, held_out = special[:-40_000], special[-40_000:]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(256, 32, rngs=rngs)
        self.hidden = nnx.Linear(512, 512, rngs=rngs)
        self.out = nnx.Linear(512, 256, rngs=rngs)

    def __call__(self, bytes_):
        h = self.embed(bytes_).reshape(len(bytes_), -1)
        return self.out(jax.nn.relu(self.hidden(h)))


def loss(params, windows):
    logits = nnx.merge(graph, params)(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()


def trained(params, which, text, steps, rate):
    (learning, fixed), optimizer = eqx.partition(params, which), optax.adam(rate)

    @jax.jit
    def step(learning, state, windows):
        slope = jax.grad(lambda a: jq.quantized(loss)(eqx.combine(a, fixed), windows))(learning)
        updates, state = optimizer.update(slope, state, learning)
        return optax.apply_updates(learning, updates), state

    state = optimizer.init(learning)
    for i in range(steps):
        starts = np.random.default_rng(i).integers(0, len(text) - 17, (256, 1))
        learning, state = step(learning, state, text[starts + np.arange(17)].astype(np.int32))
    return eqx.combine(learning, fixed)


graph, params = nnx.split(Net(nnx.Rngs(0)))
params = trained(params, jax.tree.map(lambda a: True, params), general, 750, 1e-3)
offsets = jq.formats.Offset(jq.formats.Integer(bits=3, group_size=32, symmetric=True))
method = jq.Method("base", jq.rounding.Nearest(), offsets)
packed = jq.quantize(params, jq.Recipe([("hidden/kernel", method), ("*", jq.KEEP)]))
model, judge = jq.adapt(packed, jq.adapters.QALoRA(rank=8)), jax.jit(jq.quantized(loss))
windows = jnp.asarray(held_out[: 17 * 2048].reshape(-1, 17), jnp.int32)
print("before:", judge(model, windows))
model = trained(model, jq.trained(model), special, 500, 2e-2)
print("adapted:", judge(model, windows), "merged:", judge(jq.merge(model), windows))
