"""The energy of a decoded token: movement of weights and cache, arithmetic, Landauer's floor."""

import dataclasses
import math

from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import shown
from jaxquant.theory.energy_constants import EnergyConstants
from jaxquant.theory.serving_roofline import LARGEST
from jaxquant.theory.workload import Workload

BOLTZMANN = 1.380649e-23  # J / K, exact in the SI
PICO = 1e-12


@dataclasses.dataclass(frozen=True)
class TokenEnergy:
    """The energy of one decoded token, in joules.

    Attributes:
      constants: the constants that were used, each with its source.
      weights: energy of reading the weights, divided by the batch.
      cache: energy of reading the keys and values of the token's own sequence.
      arithmetic: energy of multiplications and additions.
      bits: number of bits that are read for the token.
    """

    constants: EnergyConstants
    weights: float
    cache: float
    arithmetic: float
    bits: float

    @property
    def movement(self) -> float:
        """The energy of everything that is read."""
        return self.weights + self.cache

    @property
    def total(self) -> float:
        """The whole energy."""
        return self.movement + self.arithmetic

    @property
    def landauer(self) -> float:
        """The least energy of erasing as many bits as are read, at 300 K; see `landauer`."""
        return landauer(self.bits)


def energy_per_token(
    workload: Workload, constants: EnergyConstants, batch: int = 1, context: int = 0
) -> TokenEnergy:
    """Return the energy of one token of a decode step, under stated constants.

        E = 8 e_bit (W / B + C(c)) + sum of P_i e_i

    with W bytes of weights read by the step, B sequences, C(c) bytes of a cache of c tokens, and
    e_i the energy of a multiplication and an addition: float16 for products of floats, int8 with
    int32 sums for products with integer inputs. The bytes are those of the packed arrays. A machine
    for ternary weights would multiply nothing; `jaxquant.theory.integer_products` has its energy.

    Args:
      workload: the model.
      constants: the constants, such as `NODES["7 nm"]`.
      batch: number of sequences that share one reading of the weights, 1 or more (default 1).
      context: number of tokens in the cache of each sequence, 0 or more (default 0).
    Returns:
      The energy and its parts.
    Raises:
      ValueError: a number is out of range.

    >>> from jaxquant.theory.energy_constants import NODES
    >>> from jaxquant.theory.workload import architecture
    >>> found = energy_per_token(architecture(8.03e9, 16), NODES["7 nm"])
    >>> round(1e3 * found.weights), round(1e3 * found.arithmetic)  # mJ
    (502, 4)
    """
    check_arguments(energy_per_token, locals())
    if not (1 <= batch <= LARGEST and 0 <= context <= LARGEST):
        raise ValueError(
            "batch must be 1 or more and context 0 or more, both at most 2^40, got "
            f"{shown(batch)} and {shown(context)}"
        )
    weights, cache = 8 * workload.read(batch) / batch, 8 * workload.cache_bytes(context)
    each = PICO * constants.memory
    return TokenEnergy(
        constants,
        weights * each,
        cache * each,
        _arithmetic(workload, constants, context),
        weights + cache,
    )


def break_even_batch(workload: Workload, constants: EnergyConstants) -> float:
    """Return the batch at which reading the weights costs as much as the products of a token.

    For P weights of b bits that all multiply every token it is b e_bit / e_product. Caches are left
    out: no batch shares them. Rows of tables and experts are counted as one token reads them.

    Args:
      workload: the model.
      constants: the constants.
    Returns:
      The batch, a real number; infinity if the products cost nothing.

    >>> from jaxquant.theory.energy_constants import NODES
    >>> from jaxquant.theory.workload import architecture
    >>> round(break_even_batch(architecture(1e9, 4.25), NODES["7 nm"]))
    33
    """
    check_arguments(break_even_batch, locals())
    products = sum(_products(workload, constants))
    moved = 8 * workload.read(1) * PICO * constants.memory
    return moved / products if products else math.inf


def landauer(bits: float, kelvin: float = 300.0) -> float:
    """Return the least energy of erasing bits, in joules.

        E = bits * k T ln 2

    Reading does not erase, so this bounds no memory access; it shows how far memories are from what
    physics asks of an irreversible operation.

    Args:
      bits: number of bits, 0 or more.
      kelvin: the temperature, positive (default 300).
    Raises:
      ValueError: a number is out of range.

    Source: Landauer 1961, doi:10.1147/rd.53.0183.

    >>> f"{landauer(1):.4g}"
    '2.871e-21'
    """
    check_arguments(landauer, locals())
    if not (0 <= bits < math.inf and 0 < kelvin < math.inf):
        raise ValueError(
            f"bits must be 0 or more and kelvin positive, both finite, got {bits} and {kelvin}"
        )
    return bits * BOLTZMANN * kelvin * math.log(2)


def _products(workload: Workload, constants: EnergyConstants) -> tuple[float, float]:
    """Return the joules of a token's products with weights, of floats and of integers."""
    pairs = (False, constants.float_product), (True, constants.integer_product)
    floats, integers = (workload.operations(kind) / 2 * PICO * e for kind, e in pairs)
    return floats, integers


def _arithmetic(workload: Workload, constants: EnergyConstants, context: int) -> float:
    attention = workload.attention_operations(context + 1) / 2 * PICO * constants.float_product
    return sum(_products(workload, constants)) + attention
