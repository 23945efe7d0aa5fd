"""Training with low-bit weights: latent weights, adapters, optimizers, zeroth-order gradients."""

from jaxquant.training.finetuning import Finetuning, finetune, in_float32
from jaxquant.training.merging import Merged
from jaxquant.training.optimizers import optimizer, relative
from jaxquant.training.qat import QAT, qat_blocks
from jaxquant.training.several import selected, together
from jaxquant.training.zeroqat import ZeroQAT
from jaxquant.training.zeroth import Zeroth, zo_step, zo_value_and_grad

__all__ = [
    "QAT",
    "Finetuning",
    "Merged",
    "ZeroQAT",
    "Zeroth",
    "finetune",
    "in_float32",
    "optimizer",
    "qat_blocks",
    "relative",
    "selected",
    "together",
    "zo_step",
    "zo_value_and_grad",
]
