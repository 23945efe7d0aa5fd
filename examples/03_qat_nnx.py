"""Train ternary weights and int8 inputs (BitNet) in an NNX loop: the next byte of help topics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxquant as jq
from jaxquant_models.readers.text import builtin_text

train, test = (np.frombuffer(text.encode(), np.uint8) for text in builtin_text())


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


@jax.jit
def step(params, state, windows):
    value, slope = jax.value_and_grad(jq.quantized(loss))(params, windows)
    updates, state = optimizer.update(slope, state, params)
    return optax.apply_updates(params, updates), state, value


graph, params = nnx.split(Net(nnx.Rngs(0)))
params = jq.latent(params, jq.Recipe([("hidden/kernel", jq.bitnet()), ("*", jq.KEEP)]))
optimizer = optax.adam(1e-3)
state = optimizer.init(params)
for i in range(1001):
    starts = np.random.default_rng(i).integers(0, len(train) - 17, (256, 1))
    params, state, value = step(
        params, state, jnp.asarray(train[starts + np.arange(17)], jnp.int32)
    )
    if i % 250 == 0:
        print(f"step {i}: {value:.3f} nats a byte")
packed, judge = jq.freeze(params), jax.jit(jq.quantized(loss))
windows = jnp.asarray(test[: 17 * 4096].reshape(-1, 17), jnp.int32)
print("held out, latent:", judge(params, windows), "packed:", judge(packed, windows))
