"""Text to token ids and back, over the `tokenizers` library.

Round trips are exact: `decode(encode(text)) == text`, whatever special-token strings, spaces and
control characters the text has. What the file itself makes impossible stays so: a normalizer that
changes the text (Qwen2's tokenizer.json applies NFC; SentencePiece reads U+2581 as a space).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

# llama.cpp's token types (gguf.TokenType).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CASED_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A vocabulary with its rules; see the module docstring for what it promises."""

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._lost = _lost_characters(backend)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises ValueError if it is missing or malformed."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        return cls.from_json(text)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The inverse of `to_json`. Raises ValueError if the text is not a tokenizer.json."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not the contents of a tokenizer.json: {error}") from None

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """Build from GGUF metadata (plain values).

        Raises:
          ValueError: the tokenizer's kind or its pre-tokenizer is not supported, or metadata lacks.
        """
        kind = fields.get("tokenizer.ggml.model")
        builders = {"gpt2": _byte_level, "llama": _sentence_piece}
        if kind not in builders:
            raise ValueError(f"tokenizer.ggml.model must be gpt2 or llama, got {kind!r}")
        backend = builders[kind](fields)
        tokens = fields["tokenizer.ggml.tokens"]
        _add_tokens(backend, fields, tokens)
        bos = fields.get("tokenizer.ggml.bos_token_id")
        if bos is not None and fields.get("tokenizer.ggml.add_bos_token", kind == "llama"):
            pair = (tokens[bos], bos)
            backend.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[pair]
            )
        return cls(backend)

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of text. A special token's string in the text becomes that token.

        Args:
          text: any Unicode text.
          special: also put the tokens around it that the model was trained with (such as BOS).
        Raises:
          ValueError: the vocabulary has no token for a byte of the text, which the library would
            drop in silence (SmolLM2 lacks six control characters), or text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode at character {error.start}") from None
        if lost := self._lost.intersection(text):
            raise ValueError(f"the vocabulary has no token for {sorted(lost)[:5]}; remove them")
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 show as U+FFFD.

        Added tokens stand for themselves and split the rest into runs, as they do in `encode`: each
        run has its own prefix space (SentencePiece), which the library would strip only once.
        """
        parts = []
        for added, run in itertools.groupby(map(int, ids), key=self._added.__contains__):
            if added:
                parts += [self._added[i] for i in run]
            else:
                parts.append(self._backend.decode(list(run), skip_special_tokens=False))
        return "".join(parts)


def _byte_level(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BPE over bytes, each written as a printable character (GPT-2)."""
    tokens = _field(fields, "tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(fields, "merges")]
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre must be one of {list(_PRE_TOKENIZERS)}, got {pre!r}")
    vocab = {token: i for i, token in enumerate(tokens)}
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


def _sentence_piece(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BPE over characters with a byte fallback; the best-scored piece is merged first."""
    tokens, scores = _field(fields, "tokens"), _field(fields, "scores")
    types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges_from_scores(vocab, scores, types)
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend


def _merges_from_scores(
    vocab: dict[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every split of every normal piece into two normal pieces, best piece first."""
    normal = {token: i for token, i in vocab.items() if types[i] == _NORMAL}
    merges = []
    for token, i in normal.items():
        cuts = ((token[:c], token[c:]) for c in range(1, len(token)))
        merges += [(-scores[i], normal[a], normal[b], a, b)
                   for a, b in cuts if a in normal and b in normal]  # fmt: skip
    return [(a, b) for *_, a, b in sorted(merges)]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options) -> BPE:
    try:
        return BPE(vocab, merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the GGUF vocabulary and merges disagree: {error}") from None


def _add_tokens(backend: tokenizers.Tokenizer, fields: Mapping[str, Any], tokens: list[str]):
    """Control and user-defined tokens are found in the text before anything else."""
    types = fields.get("tokenizer.ggml.token_type") or []
    for kind, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        group = [t for t, type_ in zip(tokens, types, strict=False) if type_ in kind]
        backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in group])


def _field(fields: Mapping[str, Any], key: str):
    if not fields.get(f"tokenizer.ggml.{key}"):
        raise ValueError(f"the GGUF metadata lacks tokenizer.ggml.{key}")
    return fields[f"tokenizer.ggml.{key}"]


def _lost_characters(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """ASCII characters that a byte-level vocabulary has no token for."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    if "ByteLevel" not in [d.get("type") for d in (decoder, *decoder.get("decoders", ()))]:
        return frozenset()
    probe = _bytes(use_regex=False)
    return frozenset(
        c for c in map(chr, range(128))
        if backend.token_to_id(probe.pre_tokenize_str(c)[0][0]) is None
    )  # fmt: skip
