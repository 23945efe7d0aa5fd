"""The programs that are planned, on shapes only: decoding step, prefill, training step."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.calibration.probing import Probing
from jaxquant.calibration.statistics import Stats, Weighting
from jaxquant_models.architectures.cache import init_cache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama, apply
from jaxquant_models.architectures.shardings import cache_sharding, model_sharding, rules_for
from jaxquant_models.readers.weights import param_outline
from jaxquant_models.runs.pod_request import TRAINING, PodRequest

AnyMesh = Mesh | AbstractMesh
DTYPE = jnp.bfloat16  # of activations, of the cache and of weights that are not quantized
LORA = jq.adapters.LoRA(rank=16, dtype="bfloat16")
ADAPTED = ("layers/attn/*kernel", "layers/mlp/[gud]*/kernel")
SAMPLE = 128  # number of calibration rows that a method stores


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function, its abstract arguments, and their shardings over a mesh.

    Attributes:
      fn: the function, whose products run through `jaxquant.quantized`.
      arguments: the shapes of its arguments by name, in order: "weights", "cache", "tokens",
        "trained" (those arrays of the weights that are trained) and "optimizer" (its state).
      shardings: the shardings of the arguments by name.
      updated: names of the arguments that are donated: results reuse their memory.
      outputs: the shardings of the results.
      forward: the function (all weights, tokens) -> logits, for `jaxquant.explain`.
      weights: the shapes of all weights, including the trained ones.
      placed: the shardings of `weights`.
    """

    fn: Callable[..., PyTree]
    arguments: dict[str, PyTree]
    shardings: dict[str, PyTree]
    updated: tuple[str, ...]
    outputs: PyTree
    forward: Callable[..., PyTree]
    weights: PyTree
    placed: PyTree

    def lowered(self) -> jax.stages.Lowered:
        """Return the program lowered for the devices of its mesh."""
        given = tuple(self.shardings[name] for name in self.arguments)
        donated = tuple(i for i, name in enumerate(self.arguments) if name in self.updated)
        fn = jax.jit(
            self.fn, in_shardings=given, out_shardings=self.outputs, donate_argnums=donated
        )
        return fn.lower(*self.arguments.values())

    def uses(self) -> jq.core.Explanation:
        """Return the kernels and rules that serve the uses of the packed weights on a TPU."""
        return jq.explain(self.forward, self.weights, self.arguments["tokens"], platform="tpu")


def abstract_mesh(mesh: tuple[tuple[str, int], ...]) -> AbstractMesh:
    """Return a mesh with Auto axes whose devices need not exist.

    Args:
      mesh: name and size of each axis.
    """
    names, sizes = zip(*mesh, strict=True)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def packed_shapes(request: PodRequest) -> PyTree:
    """Return the weights of a request with shapes in place of arrays.

    Args:
      request: the request.
    Raises:
      ValueError: the recipe does not fit the model, or the request is a training step and the
        recipe quantizes nothing.
    """
    one = _packed(dataclasses.replace(request.config, n_layers=1), request.recipe, request.workload)
    layers = request.config.n_layers  # all of equal shapes
    taller = lambda a: jax.ShapeDtypeStruct((layers, *a.shape[1:]), a.dtype)
    return {**one, "layers": jax.tree.map(taller, one["layers"])}


def _packed(config: LlamaConfig, recipe: jq.Recipe, workload: str) -> PyTree:
    """Return the shapes of the packed weights of an architecture, which are traced."""
    model = Llama(config, DTYPE)
    floats = param_outline(model, jnp.float32 if workload == "qat" else DTYPE)
    fn = lambda params, tokens: apply(model, params, tokens)
    uses = jq.sites(fn, floats, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    methods = {glob: m for glob, m in recipe.rules if isinstance(m, jq.Method)}
    if not methods and workload in TRAINING:
        raise ValueError(
            f"--train {workload} needs a recipe that quantizes weights, but this one quantizes "
            "none; give another --recipe, or --method"
        )
    if not methods:
        return floats
    make = jq.latent if workload == "qat" else jq.quantize

    def made(params: PyTree) -> PyTree:
        grams = any(m.needs_gram for m in methods.values())
        outputs = tuple(glob for glob, m in methods.items() if m.needs_output)
        weighting: Weighting = (
            "gradient" if outputs else "uniform"
        )  # the moments of outputs are of gradients
        plan = Probing.of(uses, weighting, grams, outputs, SAMPLE)
        return make(params, recipe, Stats(uses, plan.probes(), dict(plan.holder)))

    packed = jax.eval_shape(made, floats)
    if workload != "qlora":
        return packed
    # Experts have no adapters, as in most QLoRA runs.
    globs = ADAPTED[:1] if config.n_experts else ADAPTED
    return jax.eval_shape(lambda q: jq.adapt(q, LORA, targets=globs), packed)


def program(request: PodRequest, weights: PyTree, mesh: AnyMesh) -> Program:
    """Return the program of a request on a mesh.

    In decoding, weights stay where they are: every device multiplies all tokens by its own part of
    a weight, and sums are exchanged. In a prefill and in training, the tokens are split over
    "data", and packed words are all-gathered for each product.

    Args:
      request: the request.
      weights: its `packed_shapes`.
      mesh: the mesh.
    Raises:
      ValueError: the mesh does not divide heads, groups or tiles, or, where the tokens are split
        over "data", the batch.
    """
    at = model_sharding(weights, request.config, mesh)
    data, split = dict(mesh.shape).get("data", 1), gathers(request, dict(mesh.shape))
    if split and request.batch % data:
        raise ValueError(
            f'the {data} devices of "data" do not divide a batch of {request.batch}; give a '
            f"--batch that is a multiple of {data}, or another --mesh"
        )
    tokens = jax.ShapeDtypeStruct((request.batch, request.tokens), jnp.int32)
    spread = NamedSharding(mesh, P("data") if split else P())
    quantized = partial(jq.quantized, shardings=at, data_axes=("data",) if split else ())
    model = Llama(request.config, DTYPE)
    forward = quantized(lambda params, tokens: apply(model, params, tokens))
    if request.trains:
        model = Llama(request.config, DTYPE, remat=True)
        run = quantized(lambda params, tokens: apply(model, params, tokens))
        return _training(run, forward, weights, at, tokens, spread)
    run = quantized(lambda params, tokens, cache: apply(model, params, tokens, cache))
    return _inference(run, forward, weights, at, tokens, spread, _cache(request, mesh))


def gathers(request: PodRequest, mesh: Mapping[str, int]) -> bool:
    """Return whether "data" splits the tokens, so that packed words have to be gathered.

    Args:
      request: the request.
      mesh: the size of each mesh axis by its name.
    """
    return request.workload != "decode" and "data" in mesh


def _cache(request: PodRequest, mesh: AnyMesh) -> tuple[PyTree, PyTree]:
    """Return the shapes and the shardings of the cache; "data" splits it if it divides the batch.

    On a mesh of devices, the compiler chooses the layout, because a step would copy the cache from
    any other layout.
    """
    cache = jax.eval_shape(
        lambda: init_cache(request.config, request.batch, request.context, DTYPE)
    )
    rules = rules_for(mesh)
    if request.batch % dict(mesh.shape).get("data", 1):
        rules = (("batch", None), *rules)
    held = cache_sharding(cache, mesh, rules)
    large = lambda a, s: Format(Layout.AUTO, s) if a.ndim > 1 and isinstance(mesh, Mesh) else s
    held = jax.tree.map(large, cache, held)
    return cache, held


def _inference(
    run: Callable[..., PyTree], forward: Callable[..., PyTree], weights: PyTree, at: PyTree,
    tokens: Any, spread: NamedSharding, cache: tuple[PyTree, PyTree],
) -> Program:  # fmt: skip
    """Return a step that reads tokens and writes their keys and values into a cache."""
    columns = "model" if "model" in spread.mesh.axis_names else None
    rows = spread.spec[0] if len(spread.spec) else None
    logits = NamedSharding(spread.mesh, P(rows, None, columns))
    shapes, held = cache
    return Program(
        run,
        {"weights": weights, "tokens": tokens, "cache": shapes},
        {"weights": at, "tokens": spread, "cache": held},
        ("cache",),
        (logits, held),
        forward,
        weights,
        at,
    )


def _training(
    run: Callable[..., PyTree], forward: Callable[..., PyTree], weights: PyTree, at: PyTree,
    tokens: Any, spread: NamedSharding,
) -> Program:  # fmt: skip
    """Return a step of AdamW on the trained arrays, with the next token as the target."""
    adam = optax.adamw(1e-4)
    which = jq.trained(weights)
    learning, fixed = eqx.partition(weights, which)
    of_learning, of_fixed = eqx.partition(at, which)
    state = jax.eval_shape(adam.init, learning)
    alone = NamedSharding(spread.mesh, P())
    of_state = optax.tree_map_params(
        adam, lambda _, s: s, state, of_learning, transform_non_params=lambda _: alone
    )

    def loss(learning: PyTree, fixed: PyTree, tokens: Any) -> Any:
        logits = run(eqx.combine(learning, fixed), tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(learning: PyTree, fixed: PyTree, state: PyTree, tokens: Any) -> tuple:
        value, slope = jax.value_and_grad(loss)(learning, fixed, tokens)
        updates, state = adam.update(slope, state, learning)
        return optax.apply_updates(learning, updates), state, value

    return Program(
        step,
        {"trained": learning, "weights": fixed, "optimizer": state, "tokens": tokens},
        {"trained": of_learning, "weights": of_fixed, "optimizer": of_state, "tokens": spread},
        ("trained", "optimizer"),
        (of_learning, of_state, alone),
        forward,
        weights,
        at,
    )
