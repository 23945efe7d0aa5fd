"""Vocabularies as GGUF files hold them: byte-level BPE and SentencePiece."""

from tokenizers import pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


CONTROL = ["<s>", "</s>", "<|é|>", "<| b |>"]


WORDS = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "1 2", "12 3", "Ċ Ċ", "H e", "l l", "' s"]


def byte_fields(pre="gpt-2", **changes):
    merged = [merge.replace(" ", "") for merge in WORDS]
    tokens = [*ALPHABET, *merged, *CONTROL]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - len(CONTROL)) + [3, 3, 4, 3],
        "merges": WORDS,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (fields | changes).items()}


def piece_fields(**changes):
    """A SentencePiece vocabulary: unknown, control, 256 bytes, then pieces with their scores."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "1", "2", "<", "0", "x", "A", ">", "the"]
    tokens = ["<unk>", *CONTROL, *bytes_, *pieces]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 261 + [-float(len(pieces) - len(p)) for p in pieces],
        "token_type": [2, 3, 3, 4, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (fields | changes).items()}
