"""Transforms: changes of variables on one side of a weight that leave the function as it is."""

from jaxquant.transforms.rotation import Rotation
from jaxquant.transforms.scaling import Scaling

__all__ = ["Rotation", "Scaling"]
