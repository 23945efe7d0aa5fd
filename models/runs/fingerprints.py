"""What distinguishes runs: digests of models and texts, and library versions."""

import hashlib

import jax

import jaxquant as jq
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.source import Loaded

VERSIONS = {"jaxquant": jq.__version__, "jax": jax.__version__}


def digest_of_model(model: Model) -> str:
    """Return the SHA-256 of a model's weights, packed or not.

    Args:
      model: the model.
    """
    return Loaded(model.params).digest()


def digest_of_text(text: str) -> str:
    """Return the SHA-256 of a text.

    Args:
      text: the text.
    """
    return hashlib.sha256(text.encode()).hexdigest()
