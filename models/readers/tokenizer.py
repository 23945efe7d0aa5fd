"""Text to token ids and back, over the `tokenizers` library.

Round trips are exact: `decode(encode(text)) == text`, whatever special-token strings, spaces and
control characters the text has. What the file itself makes impossible stays so: a normalizer that
changes the text (Qwen2's tokenizer.json applies NFC; SentencePiece reads U+2581 as a space).
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from jaxquant.core.fields import shown
from jaxquant_models.architectures.config import tokenizer_fields
from jaxquant_models.schemas.files import Pieces, TokenizerFields, TokenizerFile, Words
from jaxquant_models.schemas.strict import checked, parse_json, read_bytes

# llama.cpp's token types (gguf.TokenType).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_LONGEST = 512  # characters of a piece that is cut in every way for its merges

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
        ids = backend.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError("the tokenizer has no tokens")
        self._rows = 1 + max(ids)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises ValueError if it is missing or malformed."""
        return cls.from_json(read_bytes(Path(path)), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "tokenizer.json") -> "Tokenizer":
        """The inverse of `to_json`. Raises ValueError if the text is not a tokenizer.json."""
        if not isinstance(text, str | bytes):
            raise ValueError(f"{where} should be a text, got {shown(text)}")
        file = checked(TokenizerFile, parse_json(text, where), where)
        pieces = isinstance(file.model.get("vocab"), list)
        checked(Pieces if pieces else Words, file.model, where, "model.")
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        with _one_line(f"{where} is not the contents of a tokenizer.json"):
            backend = tokenizers.Tokenizer.from_str(text)
            made = cls(backend)
        for token in file.added_tokens:  # the library numbers them anew where these do not fit
            got = backend.token_to_id(token.content)
            if got != token.id:
                raise ValueError(
                    f"{where}: added_tokens give {shown(token.content)} the id {token.id}, but "
                    f"{got} is the one that follows from the vocabulary; the ids must be its next"
                )
        return made

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """Build from GGUF metadata (plain values).

        Raises:
          ValueError: the tokenizer's kind or its pre-tokenizer is not supported, or metadata lacks.
        """
        own = tokenizer_fields(fields)
        with _one_line("the GGUF metadata make no tokenizer"):
            backend = _byte_level(own) if own.model == "gpt2" else _sentence_piece(own)
            _add_tokens(backend, own)
            bos, tokens = own.bos_token_id, own.tokens
            added = own.model == "llama" if own.add_bos_token is None else own.add_bos_token
            if bos is not None and added:
                backend.post_processor = processors.TemplateProcessing(
                    single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
                )
            return cls(backend)

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: one more than the largest id, of special tokens too."""
        return self._rows

    def check_rows(self, rows: int) -> None:
        """Raise ValueError unless every token has one of so many rows of an embedding.

        Fewer tokens than rows are fine: embeddings are padded.
        """
        if self._rows > rows:
            vocab = self._backend.get_vocab(with_added_tokens=True)
            outside = sorted((i, token) for token, i in vocab.items() if i >= rows)
            i, token = outside[0]
            more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
            raise ValueError(
                f"the tokenizer has token {shown(token)} with id {i}{more}, but the embedding has "
                f"{rows} rows (vocab_size); give the tokenizer that belongs to these weights, or "
                f"remove the tokens that were added to it"
            )

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
        with _one_line("the tokenizer cannot encode the text"):
            return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 show as U+FFFD.

        Added tokens stand for themselves and split the rest into runs, as they do in `encode`: each
        run has its own prefix space (SentencePiece), which the library would strip only once.

        Raises:
          ValueError: an id is negative, or none that the vocabulary could have.
        """
        parts = []
        whole = [int(i) for i in ids]
        if wrong := [i for i in whole if not 0 <= i < 2**32]:
            raise ValueError(f"token ids must not be negative, and below 2**32, got {wrong[0]}")
        for added, run in itertools.groupby(whole, key=self._added.__contains__):
            if added:
                parts += [self._added[i] for i in run]
            else:
                with _one_line("the tokenizer cannot decode the ids"):
                    parts.append(self._backend.decode(list(run), skip_special_tokens=False))
        return "".join(parts)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Of the Rust library's errors: bare Exception, and where it panics what is not even one."""
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from None


def _byte_level(own: TokenizerFields) -> tokenizers.Tokenizer:
    """BPE over bytes, each written as a printable character (GPT-2)."""
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


def _sentence_piece(own: TokenizerFields) -> tokenizers.Tokenizer:
    """BPE over characters with a byte fallback; the best-scored piece is merged first."""
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
    """Every split of every normal piece into two normal pieces, best piece first."""
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
    with _one_line("the GGUF vocabulary and merges disagree"):
        return BPE(vocab, merges, **options)


def _add_tokens(backend: tokenizers.Tokenizer, own: TokenizerFields) -> None:
    """Control and user-defined tokens are found in the text before anything else."""
    types = own.token_type or []
    for kind, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        group = [t for t, type_ in zip(own.tokens, types, strict=False) if type_ in kind]
        backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in group])


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
