"""Passes of token sequences through a model of which one layer is in memory at a time.

The hidden states at the input of every layer are kept; then the gradients of the loss walk back
from layer to layer. If the states are many, they are kept in files, which also makes the passes
resumable: what is missing there, or damaged, is computed again. The first tokens of a model with an
exact prefix pass the layers too, but only the others are calibrated on.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.one_block import Passed, only
from jaxquant.core.programs import program_memory
from jaxquant.durable.store import Arrays, Finished, Folder
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.architectures.blocks import Blockwise, blockwise
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import check_tokens
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.source import Source

IN_MEMORY = 256 * 2**20  # bytes of hidden states that are kept in memory rather than in files
Batches = Iterator[tuple[PyTree, Array | None]]  # inputs of a layer, gradients at its outputs


class Passes:
    """Hidden states and gradients of sequences at the layers of a model.

    Args:
      source: the model.
      sequences: token ids, int [N, t].
      files: store for hidden states and gradients that are too large for memory.
      layers: number of layers whose hidden states are kept at one time; None for all.
    Raises:
      ValueError: a token id has no row in the embedding.
    """

    def __init__(
        self, source: Source, sequences: np.ndarray, files: Folder, layers: int | None = None
    ) -> None:
        config = source.outline.config
        check_tokens(sequences, config.vocab_size)
        self.source, self.sequences, self.layers = source, sequences, config.n_layers
        kept = config.n_layers if layers is None else layers
        in_memory = kept * states_bytes(config, sequences.size) <= IN_MEMORY * config.n_layers
        self._files = None if in_memory else files
        self._memory: dict[str, Arrays] = {}
        self._run = functions(config, jnp.dtype(source.outline.dtype))
        self.prefix = source.outline.prefix

    @property
    def block(self) -> Callable[[PyTree, PyTree], Array]:
        """The pure function (parameters of a layer, inputs) -> h; the same for equal models.

        The inputs are those that `batches` yields.
        """
        return self._run.after if self.prefix else self._run.block

    @property
    def head(self) -> Callable[[PyTree, Array, Array], Array]:
        """The pure function (parameters outside of the layers, h, tokens) -> logits."""
        run = self._run
        return lambda outer, h, tokens: run.head(outer, h)

    def last(self) -> Iterator[tuple[Array, Array]]:
        """Yield (output of the last layer, tokens) for each sequence, without its prefix."""
        for j, tokens in enumerate(self.sequences):
            h = self.state(self.layers, j)
            yield h[:, self.prefix :], jnp.asarray(tokens)[None, self.prefix :]

    def forward(
        self, layer: int, step: Callable[[object], None] = lambda _: None, keep: bool = True
    ) -> None:
        """Compute the hidden states at the input of a layer, and of those before it.

        Args:
          layer: number of the layer; the number of layers for the output of the last one.
          step: called after each layer.
          keep: whether the states of earlier layers are kept.
        """
        begin = layer
        while begin and not self.holds("state", begin):
            begin -= 1
        if not self.holds("state", begin):
            outer = self.source.outer()
            for j, tokens in enumerate(self.sequences):
                self._keep("state", 0, j, embedded(self._run, outer, jnp.asarray(tokens)[None]))
            del outer
        for i, params in read_ahead(self.source, range(begin, layer)):
            self.push(i, params)
            del params  # before the next ones are read
            if not keep:
                self.forget("state", [i])
            step(i)

    def backward(self, layer: int, step: Callable[[object], None] = lambda _: None) -> None:
        """Compute the gradients of the loss at the outputs of a layer, from the last layer on.

        Args:
          layer: number of the layer.
          step: called after each layer.
        """
        begin = layer + 1
        while begin < self.layers and not self.holds("gradient", begin):
            begin += 1
        if not self.holds("gradient", begin):
            self.forward(self.layers)
            outer = self.source.outer()
            for j, tokens in enumerate(self.sequences):
                h = self.state(self.layers, j)
                g = _last_gradient(self._run, self.prefix, outer, h, jnp.asarray(tokens)[None])
                self._keep("gradient", self.layers, j, g)
            del outer
        for i, params in read_ahead(self.source, range(begin - 1, layer, -1)):
            self.forward(i)
            self.pull(i, params)
            del params  # before the next ones are read
            step(i)

    def batches(self, layer: int, params: PyTree, gradients: bool) -> Batches:
        """Yield (inputs of a layer, gradients at its outputs) for each sequence.

        If the model has a prefix, they are those of the tokens after it, and the inputs are
        (h, keys of the prefix, its values).

        Args:
          layer: number of the layer, whose states, and gradients, have been computed.
          params: its parameters.
          gradients: whether gradients are wanted; they are None otherwise.
        """
        for j in range(len(self.sequences)):
            h, g = self.state(layer, j), self.gradient(layer + 1, j) if gradients else None
            if self.prefix:
                first, h = h[:, : self.prefix], h[:, self.prefix :]
                h = (h, *_seen(self._run, params, first))
                g = None if g is None else g[:, self.prefix :]
            yield h, g

    def state(self, layer: int, j: int) -> Float[Array, "1 t d"]:
        """Return the hidden states of sequence j at the input of a layer."""
        return self._held("state", layer, j)

    def gradient(self, layer: int, j: int) -> Float[Array, "1 t d"]:
        """Return the gradient of the loss of sequence j at the input of a layer."""
        return self._held("gradient", layer, j)

    def pull(self, layer: int, params: PyTree) -> None:
        """Compute the gradients at the input of a layer from those at its outputs."""
        for j in range(len(self.sequences)):
            g = _pulled(self._run, params, self.state(layer, j), self.gradient(layer + 1, j))
            self._keep("gradient", layer, j, g)

    def push(self, layer: int, params: PyTree) -> None:
        """Compute the hidden states after a layer."""
        for j in range(len(self.sequences)):
            self._keep("state", layer + 1, j, pushed(self._run, params, self.state(layer, j)))

    def took(self, layer: int, j: int, passed: Passed) -> None:
        """Keep what came out of a layer in calibration (`calibrate_block`)."""
        if passed.gradients is None:
            self._keep("state", layer + 1, j, passed.outputs)
        else:
            self._keep("gradient", layer, j, passed.gradients)

    def forget(self, kind: str, layers: Iterable[int]) -> None:
        """Drop what is kept at the inputs of layers.

        Args:
          kind: "state" or "gradient".
          layers: their numbers.
        """
        for i in layers:
            for j in range(len(self.sequences)):
                self._kept.pop(_name(kind, i, j), None)

    @property
    def _kept(self) -> Finished:
        return self._memory if self._files is None else self._files

    def holds(self, kind: str, layer: int) -> bool:
        """Return whether what belongs to the input of a layer is kept, for all sequences.

        Args:
          kind: "state" or "gradient".
          layer: number of the layer.
        """
        return all(_name(kind, layer, j) in self._kept for j in range(len(self.sequences)))

    def _keep(self, kind: str, layer: int, j: int, a: Array) -> None:
        name, held = _name(kind, layer, j), {"values": jax.block_until_ready(a)}
        if self._files is None:
            self._memory[name] = held
        else:
            self._files.put(name, held, sync=False)  # what is damaged is computed again

    def _held(self, kind: str, layer: int, j: int) -> Array:
        name = _name(kind, layer, j)
        try:
            return jnp.asarray(self._kept[name]["values"])
        except KeyError:
            raise ValueError(
                f"the {name} was lost while it was needed: run the same command again, which "
                "computes it again"
            ) from None


def states_bytes(config: LlamaConfig, tokens: int) -> int:
    """Return the bytes of the hidden states at the input of all layers.

    Args:
      config: the architecture.
      tokens: number of tokens of all sequences.
    """
    return 4 * config.n_layers * tokens * config.d_model


def read_ahead(source: Source, layers: Sequence[int]) -> Iterator[tuple[int, PyTree]]:
    """Yield (number, parameters) of layers; the system reads the next one's files meanwhile.

    Args:
      source: the model.
      layers: their numbers, in order.
    """
    for n, i in enumerate(layers):
        params = source.layer(i)
        if n + 1 < len(layers):
            source.weights.prefetch(layers[n + 1])
        yield i, params
        del params


def _name(kind: str, layer: int, j: int) -> str:
    return f"{kind} of sequence {j} at layer {layer}"


# One object for equal architectures, so that jit compiles its functions once.
functions = functools.cache(blockwise)


def passes_memory(outline: Model, tokens: int) -> tuple[int, int]:
    """Return the bytes that a sequence takes at a layer, and at the output matrix for gradients.

    They are those of the compiled programs, without their arguments.

    Args:
      outline: the model, with shapes in place of arrays.
      tokens: number of tokens of the sequence.
    """
    run = functions(outline.config, jnp.dtype(outline.dtype))
    h = jax.ShapeDtypeStruct((1, tokens, outline.config.d_model), outline.dtype)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    layer = program_memory(pushed, run, layer_outline(outline), h)
    return layer, program_memory(_last_gradient, run, 0, outer_outline(outline), h, ids)


def layer_outline(outline: Model) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of the parameters of one layer, [1, ...].

    Args:
      outline: the model, with shapes in place of arrays.
    """
    one = lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype)
    return jax.tree.map(one, outline.params["layers"])


def outer_outline(outline: Model) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of the parameters outside of the layers.

    Args:
      outline: the model, with shapes in place of arrays.
    """
    return {name: part for name, part in outline.params.items() if name != "layers"}


@functools.partial(jax.jit, static_argnums=0)
def embedded(run: Blockwise, outer: PyTree, tokens: Array) -> Array:
    """Return the hidden states [1, t, d] at the input of the first layer.

    Args:
      run: the functions of the architecture.
      outer: the parameters outside of the layers.
      tokens: int [1, t].
    """
    return run.embed(outer, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _seen(run: Blockwise, params: PyTree, h: Array) -> tuple[Array, Array]:
    return run.seen(only(params), h)


@functools.partial(jax.jit, static_argnums=0)
def pushed(run: Blockwise, params: PyTree, h: Array) -> Array:
    """Return the hidden states after a layer.

    Args:
      run: the functions of the architecture.
      params: the parameters of the layer, [1, ...].
      h: the hidden states before it.
    """
    return run.block(only(params), h)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _last_gradient(run: Blockwise, prefix: int, outer: PyTree, h: Array, tokens: Array) -> Array:
    rest = lambda a: a[:, prefix:]
    return jax.grad(lambda h: next_token_loss(run.head(outer, rest(h)), rest(tokens)))(h)


@functools.partial(jax.jit, static_argnums=0)
def _pulled(run: Blockwise, params: PyTree, h: Array, g: Array) -> Array:
    layer = only(params)
    return jax.vjp(lambda h: run.block(layer, h), h)[1](g)[0]
