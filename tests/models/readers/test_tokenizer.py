"""Exact round trips, and the text that every vocabulary makes hard."""

import numpy as np
import pytest

from jaxquant_models import Tokenizer
from jaxquant_models.readers.gguf_tokenizer import tokenizer_from_gguf
from tests.support.gguf_vocabularies import byte_fields, piece_fields
from tests.support.tiny_llama import byte_tokenizer_json

# What the random texts are made of: each piece is there because it broke some tokenizer once.
PIECES = [
    "the", " the", "He's", " ", "  ", "\t", "\n", "\r\n", "\x00", "\x14", "\x7f", "123", "4",
    "é", "e\u0301", "日本", "\u200d", "👩‍👩‍👧", "\U0004ffff", "\ufeff", "\u00a0", "Ġ", "ĊĊ",
    "<s>", "</s>", "<|é|>", "<| b |>", "<s", "|>", "<0x0A>", "...", "!", "_",
]  # fmt: skip


TOKENIZERS = {
    pre: lambda pre=pre: tokenizer_from_gguf(byte_fields(pre))
    for pre in ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")
}
TOKENIZERS["sentencepiece"] = lambda: tokenizer_from_gguf(piece_fields())
TOKENIZERS["no prefix"] = lambda: tokenizer_from_gguf(piece_fields(add_space_prefix=False))
TOKENIZERS["file"] = lambda: Tokenizer.from_json(byte_tokenizer_json())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_text_comes_back(name):
    tokenizer = TOKENIZERS[name]()
    again = Tokenizer.from_json(tokenizer.to_json())
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(PIECES, rng.integers(0, 12)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert again.encode(text) == ids
        assert again.decode(np.asarray(ids, np.int32)) == text


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("gpt-2", "1234", ["123", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("gpt-2", "the  the", ["t", "he", "Ġ", "Ġthe"]),
        ("llama-bpe", "\n\n", ["ĊĊ"]),
        ("gpt-2", "He's<s>", ["He", "'s", "<s>"]),
    ],
)
def test_known_splits(pre, text, expected):
    fields = byte_fields(pre)
    ids = tokenizer_from_gguf(fields).encode(text)
    assert [fields["tokenizer.ggml.tokens"][i] for i in ids] == expected


def test_llama3_takes_whole_words_before_merging():
    """ignore_merges: a word in the vocabulary is one token, even if no merges lead to it."""
    fields = byte_fields("llama-bpe")
    tokens = [*fields["tokenizer.ggml.tokens"], "xyz"]
    types = [*fields["tokenizer.ggml.token_type"], 1]
    fields |= byte_fields("llama-bpe", tokens=tokens, token_type=types)
    assert tokenizer_from_gguf(fields).encode("xyz") == [len(tokens) - 1]


def test_sentencepiece_merges_the_best_scored_piece_first():
    fields = piece_fields()
    ids = tokenizer_from_gguf(fields).encode("the the")
    assert [fields["tokenizer.ggml.tokens"][i] for i in ids] == ["▁the", "▁the"]
    assert tokenizer_from_gguf(fields).encode("é")[-2:] == [5 + 0xC3, 5 + 0xA9]


def test_special_adds_the_beginning_token():
    tokenizer = tokenizer_from_gguf(piece_fields())
    assert tokenizer.encode("the", special=True) == [1, *tokenizer.encode("the")]
    plain = tokenizer_from_gguf(byte_fields(bos_token_id=266))
    assert plain.encode("the", special=True) == plain.encode("the")


def test_special_strings_become_special_tokens():
    tokenizer = tokenizer_from_gguf(byte_fields())
    assert tokenizer.encode("<s>") == [266]
    assert tokenizer.vocab_size == 256 + 10 + 4


def test_bytes_that_the_vocabulary_lacks_are_an_error():
    """As in SmolLM2, whose tokenizer would drop these characters in silence."""
    tokens = ["<hole>" if t == "Ĕ" else t for t in byte_fields()["tokenizer.ggml.tokens"]]
    tokenizer = tokenizer_from_gguf(byte_fields(tokens=tokens))
    assert tokenizer.decode(tokenizer.encode("a\x15b")) == "a\x15b"
    with pytest.raises(ValueError, match=r"no token for \['\\x14'\]"):
        tokenizer.encode("a\x14b")


def test_lone_surrogates_are_an_error():
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        tokenizer_from_gguf(byte_fields()).encode("a\ud800")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "lacks 'tokenizer.ggml.model'"),
        (byte_fields(model="bert"), "must be gpt2 or llama, got 'bert'"),
        (byte_fields("chameleon"), "tokenizer.ggml.pre must be one of .* got 'chameleon'"),
        (byte_fields(merges=None), "lacks tokenizer.ggml.merges"),
        (byte_fields(tokens=[]), "tokenizer.ggml.tokens must have at least 1 item, got"),
        (byte_fields(merges=["q zz"]), "vocabulary and merges disagree"),
        (piece_fields(scores=None), "lacks tokenizer.ggml.scores"),
    ],
)
def test_unsupported_metadata(fields, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(fields)
