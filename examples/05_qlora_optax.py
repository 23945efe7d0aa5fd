"""QLoRA in an Optax loop: NF4 weights stay packed, bfloat16 adapters learn text in capitals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq
from jaxquant_models.readers.text import builtin_text

general, other = builtin_text()
general, special = (np.frombuffer(t.encode(), np.uint8) for t in (general, other.upper()))
special, held_out = special[:-40_000], special[-40_000:]


def batch(text, seed):
    starts = np.random.default_rng(seed).integers(0, len(text) - 17, (256, 1))
    return jnp.asarray(text[starts + np.arange(17)], jnp.int32)


def loss(params, windows):
    h = params["embed"][windows[:, :-1]].reshape(256, -1)
    logits = jax.nn.relu(h @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()


def trained(params, which, text, steps, optimizer):
    """Train the arrays that `which` marks; the others, packed codes among them, stay fixed."""
    learning, fixed = eqx.partition(params, which)

    @jax.jit
    def step(learning, state, windows):
        whole = lambda learning: jq.quantized(loss)(eqx.combine(learning, fixed), windows)
        value, slope = jax.value_and_grad(whole)(learning)
        updates, state = optimizer.update(slope, state, learning)
        return optax.apply_updates(learning, updates), state, value

    state = optimizer.init(learning)
    for i in range(steps + 1):
        learning, state, value = step(learning, state, batch(text, i))
        if i % 250 == 0:
            print(f"step {i}: {value:.3f} nats a byte")
    return eqx.combine(learning, fixed)


draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5
params = {"embed": 4 * draw(0, 256, 32), "hidden": draw(1, 512, 512), "out": draw(2, 512, 256)}
params = trained(params, jax.tree.map(lambda a: True, params), general, 750, optax.adam(1e-3))

base = jq.Recipe([("hidden", jq.nf4(double_quant=True)), ("*", jq.KEEP)])
model = jq.adapt(jq.quantize(params, base), jq.adapters.LoRA(rank=16, dtype="bfloat16"))
judge = jax.jit(jq.quantized(lambda p: loss(p, batch(held_out, 0))))
print("before:", judge(model))
adam = jq.adapters.adam8bit(2e-3)  # 2 bytes of state per number
adam = jq.adapters.paged(adam, least=4096)  # in the memory of the host
model = trained(model, jq.trained(model), special, 500, adam)
print("adapted:", judge(model), "merged:", judge(jq.merge(model)), model["hidden"])
