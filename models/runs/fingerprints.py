"""What distinguishes runs: digests of models and texts, and library versions."""

import hashlib

import jax
import numpy as np

import jaxquant as jq
from jaxquant_models.readers.model import Model

VERSIONS = {"jaxquant": jq.__version__, "jax": jax.__version__}


def digest_of_model(model: Model) -> str:
    """Return the SHA-256 of a model's weights, packed or not.

    Args:
      model: the model.
    """
    digest = hashlib.sha256()
    for path, w in jax.tree_util.tree_leaves_with_path(model.params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(w).tobytes())
    return digest.hexdigest()


def digest_of_text(text: str) -> str:
    """Return the SHA-256 of a text.

    Args:
      text: the text.
    """
    return hashlib.sha256(text.encode()).hexdigest()
