"""Estimators of weights in training: rounded values, surrogate gradients and learned ranges."""

from jaxquant.core.protocols import Estimator, RangeEstimator
from jaxquant.estimators.input_ranges import PACT, LSQRange
from jaxquant.estimators.kurtosis import flattened
from jaxquant.estimators.latent_format import Drawing, Latent
from jaxquant.estimators.learned_clipping import LearnedClipping
from jaxquant.estimators.weight_estimators import (
    LSQ,
    AbsMean,
    StraightThrough,
    StretchedElastic,
    randomness,
)

__all__ = [
    "LSQ",
    "PACT",
    "AbsMean",
    "Drawing",
    "Estimator",
    "LSQRange",
    "Latent",
    "LearnedClipping",
    "RangeEstimator",
    "StraightThrough",
    "StretchedElastic",
    "flattened",
    "randomness",
]
