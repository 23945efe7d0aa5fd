"""Transforms: invertible maps of the channels on one side of a weight that keep the function."""

from jaxquant.core.channels import Channels
from jaxquant.core.protocols import Transform
from jaxquant.transforms.chain import Chain
from jaxquant.transforms.greedy import Greedy, Zigzag
from jaxquant.transforms.kronecker import Kronecker
from jaxquant.transforms.rotation import Rotation
from jaxquant.transforms.scaling import ActivationAware, Scaling, Smooth

__all__ = [
    "ActivationAware",
    "Chain",
    "Channels",
    "Greedy",
    "Kronecker",
    "Rotation",
    "Scaling",
    "Smooth",
    "Transform",
    "Zigzag",
]
