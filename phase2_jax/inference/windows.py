"""A stream of documents cut into windows of tokens that know their place in their document."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from phase2_jax.data.corpora import TokenStream
from phase2_jax.data.tokenizers import Tokenizer
from phase2_jax.inference.text_pieces import EncodedPiece, encode_pieces


@dataclass(frozen=True)
class Window:
    """N + 1 consecutive tokens of the stream: inputs are the first N, labels the last N.

    Attributes:
      tokens: int32.
      positions: place in the document from 0, int64.
      seen: bool, the same token occurs earlier in the document.
    """

    tokens: np.ndarray
    positions: np.ndarray
    seen: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def __getitem__(self, part: slice) -> "Window":
        return Window(self.tokens[part], self.positions[part], self.seen[part])

    @staticmethod
    def join(parts: "list[Window]") -> "Window":
        """Parts that follow each other as one."""
        return Window(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.seen for part in parts]),
        )


@dataclass
class TextCounts:
    """What has been read so far.

    Attributes:
      tokens, documents, num_bytes, num_words: of the text.
      first_bytes: bytes of the first token, which nothing predicts.
      lossless: the tokens hold all of the text.
    """

    tokens: int = 0
    documents: int = 0
    num_bytes: int = 0
    num_words: int = 0
    first_bytes: int = 0
    lossless: bool = True


class WindowReader:
    """Cuts pieces into windows and counts what goes by; holds one piece and one window at a time."""

    def __init__(self, tokenizer: Tokenizer, length: int, max_tokens: int = 0):
        """Args: length: N of the windows; max_tokens: stop after so many labels, 0 = never."""
        self._tokenizer, self._length, self._max_tokens = tokenizer, length, max_tokens
        self.counts = TextCounts()
        self._position = 0
        self._occurred_V = np.zeros(tokenizer.vocab_size, bool)

    def windows(self, pieces: Iterable[EncodedPiece]) -> Iterator[Window]:
        """Windows of N, the last one shorter; neighbours share one token."""
        held: list[Window] = []
        length = 0
        for piece in self._limited(pieces):
            held.append(self._place(piece))
            length += len(piece.tokens)
            if length <= self._length:
                continue
            joined, start = Window.join(held), 0
            while length - start > self._length:
                yield joined[start : start + self._length + 1]
                start += self._length
            held, length = [joined[start:]], length - start
        if length > 1:
            yield Window.join(held)

    def _limited(self, pieces: Iterable[EncodedPiece]) -> Iterator[EncodedPiece]:
        """The pieces up to the limit, with the bytes and words of what is left of the last one."""
        left = self._max_tokens + 1
        for piece in pieces:
            if self._max_tokens and len(piece.tokens) >= left:
                tokens = piece.tokens[:left]
                text = self._tokenizer.decode(tokens)
                yield replace(piece, tokens=tokens, num_bytes=self._num_bytes(tokens), num_words=len(text.split()))
                return
            left -= len(piece.tokens)
            yield piece

    def _num_bytes(self, tokens: np.ndarray) -> int:
        # A byte alone may be no character and would be decoded as a mark of three bytes.
        return len(tokens) if self._tokenizer.name == "bytes" else len(self._tokenizer.decode(tokens).encode())

    def _place(self, piece: EncodedPiece) -> Window:
        counts, tokens = self.counts, piece.tokens
        if counts.tokens == 0 and len(tokens):
            counts.first_bytes = self._num_bytes(tokens[:1])
        if piece.begins_document:
            counts.documents += 1
            self._position = 0
            self._occurred_V[:] = False
        counts.tokens += len(tokens)
        counts.num_bytes += piece.num_bytes
        counts.num_words += piece.num_words
        counts.lossless &= piece.lossless
        _, firsts = np.unique(tokens, return_index=True)
        seen = np.ones(len(tokens), bool)
        seen[firsts] = self._occurred_V[tokens[firsts]]
        self._occurred_V[tokens] = True
        positions = self._position + np.arange(len(tokens))
        self._position += len(tokens)
        return Window(tokens.astype(np.int32, copy=False), positions, seen)


def pieces_of_documents(documents: Iterable[Iterable[str]], tokenizer: Tokenizer) -> Iterator[EncodedPiece]:
    """Pieces of documents one after another, each tokenized by itself; documents without a token are left out."""
    for document in documents:
        yield from (piece for piece in encode_pieces(document, tokenizer) if len(piece.tokens))


def pieces_of_stream(stream: TokenStream, tokenizer: Tokenizer) -> Iterator[EncodedPiece]:
    """Pieces of a text that is in memory as tokens already; its bytes count only as far as the tokens hold them."""
    documents = [stream.tokens[a:b] for a, b in pairwise([*stream.document_starts.tolist(), len(stream)])]
    texts = [tokenizer.decode(tokens) for tokens in documents]
    lossless = sum(len(text.encode()) for text in texts) == stream.num_bytes
    for tokens, text in zip(documents, texts, strict=True):
        yield EncodedPiece(tokens, len(text.encode()), len(text.split()), lossless, True)
