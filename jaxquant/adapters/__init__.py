"""Adapters: few trained numbers beside a frozen quantized matrix, and optimizers to train them.

`jaxquant.adapt` puts an adapter on the weights of a tree, and `jaxquant.merge` merges it into them.
The optimizers are imported on first access, because they need Optax; inference does not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxquant.adapters.adapted import Adapted
from jaxquant.adapters.l4q import L4Q
from jaxquant.adapters.lora import LoRA
from jaxquant.adapters.pooled import QALoRA
from jaxquant.adapters.scales import PEQA
from jaxquant.adapters.ternary import LoTA
from jaxquant.core.protocols import Adapter

if TYPE_CHECKING:
    from jaxquant.adapters.adam_8bit import adam8bit
    from jaxquant.adapters.paging import paged
    from jaxquant.adapters.signed_steps import falling, sign_descent

__all__ = [
    "L4Q",
    "PEQA",
    "Adapted",
    "Adapter",
    "LoRA",
    "LoTA",
    "QALoRA",
    "adam8bit",
    "falling",
    "paged",
    "sign_descent",
]

_LATER = {
    "adam8bit": "adam_8bit",
    "falling": "signed_steps",
    "paged": "paging",
    "sign_descent": "signed_steps",
}  # name -> module


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
