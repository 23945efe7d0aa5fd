"""Training with low-bit weights: latent weights, optimizers, stability, zeroth-order gradients."""

from jaxquant.training.optimizers import optimizer, relative
from jaxquant.training.qat import QAT, qat_blocks
from jaxquant.training.zeroqat import ZeroQAT
from jaxquant.training.zeroth import Zeroth, zo_step, zo_value_and_grad

__all__ = [
    "QAT",
    "ZeroQAT",
    "Zeroth",
    "optimizer",
    "qat_blocks",
    "relative",
    "zo_step",
    "zo_value_and_grad",
]
