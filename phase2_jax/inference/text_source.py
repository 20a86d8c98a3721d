"""Text of any length from files, document by document, without ever holding a whole file."""

import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from phase2_jax.data.documents import is_wikitext
from phase2_jax.data.reading import BINARY_PROBE_BYTES, check_text, list_files, looks_binary, say_left_out
from phase2_jax.errors import UserError

CHUNK_BYTES = 1 << 20
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_SOMETHING = re.compile(r"\S")
_EMPTY_LINES = ("\n", " \n", "\r\n", " \r\n")


@dataclass
class _Borders:
    """Whether a text had any place that its format or separator cuts at."""

    found: bool = False


def read_documents(path: Path, format: str, separator: str, *, insist: bool = False) -> Iterator[Iterable[str]]:
    """Documents of a file or of all files of a folder, each as strings that follow each other.

    What counts as a document is what training counts (`docs/data.md`). A document has to be used up before the next is
    asked for.

    Args:
      path: a text file, plain, .gz or .xz, or a folder of such files, of which binary ones are left out.
      format: "auto", "text" or "wikitext".
      separator: ends a document and stays with it; empty for none.
      insist: refuse, at its end, a text without the separator, or without a WikiText title where that is its format.

    Raises:
      UserError: nothing is there, a file cannot be read, is not UTF-8 or holds no text, or nothing is.
    """
    files = list_files(path, "--data")
    alone = len(files) == 1
    binary = [] if alone else [file for file in files if looks_binary(_head(file))]
    say_left_out(binary)
    texts = [file for file in files if file not in binary]
    if not texts:
        raise UserError(f"--data={path} is a folder without text files: all {len(files)} files in it are binary")
    borders = _Borders()
    for file in texts:
        yield from split_documents(_decoded(file), format, separator, borders)
    if insist and separator and not borders.found:
        raise UserError(f"--document_separator={separator!r} does not occur in --data: check it, or leave it out")
    if insist and format == "wikitext" and not separator and not borders.found:
        raise UserError("--format='wikitext', but --data has no title line ' = Title = ': use --format=text")


def decode_stream(stream: BinaryIO, name: str) -> Iterator[str]:
    """Strings of some size from a stream of UTF-8.

    Raises:
      UserError: it is not UTF-8, or looks binary.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    while raw := stream.read(CHUNK_BYTES):
        if not offset:
            check_text(raw, name)
        yield from _decode(decoder, raw, offset, name)
        offset += len(raw)
    yield from _decode(decoder, b"", offset, name)


def split_documents(
    texts: Iterable[str], format: str, separator: str, borders: _Borders | None = None
) -> Iterator[Iterator[str]]:
    """Documents of one file that comes in strings; the same as `data.documents.split_text` finds in the whole."""
    borders = borders or _Borders()
    texts = filter(None, texts)
    head = next(texts, "")
    if not head:
        return
    texts = chain([head], texts)
    if separator:
        marked = _mark_separators(texts, separator, borders)
    elif format == "wikitext" or is_wikitext(head, format):
        marked = _mark_titles(_lines(texts), borders)
    else:
        marked = ((index == 0, text) for index, text in enumerate(texts))
    yield from _group(marked)


def _group(marked: Iterator[tuple[bool, str]]) -> Iterator[Iterator[str]]:
    """Documents from strings that are marked True where one begins."""
    pending = next(marked, None)

    def document() -> Iterator[str]:
        nonlocal pending
        while pending is not None:
            _, text = pending
            pending = next(marked, None)
            yield text
            if pending is not None and pending[0]:
                return

    while pending is not None:
        yield document()


def _mark_separators(texts: Iterable[str], separator: str, borders: _Borders) -> Iterator[tuple[bool, str]]:
    """A document begins after each separator, unless only white space is left of the file."""
    held, begins = "", True
    for text in texts:
        held += text
        start = 0
        while (index := held.find(separator, start)) >= 0 and _SOMETHING.search(held, index + len(separator)):
            yield begins, held[start : index + len(separator)]
            start, begins, borders.found = index + len(separator), True, True
        borders.found |= index >= 0
        # Without another separator all is decided but its possible beginning, and white space that may end the file.
        safe = len(held) - len(separator) + 1
        if index < 0 and _SOMETHING.search(held, start, max(start, safe)):
            yield begins, held[start:safe]
            start, begins = safe, False
        held = held[start:]
    if held:
        yield begins, held


def _lines(texts: Iterable[str]) -> Iterator[str]:
    held = ""
    for text in texts:
        *lines, held = (held + text).split("\n")
        for line in lines:
            yield line + "\n"
    if held:
        yield held


def _mark_titles(lines: Iterator[str], borders: _Borders) -> Iterator[tuple[bool, str]]:
    """A document begins at a title line between two empty ones; what comes before the first belongs to it."""
    before, line, titles, first = "\n", next(lines, ""), 0, True
    for after in chain(lines, [""]):
        title = line.startswith(" = ") and before in _EMPTY_LINES and is_wikitext("\n" + line + after, "wikitext")
        titles += title
        borders.found |= title
        yield first or (title and titles > 1), line
        before, line, first = line, after, False


def _decoded(file: Path) -> Iterator[str]:
    opener = _OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rb") as stream:
            yield from decode_stream(cast(BinaryIO, stream), repr(str(file)))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}): check the file and its permissions") from error


def _head(file: Path) -> bytes:
    opener = _OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rb") as stream:
            return cast(BinaryIO, stream).read(BINARY_PROBE_BYTES)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}): check the file and its permissions") from error


def _decode(decoder: codecs.IncrementalDecoder, raw: bytes, offset: int, name: str) -> Iterator[str]:
    try:
        text = decoder.decode(raw, final=not raw)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 (byte 0x{error.object[error.start]:02x} near offset {offset + error.start}): "
            "convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error
    if text:
        yield text
