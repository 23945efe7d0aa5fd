"""Conversion between text and token ids, based on the `tokenizers` library.

Round trips are exact: `decode(encode(text)) == text` for any text, including special-token strings,
spaces and control characters. The exceptions are what the file itself makes impossible: a
normalizer that changes the text (Qwen2's tokenizer.json applies NFC; SentencePiece reads U+2581 as
a space).
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

from jaxquant.core.fields import shown
from jaxquant_models.readers.chat_template import ChatTemplate
from jaxquant_models.schemas.files import TokenizerFile, UnigramModel, VocabularyModel
from jaxquant_models.schemas.strict import checked, parse_json, read_bytes


class Tokenizer:
    """A tokenizer with exact round trips; see the module docstring.

    Attributes:
      chat: the chat template, or None.

    Args:
      backend: the tokenizer of the `tokenizers` library; its truncation and padding are turned off.
      chat: the chat template of the model, or None.
    Raises:
      ValueError: it has no tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, chat: ChatTemplate | None = None):
        self.chat = chat
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
    def from_file(cls, path: str | Path, chat: ChatTemplate | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Args:
          path: the file.
          chat: the chat template, or None.
        Raises:
          ValueError: the file is missing or malformed.
        """
        return cls.from_json(read_bytes(Path(path)), str(path), chat)

    @classmethod
    def from_json(
        cls, text: str | bytes, where: str = "tokenizer.json", chat: ChatTemplate | None = None
    ) -> "Tokenizer":
        """Return the tokenizer that `to_json` serialized.

        Args:
          text: the contents of a tokenizer.json.
          where: name of the source in error messages.
          chat: the chat template, or None.
        Raises:
          ValueError: text is not the contents of a valid tokenizer.json.
        """
        if not isinstance(text, str | bytes):
            raise ValueError(f"{where} must be a string, got {shown(text)}")
        file = checked(TokenizerFile, parse_json(text, where), where)
        pieces = isinstance(file.model.get("vocab"), list)
        checked(UnigramModel if pieces else VocabularyModel, file.model, where, "model.")
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        with one_line(f"{where} is not the contents of a tokenizer.json"):
            backend = tokenizers.Tokenizer.from_str(text)
            made = cls(backend, chat)
        for token in file.added_tokens:  # the library renumbers those whose ids do not fit
            got = backend.token_to_id(token.content)
            if got != token.id:
                raise ValueError(
                    f"{where}: added_tokens gives {shown(token.content)} the id {token.id}, "
                    f"but after the vocabulary its id is {got}; the ids of added tokens must "
                    "continue those of the vocabulary"
                )
        return made

    def to_json(self) -> str:
        """Return the contents of a `tokenizer.json`, which holds no chat template."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """The rows an embedding needs: one more than the largest id, special tokens included."""
        return self._rows

    def check_rows(self, rows: int) -> None:
        """Raise ValueError unless an embedding of `rows` rows has one for every token.

        Fewer tokens than rows are allowed, since embeddings are often padded.

        Args:
          rows: number of rows of the embedding.
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

    def is_added(self, token: int) -> bool:
        """Return whether a token was added to the vocabulary, as special tokens are.

        Args:
          token: its id.
        """
        return token in self._added

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the token ids of text. A special token's string in the text becomes that token.

        Args:
          text: any Unicode text.
          special: whether to add the surrounding special tokens that the model was trained with,
            such as BOS.
        Raises:
          ValueError: text is not valid Unicode, or the vocabulary has no token for one of its bytes
            (SmolLM2 lacks six control characters), which the library would drop silently.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode at character {error.start}") from None
        if lost := self._lost.intersection(text):
            raise ValueError(f"the vocabulary has no token for {sorted(lost)[:5]}; remove them")
        with one_line("the tokenizer cannot encode the text"):
            return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Added tokens decode to their own strings and split the rest into runs, as in `encode`. Each
        run has its own prefix space (SentencePiece), which the library would strip only once.

        Args:
          ids: token ids.
        Raises:
          ValueError: an id is negative or at least 2**32, or the library cannot decode the ids.
        """
        parts = []
        whole = [int(i) for i in ids]
        if wrong := [i for i in whole if not 0 <= i < 2**32]:
            raise ValueError(f"token ids must be at least 0 and below 2**32, got {wrong[0]}")
        for added, run in itertools.groupby(whole, key=self._added.__contains__):
            if added:
                parts += [self._added[i] for i in run]
            else:
                with one_line("the tokenizer cannot decode the ids"):
                    parts.append(self._backend.decode(list(run), skip_special_tokens=False))
        return "".join(parts)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Convert the errors of the Rust library into a one-line ValueError.

    The library raises bare Exceptions and, on a panic, an exception that is not even an Exception.

    Args:
      what: beginning of the message.
    """
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from None


def _lost_characters(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """Return the ASCII characters for which a byte-level vocabulary has no token."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    if "ByteLevel" not in [d.get("type") for d in (decoder, *decoder.get("decoders", ()))]:
        return frozenset()
    probe = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return frozenset(
        c for c in map(chr, range(128))
        if backend.token_to_id(probe.pre_tokenize_str(c)[0][0]) is None
    )  # fmt: skip
