"""A linen `TrainState` loop at 2 bits: latent weights in, packed weights out, the same loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import jaxquant as jq


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="hidden")(x))
        return nn.Dense(10, name="out")(x)


a, b, c = jax.random.split(jax.random.key(0), 3)
x, teacher = jax.random.normal(a, (256, 64)), jax.random.normal(b, (64, 10))
labels = jnp.argmax(x @ teacher, -1)
net = Net()
params = net.init(c, x)["params"]
recipe = jq.Recipe([("*kernel", jq.lsq(bits=2)), ("*", jq.KEEP)])
latents = jq.latent(params, recipe, jq.sites(lambda p, x: net.apply({"params": p}, x), params, x))
optimizer = jq.training.optimizer(latents, weight=optax.adamw(3e-3), scale=optax.adam(1e-3))
state = TrainState.create(apply_fn=net.apply, params=latents, tx=optimizer)


@jq.quantized
def loss(params):
    logits = net.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def step(state):
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


for i in range(101):
    state, value = step(state)
    if i % 25 == 0:
        print(f"step {i}: {value:.4f} nats")
packed = jq.freeze(state.params)
print(f"latent: {loss(state.params):.6f}, packed: {loss(packed):.6f}")
print(f"{jq.bits_per_weight(packed):.3f} bits per weight")
