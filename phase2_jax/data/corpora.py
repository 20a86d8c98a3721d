"""From a DataConfig to two streams of tokens that know where their documents begin."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phase2_jax.data.config import DataConfig
from phase2_jax.data.documents import hold_back, is_wikitext, shipped_documents, split_text
from phase2_jax.data.huggingface import load_rows
from phase2_jax.data.reading import list_files, read_texts
from phase2_jax.data.task_stream import TaskStream
from phase2_jax.data.tokenizers import NumberTokenizer, Tokenizer, make_tokenizer
from phase2_jax.errors import UserError


@dataclass(frozen=True)
class TokenStream:
    """Documents laid end to end.

    tokens: (T,) int32 token ids. document_starts: (D,) int64, strictly increasing, the first is 0.
    num_bytes: UTF-8 bytes of the text the tokens stand for, for bits per byte.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        return len(self.tokens)

    def is_document_start(self, positions: np.ndarray) -> np.ndarray:
        """Whether a document begins at each position; bool, same shape."""
        nearest = np.searchsorted(self.document_starts, positions, side="right") - 1
        return self.document_starts[nearest] == positions

    def fingerprint(self) -> bytes:
        """sha256 of tokens and document starts."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens).data)
        digest.update(np.ascontiguousarray(self.document_starts).data)
        return digest.digest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError if a model with `vocab_size` embeddings cannot read this stream."""
        largest = int(self.tokens.max())
        if largest >= vocab_size or int(self.tokens.min()) < 0:
            raise UserError(
                f"the text holds token id {largest}, outside the vocabulary of {vocab_size}: "
                f"set model.vocab_size to at least {largest + 1} or change data.tokenizer"
            )


@dataclass(frozen=True)
class Corpus:
    """A training and a validation stream without a token in common, and the tokenizer of both."""

    train: TokenStream
    valid: TokenStream
    tokenizer: Tokenizer


@dataclass(frozen=True)
class TaskCorpus:
    """A synthetic task in the place of a text."""

    train: TaskStream
    valid: TaskStream
    tokenizer: Tokenizer


def load_data(config: DataConfig) -> Corpus | TaskCorpus:
    """What `config` trains on: a task, or a text as `load_corpus` reads it.

    Raises:
      UserError: for every mistake in the configuration or the files.
    """
    if not config.task.name:
        return load_corpus(config)
    config.validate()
    train, valid = (TaskStream(config.task, split) for split in ("train", "valid"))
    return TaskCorpus(train, valid, NumberTokenizer(config.task.vocab_size))


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, splits and tokenizes the text that `config` names.

    Args:
      config: see DataConfig; `docs/data.md` says what counts as a document and what is held back for validation.
      tokenizer: used instead of the one `config.tokenizer` names, for a run that continues with a stored one.

    Raises:
      UserError: for every mistake in the configuration or the files.
    """
    config.validate()
    if config.task.name:
        raise UserError(
            f"data.task.name={config.task.name!r} is a task and has no text of its own: give one (data.path, or --data)"
        )
    train_documents, valid_documents = _documents(config)
    if not any(train_documents):
        raise UserError("there is no training text: the files are empty, or data.valid_fraction leaves nothing")
    if not any(valid_documents):
        raise UserError("there is no validation text: raise data.valid_fraction or give data.valid_path")
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, train_documents)
    return Corpus(encode_documents(tokenizer, train_documents), encode_documents(tokenizer, valid_documents), tokenizer)


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> TokenStream:
    """Tokenizes each document by itself, so that no token spans two, and lays them end to end.

    Raises:
      UserError: the documents give no token at all.
    """
    encoded = [ids for ids in map(tokenizer.encode, documents) if len(ids)]
    if not encoded:
        raise UserError(f"the text gives no token with the tokenizer {tokenizer.name!r}: is it only white space?")
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    return TokenStream(
        tokens=encoded[0] if len(encoded) == 1 else np.concatenate(encoded),
        document_starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        num_bytes=sum(_utf8_length(document) for document in documents),
    )


def _documents(config: DataConfig) -> tuple[list[str], list[str]]:
    valid_files = _files(config.valid_path, "data.valid_path") if config.valid_path else []
    train, valid = _training_text(config, valid_files)
    if valid_files:
        return train, list(_split_files(valid_files, config, "data.valid_path"))
    if valid:
        return train, valid
    shipped = not config.path and not config.dataset
    return hold_back(train, config.valid_fraction, whole=not shipped)


def _training_text(config: DataConfig, valid_files: list[Path]) -> tuple[list[str], list[str]]:
    """All training documents, and the validation documents of a data set that brings its own."""
    if config.dataset:
        train, valid = load_rows(config.dataset)
        return _rows_to_documents(train, config), _rows_to_documents(valid, config)
    if not config.path:
        return shipped_documents(), []
    held_back = {file.resolve() for file in valid_files}
    files = [file for file in _files(config.path, "data.path") if file.resolve() not in held_back]
    if not files:
        raise UserError(
            f"data.path={config.path!r} has no file that data.valid_path={config.valid_path!r} has not: "
            "give different text for validation, or leave data.valid_path empty"
        )
    return list(_split_files(files, config, "data.path")), []


def _files(path: str, option: str) -> list[Path]:
    return list_files(Path(path).expanduser(), option)


def _split_files(files: list[Path], config: DataConfig, option: str) -> Iterator[str]:
    texts = read_texts(files, option)
    _check_documents(texts, config, option)
    for text in texts:
        yield from split_text(text, config.format, config.document_separator)


def _rows_to_documents(rows: list[str], config: DataConfig) -> list[str]:
    """Each row is a document, unless the rows are the lines of a WikiText file or a separator is given."""
    if not rows:
        return []
    lines = "".join(row if row.endswith("\n") else row + "\n" for row in rows)
    _check_documents([lines], config, "data.dataset")
    if config.document_separator or is_wikitext(lines, config.format):
        return split_text(lines, config.format, config.document_separator)
    return [row for row in rows if row]


def _check_documents(texts: list[str], config: DataConfig, option: str) -> None:
    """Refuses a separator or a format that matches nothing: the memory would run through all documents unnoticed."""
    separator = config.document_separator
    if separator and option != "data.valid_path" and not any(separator in text for text in texts):
        raise UserError(f"data.document_separator={separator!r} does not occur in {option}: check it, or leave it out")
    if config.format == "wikitext" and not any(is_wikitext(text, "wikitext") for text in texts):
        raise UserError(f"data.format='wikitext', but {option} has no title line ' = Title = ': use data.format='text'")


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
