"""What one token asks of a machine: bytes of weights and cache, and operations.

A `Workload` is counted from the parameter tree that a user runs: packed weights at their packed
bytes, float arrays at the bytes of their dtype. Without a tree, `architecture` makes one from a
number of parameters and of bits.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import PyTree

from jaxquant.core.activations import kernel_form
from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import check_fields
from jaxquant.core.paths import matches
from jaxquant.core.sites import Site
from jaxquant.core.tensor import QTensor
from jaxquant.core.tree import leaf_bytes
from jaxquant.formats.kv_cache import KVFormat
from jaxquant.recipes.size import weight_leaves
from jaxquant.theory.roofline import weight_use


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention of a model, and how its keys and values are stored.

    Attributes:
      layers: number of layers.
      heads: number of query heads of a layer.
      kv_heads: number of key-value heads of a layer.
      head_dim: number of channels of a head.
      dtype: dtype of keys and values that are not quantized.
      cache: format of the quantized cache; None if it is not quantized.

    Raises:
      ValueError: a number is below 1, or the dtype is unknown.

    >>> Attention(32, 32, 8, 128).bytes(1)  # Llama 3 8B
    131072.0
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    cache: KVFormat | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if min(self.layers, self.heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError(f"the numbers of {self} must be 1 or more")
        try:
            jnp.dtype(self.dtype)
        except TypeError:
            raise ValueError(f"dtype must be the name of a dtype, got {self.dtype!r}") from None

    def bytes(self, context: float) -> float:
        """Return the bytes of the keys and values of one sequence.

        In a quantized cache the first tokens (sinks) and a window of recent ones stay in `dtype`.

        Args:
          context: number of tokens, 0 or more.
        """
        values = 2 * self.layers * self.kv_heads * self.head_dim
        exact = float(context)
        if self.cache is not None:
            exact = min(exact, float(self.cache.sinks + self.cache.window))
        of_token = 0.0
        if self.cache is not None:
            of_token = self.cache.bytes_per_token(self.layers, self.kv_heads, self.head_dim)
        return exact * values * jnp.dtype(self.dtype).itemsize + (context - exact) * of_token

    def operations(self, pairs: float) -> float:
        """Return the operations for pairs of a query and a key, over all heads and layers.

        Args:
          pairs: number of pairs; a token decoded with c tokens in the cache has c + 1.
        """
        return 4.0 * self.layers * self.heads * self.head_dim * pairs


@dataclasses.dataclass(frozen=True)
class Operand:
    """One weight (all matrices of a stack together) as a pass over the model uses it.

    Attributes:
      path: path of the weight.
      bytes: bytes of its arrays in memory.
      multiplied: number of its weights that multiply a token, before experts are chosen; 0 if it is
        only looked up, or a vector.
      rows: number of rows of a table that is only looked up; 0 if it is none.
      active: fraction of a stack of experts that one token is sent to; 1 if there are no experts.
      integers: whether products have integer inputs.
      last: whether only the last token of a prompt is multiplied, as by an output head.
    """

    path: str
    bytes: int
    multiplied: float
    rows: int = 0
    active: float = 1.0
    integers: bool = False
    last: bool = False

    def read(self, tokens: float) -> float:
        """Return the bytes that one pass reads.

        A matrix is read once. A table is read one row for each token. Of a stack of experts, those
        are read that some token chose, in expectation over tokens that choose evenly and
        independently (as `jaxquant plan` assumes).

        Args:
          tokens: number of tokens of the pass.
        """
        share = min(1.0, tokens / self.rows) if self.rows else 1.0
        if self.active < 1:
            share = 1 - (1 - self.active) ** max(1.0, tokens)
        return share * self.bytes


@dataclasses.dataclass(frozen=True)
class Workload:
    """The weights of a model and its attention.

    Attributes:
      operands: all weights.
      attention: the attention and the form of its cache; None leaves both out.
      name: a name for tables.
    """

    operands: tuple[Operand, ...]
    attention: Attention | None = None
    name: str = ""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(w.bytes for w in self.operands)

    def cache_bytes(self, context: float) -> float:
        """Return the bytes of the keys and values of one sequence of `context` tokens."""
        return self.attention.bytes(context) if self.attention else 0.0

    def read(self, tokens: float = 1) -> float:
        """Return the bytes of weights that one pass of `tokens` tokens reads."""
        return sum(w.read(tokens) for w in self.operands)

    def operations(self, integers: bool, tokens: float = 1, prompts: float | None = None) -> float:
        """Return the operations of products with weights, two per multiplication.

        Args:
          integers: which products are counted: those with integer inputs, or the others.
          tokens: number of tokens.
          prompts: number of sequences whose last token alone meets operands that are `last`; None
            sends every token there.
        """
        rows = lambda w: tokens if prompts is None or not w.last else prompts
        chosen = (w for w in self.operands if w.integers == integers)
        return sum(2.0 * w.active * w.multiplied * rows(w) for w in chosen)

    def attention_operations(self, pairs: float) -> float:
        """Return the operations of attention for pairs of a query and a key."""
        return self.attention.operations(pairs) if self.attention else 0.0


def workload(
    params: PyTree,
    attention: Attention | None = None,
    *,
    sites: Mapping[str, Site] | None = None,
    experts_per_token: int | None = None,
    last: Sequence[str] = (),
    name: str = "",
) -> Workload:
    """Count what a model with these parameters asks of a machine.

    Args:
      params: tree of floating-point arrays and `QTensor` leaves, or the same tree with
        `jax.ShapeDtypeStruct`s in place of the arrays (`jax.eval_shape`).
      attention: sizes of the attention and form of its cache; None (the default) leaves both out.
      sites: how the function uses its weights, as `sites(fn, params, x)` of the unquantized tree
        returns it; it tells which tables are only looked up and which stacks are experts. By
        default every array of rank 2 or more counts as a matrix in a matmul.
      experts_per_token: number of experts that a token is sent to, 1 or more. By default all
        experts are counted.
      last: globs of paths of weights that multiply only the last token of a prompt (an output
        head). A tied table is one: "embed/embedding".
      name: a name for tables.
    Returns:
      The workload.
    Raises:
      ValueError: the tree holds no weights, the sites belong to a different tree, there are fewer
        experts than `experts_per_token`, or a glob of `last` matches no path.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize({"w": jnp.ones((256, 64))}, jq.rtn(4, 64))
    >>> found = workload(q)
    >>> found.weight_bytes == q["w"].nbytes, found.operations(integers=False)
    (True, 32768.0)
    """
    check_arguments(workload, locals())
    weights = weight_leaves(params)
    if not weights:
        raise ValueError("expected a tree of weights, but it holds no floating or quantized arrays")
    for glob in last:
        if not any(matches(path, glob) for path, _ in weights):
            raise ValueError(f"last: {glob!r} matches no path; there are {weights[0][0]!r}, ...")
    chosen = lambda path, w: _active(path, w, sites, experts_per_token)
    at_end = lambda path: any(matches(path, glob) for glob in last)
    operands = tuple(_operand(path, w, sites, chosen(path, w), at_end(path)) for path, w in weights)
    return Workload(operands, attention, name)


def architecture(
    parameters: float,
    bits: float,
    attention: Attention | None = None,
    *,
    integers: bool = False,
    name: str = "",
) -> Workload:
    """Return the workload of a model of which only the number of parameters is known.

    All parameters are taken to multiply every token, which counts an embedding table too many.

    Args:
      parameters: number of parameters, positive.
      bits: stored bits per parameter, side information included, positive; may be fractional.
      attention: sizes of the attention and form of its cache; None (the default) leaves both out.
      integers: whether products have integer inputs (default False).
      name: a name for tables.
    Returns:
      The workload.
    Raises:
      ValueError: a number is not positive and finite.

    >>> architecture(8.03e9, 4.25).weight_bytes
    4265937500
    """
    check_arguments(architecture, locals())
    if not (0 < parameters < math.inf and 0 < bits < math.inf):
        raise ValueError(f"parameters and bits must be positive, got {parameters} and {bits}")
    whole = Operand("(all)", round(parameters * bits / 8), float(parameters), integers=integers)
    return Workload((whole,), attention, name)


def _operand(
    path: str, w: PyTree, sites: Mapping[str, Site] | None, active: float, last: bool
) -> Operand:
    use, size = weight_use(path, w, sites), math.prod(w.shape)
    integers = isinstance(w, QTensor) and kernel_form(w.activations) != "float"
    multiplied = float(size) if use.multiplied else 0.0
    return Operand(path, leaf_bytes(w), multiplied, use.rows, active, integers, last)


def _active(path: str, w: PyTree, sites: Mapping[str, Site] | None, chosen: int | None) -> float:
    """Return the fraction of a weight that a token is multiplied by."""
    if chosen is None or sites is None or path not in sites or not sites[path].experts:
        return 1.0
    count = math.prod(w.shape[axis] for axis in sites[path].experts)
    if not 1 <= chosen <= count:
        raise ValueError(f"experts_per_token must be 1 to {count}, as {path!r} has, got {chosen}")
    return chosen / count
