"""The forms in which weights are held in memory without loss, as methods of a recipe."""

from typing import Literal, get_args

from jaxquant.core.activations import Activations
from jaxquant.formats import FloatPlanes, HuffmanLanes
from jaxquant.methods.method import Method
from jaxquant.rounding import Nearest

Form = Literal["planes", "huffman"]
FORMS: tuple[Form, ...] = get_args(Form)


def method(
    form: Form = "planes", *, bits: Literal[3, 4] = 3, activations: Activations | str | None = None
) -> Method:
    """Return the method that stores weights in fewer bits and loses none.

    It can stand in a recipe beside methods that round, so that some layers stay exact.

    Args:
      form: "planes" (the default): exponents in a window of fixed length, which a kernel decodes
        tile by tile; about 11.3 bits per bfloat16 weight. "huffman": Huffman-coded exponents, about
        10.7 bits, decoded by XLA and slower.
      bits: number of bits of an exponent in planes: 3 (the default) or 4. There are kernels for 3
        bits on CPUs and for 4 bits on every backend, at 12.02 bits per bfloat16 weight.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize` or `Recipe`. Weights must be of bfloat16, float16, float32,
      float8_e4m3fn or float8_e5m2.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (512, 64)).astype(jnp.bfloat16)
    >>> recipe = jq.Recipe([("exact", jq.lossless.method()), ("*", jq.rtn(bits=4))])
    >>> q = jq.quantize({"exact": w, "rounded": w}, recipe)
    >>> bool((q["exact"].dequantize() == w).all()), round(q["exact"].bits_per_weight, 1)
    (True, 11.3)
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    format = FloatPlanes(bits=bits) if form == "planes" else HuffmanLanes()
    return Method(f"lossless {form}", Nearest(), format, activations=Activations.of(activations))
