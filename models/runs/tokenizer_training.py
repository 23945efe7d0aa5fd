"""Training of a tokenizer on a text."""

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from jaxquant_models.readers.tokenizer import Tokenizer


def trained_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on the text; it can encode any text.

    Args:
      text: the text.
      vocabulary: number of tokens.
    """
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    return Tokenizer(backend)
