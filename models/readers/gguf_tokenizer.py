"""Builds a tokenizer from the metadata of a GGUF file: byte-level BPE or SentencePiece."""

from collections.abc import Mapping, Sequence

import tokenizers
from pydantic import JsonValue
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from jaxquant.core.fields import shown
from jaxquant_models.readers.gguf_metadata import chat_template_from_gguf, tokenizer_fields
from jaxquant_models.readers.tokenizer import Tokenizer, one_line
from jaxquant_models.schemas.files import GGUFTokenizer

# llama.cpp's token types (gguf.TokenType).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_LONGEST = 512  # maximum number of characters of a piece, since every split of it is tried

_CASED_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_from_gguf(fields: Mapping[str, JsonValue]) -> Tokenizer:
    """Return the tokenizer that the metadata describe.

    Args:
      fields: the metadata, as plain values.
    Raises:
      ValueError: the kind of tokenizer or its pre-tokenizer is not supported, or metadata are
        missing.
    """
    own = tokenizer_fields(fields)
    with one_line("no tokenizer can be built from the GGUF metadata"):
        backend = _byte_level(own) if own.model == "gpt2" else _sentence_piece(own)
        _add_tokens(backend, own)
        bos, tokens = own.bos_token_id, own.tokens
        added = own.model == "llama" if own.add_bos_token is None else own.add_bos_token
        if bos is not None and added:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
            )
        return Tokenizer(backend, chat_template_from_gguf(fields))


def _byte_level(own: GGUFTokenizer) -> tokenizers.Tokenizer:
    """Return a BPE tokenizer over bytes, each written as a printable character (GPT-2)."""
    merges = [tuple(merge.split(" ", 1)) for merge in own.merges]
    pre = own.pre
    if pre not in _PRE_TOKENIZERS:
        known = list(_PRE_TOKENIZERS)
        raise ValueError(f"tokenizer.ggml.pre must be one of {known}, got {shown(pre)}")
    vocab = {token: i for i, token in enumerate(own.tokens)}
    model = _bpe(vocab, merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, _bytes(use_regex=False)])


def _bytes(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()])


_PRE_TOKENIZERS = {
    "smollm": _digits,
    "gpt-2": _bytes,
    "default": _bytes,
    "llama-bpe": lambda: _split(_CASED_WORDS % "{1,3}"),
    "qwen2": lambda: _split(_CASED_WORDS % ""),
}


def _sentence_piece(own: GGUFTokenizer) -> tokenizers.Tokenizer:
    """Return a BPE tokenizer over characters with byte fallback.

    The piece with the best score is merged first.
    """
    types = own.token_type or [_NORMAL] * len(own.tokens)
    vocab = {token: i for i, token in enumerate(own.tokens)}
    merges = _merges_from_scores(vocab, own.scores, types)
    unknown = own.tokens[own.unknown_token_id]
    model = _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = own.add_space_prefix
    spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend


def _merges_from_scores(
    vocab: dict[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every split of every normal piece into two normal pieces, best piece first."""
    normal = {token: i for token, i in vocab.items() if types[i] == _NORMAL}
    if longest := max((token for token in normal if len(token) > _LONGEST), default=None, key=len):
        raise ValueError(
            f"tokenizer.ggml.tokens: a piece has at most {_LONGEST} characters, "
            f"got one of {len(longest)}"
        )
    merges = []
    for token, i in normal.items():
        cuts = ((token[:c], token[c:]) for c in range(1, len(token)))
        merges += [(-scores[i], normal[a], normal[b], a, b)
                   for a, b in cuts if a in normal and b in normal]  # fmt: skip
    return [(a, b) for *_, a, b in sorted(merges)]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options) -> BPE:
    with one_line("the GGUF vocabulary and merges disagree"):
        return BPE(vocab, merges, **options)


def _add_tokens(backend: tokenizers.Tokenizer, own: GGUFTokenizer) -> None:
    """Add control and user-defined tokens, which are matched in the text before anything else."""
    types = own.token_type or []
    for kind, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        group = [t for t, type_ in zip(own.tokens, types, strict=False) if type_ in kind]
        backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in group])
