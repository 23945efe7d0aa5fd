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
from jaxquant.core.fields import check_fields, shown
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
      kv_heads: number of key-value heads of a layer, a divisor of `heads`.
      head_dim: number of channels of a head.
      dtype: dtype of keys and values that are not quantized.
      cache: format of the quantized cache; None if it is not quantized.

    Raises:
      ValueError: a number is below 1 or no divisor, or the dtype is not one of numbers.

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
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        try:
            known = jnp.issubdtype(jnp.dtype(self.dtype), jnp.number)
        except TypeError:
            known = False
        if not known:
            raise ValueError(f"dtype must be the name of a dtype of numbers, got {self.dtype!r}")

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

    Raises:
      ValueError: a number is negative or not finite, or `active` is not in (0, 1].
    """

    path: str
    bytes: int
    multiplied: float
    rows: int = 0
    active: float = 1.0
    integers: bool = False
    last: bool = False

    def __post_init__(self) -> None:
        for name in ("bytes", "multiplied", "rows", "active"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be 0 or more and finite, got {shown(value)}")
        if not 0 < self.active <= 1:
            raise ValueError(f"active must be above 0 and at most 1, got {self.active}")

    def read(self, tokens: float) -> float:
        """Return the bytes that one pass reads.

        A matrix is read once. A table is read one row for each token. Of a stack of experts, those
        are read that some token chose, in expectation over tokens that choose evenly and
        independently (as `jaxquant plan` assumes). Tokens that prefer the same experts read fewer.

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
      experts_per_token: number of experts that a token is sent to, 1 or more; it needs `sites`. By
        default all experts are counted.
      last: globs of paths of weights that multiply only the last token of a prompt (an output
        head). A tied table is one: "embed/embedding".
      name: a name for tables.
    Returns:
      The workload.
    Raises:
      ValueError: the tree holds no weights, the sites belong to a different tree, there are fewer
        experts than `experts_per_token` or no sites that show them, or a glob of `last` matches no
        path.

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
    if experts_per_token is not None and sites is None:
        raise ValueError("experts_per_token needs sites, which tell what weights are experts")
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
    table: Sequence[int] | None = None,
    name: str = "",
) -> Workload:
    """Return the workload of a model of which only the number of parameters is known.

    All parameters are taken to multiply every token, except those of `table`. Without it the table
    of a model whose output head is another matrix is counted too, and its bounds of time are too
    large by the table's share: by 7 % for Llama 3 8B.

    Args:
      parameters: number of parameters, positive.
      bits: stored bits per parameter, side information included, positive; may be fractional.
      attention: sizes of the attention and form of its cache; None (the default) leaves both out.
      integers: whether products have integer inputs (default False).
      table: rows and columns of an embedding table that is only looked up, of the same bits per
        parameter; None (the default) if it is tied to the output head, or shall be counted.
      name: a name for tables.
    Returns:
      The workload.
    Raises:
      ValueError: a number is not positive and finite, or the table has no fewer parameters than the
        model.

    >>> architecture(8.03e9, 4.25).weight_bytes
    4265937500
    >>> llama = architecture(8.03e9, 16, table=(128256, 4096))
    >>> llama.weight_bytes, llama.read(1)
    (16060000000, 15009335040.0)
    """
    check_arguments(architecture, locals())
    if not (0 < parameters < math.inf and 0 < bits < math.inf and parameters * bits < math.inf):
        raise ValueError(f"parameters and bits must be positive, got {parameters} and {bits}")
    rows, columns = (0, 0) if table is None else _table(table, parameters)
    multiplied, stored = float(parameters - rows * columns), lambda count: round(count * bits / 8)
    operands = [Operand("(all)", stored(multiplied), multiplied, integers=integers)]
    if rows:
        operands.append(Operand("(table)", stored(rows * columns), 0.0, rows))
    return Workload(tuple(operands), attention, name)


def _table(shape: Sequence[int], parameters: float) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1 or math.prod(shape) >= parameters:
        raise ValueError(
            "table must be rows and columns, 1 or more, of fewer parameters than the model has, "
            f"got {shown(shape)} of {parameters:g}"
        )
    return shape[0], shape[1]


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
