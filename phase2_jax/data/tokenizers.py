"""Text to token ids and back: bytes, the words of a corpus, or any Hugging Face tokenizer.json."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phase2_jax.data.config import TOKENIZERS
from phase2_jax.errors import UserError

EOS = "<eos>"
UNK = "<unk>"
# Words are short-lived Python objects of some 60 bytes each; pieces of this many characters keep their number bounded.
_PIECE_CHARACTERS = 1 << 24


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer. Ids are 0 .. vocab_size - 1."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32, 1-D; nothing is added in front or behind."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; raises UserError for an id outside the vocabulary."""
        ...

    def fingerprint(self) -> str:
        """sha256 (hex) that two tokenizers share exactly when they give the same ids the same meaning."""
        ...

    def to_json(self) -> str:
        """Everything `from_json` needs to build the same tokenizer again."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: 256 ids, no training, no unknown text."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid Unicode at character {error.start} ({error.reason}): give UTF-8 text"
            ) from error
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return check_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return _digest(self.to_json())

    def to_json(self) -> str:
        return json.dumps({"kind": self.name})


class NumberTokenizer:
    """The tokens of a task as text: their ids, separated by spaces."""

    name = "numbers"

    def __init__(self, vocab_size: int):
        """Args: vocab_size: ids are below it."""
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        strange = next((word for word in words if not word.isdecimal()), None)
        if strange is not None:
            raise UserError(f"{strange!r} is no token of a task: give numbers below {self.vocab_size}")
        return check_ids([int(word) for word in words], self.vocab_size).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(map(str, check_ids(ids, self.vocab_size)))

    def fingerprint(self) -> str:
        return _digest(self.to_json())

    def to_json(self) -> str:
        return json.dumps({"kind": self.name, "vocab_size": self.vocab_size})


class WordTokenizer:
    """The WikiText convention: words between white space, an <eos> for each line break, <unk> for unknown words."""

    name = "words"

    def __init__(self, words: Sequence[str]):
        """Args: words: the vocabulary in the order of its ids; <eos> and <unk> among them."""
        self._words = list(words)
        self._ids = {word: index for index, word in enumerate(self._words)}
        if len(self._ids) != len(self._words) or not {EOS, UNK} <= self._ids.keys():
            raise UserError(f"the vocabulary of a word tokenizer must be free of repetitions and hold {EOS} and {UNK}")

    @classmethod
    def train(cls, documents: Iterable[str]) -> "WordTokenizer":
        """Vocabulary of all words of `documents`, the most frequent first, ties in alphabetical order."""
        counts = Counter({EOS: 0, UNK: 0})
        for document in documents:
            for words in _pieces_of_words(document):
                counts.update(words)
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def encode(self, text: str) -> np.ndarray:
        unknown = self._ids[UNK]
        pieces = [
            np.fromiter((self._ids.get(word, unknown) for word in words), np.int32, count=len(words))
            for words in _pieces_of_words(text)
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        words = (self._words[index] for index in check_ids(ids, self.vocab_size).tolist())
        return " ".join("\n" if word == EOS else word for word in words).replace(" \n", "\n").replace("\n ", "\n")

    def fingerprint(self) -> str:
        return _digest(self.to_json())

    def to_json(self) -> str:
        return json.dumps({"kind": self.name, "words": self._words}, ensure_ascii=False)


class HuggingFaceTokenizer:
    """A tokenizer.json of the `tokenizers` library (extra `tokenizers`). No special tokens are added to the text."""

    def __init__(self, definition: dict[str, Any], name: str, *, source: str = ""):
        """Args: definition: the parsed tokenizer.json; name: shown to the user; source: its whole path, if known."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f'the tokenizer {name!r} needs an extra: install it with pip install "phase2-jax[tokenizers]"'
            ) from error
        self.name = name
        self._definition = definition
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises plain Exception, nothing narrower, for every flaw of the file
            raise UserError(
                f"{source or name!r} is not a usable tokenizer.json ({error}): save it again with save()"
            ) from error
        # A file saved after fine-tuning often truncates at 512 tokens, which would silently drop most of a corpus.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have holes, so the largest one counts and not the number of entries.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def from_file(cls, path: str) -> "HuggingFaceTokenizer":
        """Reads a tokenizer.json; raises UserError if it is missing or not one."""
        try:
            definition = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"data.tokenizer={path!r} cannot be read ({error}): give a tokenizer.json") from error
        except ValueError as error:
            raise UserError(f"data.tokenizer={path!r} is not JSON ({error}): give a tokenizer.json") from error
        if not isinstance(definition, dict):
            raise UserError(f"data.tokenizer={path!r} holds no JSON object: give a tokenizer.json")
        if (kind := definition.get("kind")) is not None:
            instead = f"use data.tokenizer={kind}" if kind in TOKENIZERS else "give the file it was made from"
            raise UserError(
                f"data.tokenizer={path!r} is what a run keeps of its own tokenizer ({kind}), and no tokenizer.json of "
                f"Hugging Face: {instead}"
            )
        return cls(definition, Path(path).name, source=path)

    def encode(self, text: str) -> np.ndarray:
        # The fast variant leaves out character offsets, a quarter of the time on a corpus.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(check_ids(ids, self.vocab_size).tolist(), skip_special_tokens=False)

    def fingerprint(self) -> str:
        return _digest(json.dumps(self._definition, sort_keys=True))

    def to_json(self) -> str:
        return json.dumps({"kind": "huggingface", "name": self.name, "definition": self._definition})


def make_tokenizer(choice: str, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; `documents` (the training text) give the vocabulary of "words"."""
    if choice == "bytes":
        return ByteTokenizer()
    if choice == "words":
        return WordTokenizer.train(documents)
    return HuggingFaceTokenizer.from_file(choice)


def from_json(text: str) -> Tokenizer:
    """Builds the tokenizer that wrote `text` with `to_json`; raises UserError if the text is damaged."""
    try:
        stored = json.loads(text)
        kind = stored["kind"]
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "words":
            return WordTokenizer(stored["words"])
        if kind == "numbers":
            return NumberTokenizer(stored["vocab_size"])
        if kind == "huggingface":
            return HuggingFaceTokenizer(stored["definition"], stored["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the stored tokenizer is damaged ({error!r}): restore the file or train again") from error
    raise UserError(f"the stored tokenizer is of unknown kind {kind!r}: update phase2-jax")


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes `to_json` to a file."""
    path.write_text(tokenizer.to_json(), encoding="utf-8")


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads what `save_tokenizer` wrote; raises UserError if the file is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the tokenizer {str(path)!r} cannot be read ({error}): check the run's folder") from error
    return from_json(text)


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` as an int64 array; raises UserError naming the first id outside 0 .. vocab_size - 1."""
    array = np.asarray(ids, dtype=np.int64)
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise UserError(
            f"token id {array[position]} at position {position} is outside the vocabulary of {vocab_size}: "
            "set model.vocab_size to the tokenizer's size or use the tokenizer the ids were made with"
        )
    return array


def _pieces_of_words(text: str) -> Iterator[list[str]]:
    start = 0
    while start < len(text):
        line_break = text.find("\n", start + _PIECE_CHARACTERS)
        end = len(text) if line_break < 0 else line_break + 1
        yield text[start:end].replace("\n", f" {EOS} ").split()
        start = end


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
