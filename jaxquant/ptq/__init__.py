"""Post-training quantization: from weights and statistics to packed weights."""

from jaxquant.core.tree import with_activations
from jaxquant.ptq.allocation import allocate
from jaxquant.ptq.bit_shares import shares
from jaxquant.ptq.blockwise import quantize_blocks
from jaxquant.ptq.choices import Allocation, Choices, Option
from jaxquant.ptq.folding import fold
from jaxquant.ptq.layer_stacks import restack, unstack, unstack_stats
from jaxquant.ptq.quantize_leaf import Done
from jaxquant.ptq.residual_rotation import Residual, rotate_residual

__all__ = [
    "Allocation",
    "Choices",
    "Done",
    "Option",
    "Residual",
    "allocate",
    "fold",
    "quantize_blocks",
    "restack",
    "rotate_residual",
    "shares",
    "unstack",
    "unstack_stats",
    "with_activations",
]
