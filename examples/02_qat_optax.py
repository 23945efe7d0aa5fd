"""Train at 2 bits in an Optax loop: the next byte of CPython's help topics, from 16 before it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq
from jaxquant_models.readers.text import builtin_text

train, test = (np.frombuffer(text.encode(), np.uint8) for text in builtin_text())


def batch(text, seed):
    starts = np.random.default_rng(seed).integers(0, len(text) - 17, (256, 1))
    return jnp.asarray(text[starts + np.arange(17)], jnp.int32)


def loss(params, windows):
    h = params["embed"][windows[:, :-1]].reshape(256, -1)
    logits = jax.nn.relu(h @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()


@jax.jit
def step(params, state, windows):
    value, slope = jax.value_and_grad(jq.quantized(loss))(params, windows)
    updates, state = optimizer.update(slope, state, params)
    return optax.apply_updates(params, updates), state, value


draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5
params = {"embed": 4 * draw(0, 256, 32), "hidden": draw(1, 512, 512), "out": draw(2, 512, 256)}
params = jq.latent(params, jq.Recipe([("hidden", jq.lsq(bits=2)), ("*", jq.KEEP)]))
relative = optax.chain(optax.adam(1e-3), jq.training.relative())  # of scales, to their sizes
optimizer = jq.training.optimizer(
    params, weight=optax.adam(1e-3), scale=relative, other=optax.adam(1e-3)
)
state = optimizer.init(params)
for i in range(1001):
    params, state, value = step(params, state, batch(train, i))
    if i % 250 == 0:
        print(f"step {i}: {value:.3f} nats a byte")
packed, judge = jq.freeze(params), jax.jit(jq.quantized(loss))
print("held out, latent:", judge(params, batch(test, 0)))
print("held out, packed:", judge(packed, batch(test, 0)), packed["hidden"])
