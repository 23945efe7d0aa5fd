"""Training after rounding: healing, recoding, and learned transforms and rotations."""

from jaxquant.tuning.heal import heal_blocks
from jaxquant.tuning.learned_rotation import learn_rotation
from jaxquant.tuning.learned_transforms import learn, learn_blocks
from jaxquant.tuning.recoding import recode
from jaxquant.tuning.trainable import decoded, rejoined
from jaxquant.tuning.trainer import Healing

__all__ = [
    "Healing",
    "decoded",
    "heal_blocks",
    "learn",
    "learn_blocks",
    "learn_rotation",
    "recode",
    "rejoined",
]
