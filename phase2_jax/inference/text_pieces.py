"""Text of any length as tokens, piece by piece, in constant memory and with the tokens of the whole text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from phase2_jax.data.tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class EncodedPiece:
    """Some consecutive tokens of one document.

    Attributes:
      tokens: int32, 1-D.
      num_bytes: of the text in UTF-8.
      num_words: words that begin in it, by white space.
      lossless: the tokens hold all of the text, so that bits per byte mean something.
      begins_document: the first piece of its document.
    """

    tokens: np.ndarray
    num_bytes: int
    num_words: int
    lossless: bool
    begins_document: bool


def encode_pieces(
    texts: Iterable[str], tokenizer: Tokenizer, piece_characters: int = PIECE_CHARACTERS
) -> Iterator[EncodedPiece]:
    """Tokens of one document that comes as strings of any size.

    Pieces end at a line break, or else a space, between two visible characters, where common tokenizers cut anyway;
    when there is none in a long while, anywhere.

    Args:
      texts: joined they are the document.
      tokenizer: of the model.
      piece_characters: least length of a piece but the last.
    """
    inside_word, first = False, True
    for text in _cut_pieces(texts, piece_characters):
        tokens = tokenizer.encode(text)
        words = len(text.split()) - (inside_word and not text[0].isspace())
        inside_word = not text[-1].isspace()
        yield EncodedPiece(tokens, len(text.encode()), words, is_lossless(tokenizer, tokens, text), first)
        first = False


def is_lossless(tokenizer: Tokenizer, tokens: np.ndarray, text: str) -> bool:
    """Whether the tokens hold all of the text but, for words, its white space."""
    if tokenizer.name == "bytes":
        return True
    decoded = tokenizer.decode(tokens)
    return decoded.split() == text.split() if tokenizer.name == "words" else decoded == text


def _cut_pieces(texts: Iterable[str], piece_characters: int) -> Iterator[str]:
    held: list[str] = []
    length = 0
    for text in texts:
        held.append(text)
        length += len(text)
        while length > piece_characters:
            joined = "".join(held)
            cut = _place_to_cut(joined, force=length > 16 * piece_characters)
            if not cut:
                held = [joined]
                break
            yield joined[:cut]
            held, length = [joined[cut:]], length - cut
    if rest := "".join(held):
        yield rest


def _place_to_cut(text: str, *, force: bool) -> int:
    """The last good place, 0 if there is none."""
    # Punctuation may be one token with a line break after it, a space with the word after it: the first is cut behind,
    # the second before. Several white spaces together are split differently at the end of a text.
    for space, offset in (("\n", 1), (" ", 0)):
        end = len(text) - 1
        while (end := text.rfind(space, 1, end)) >= 0:
            if not text[end - 1].isspace() and not text[end + 1].isspace():
                return end + offset
    return len(text) if force else 0
