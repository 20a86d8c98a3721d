"""Text of any length from files, document by document, without ever holding a whole file."""

import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from phase2_jax.data.documents import is_wikitext
from phase2_jax.data.reading import list_files
from phase2_jax.errors import UserError

CHUNK_BYTES = 1 << 20
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_PROBE_BYTES = 8192
_SOMETHING = re.compile(r"\S")
_EMPTY_LINES = ("\n", " \n", "\r\n", " \r\n")


def read_documents(path: Path, format: str, separator: str) -> Iterator[Iterable[str]]:
    """Documents of a file or of all files of a folder, each as strings that follow each other.

    What counts as a document is what training counts (`docs/data.md`). A document has to be used up before the next is
    asked for.

    Args:
      path: a text file, plain, .gz or .xz, or a folder of such files, of which binary ones are left out.
      format: "auto", "text" or "wikitext".
      separator: ends a document and stays with it; empty for none.

    Raises:
      UserError: nothing is there, a file cannot be read, is not UTF-8 or holds no text, or nothing is.
    """
    files = list_files(path, "--data")
    alone = len(files) == 1
    texts = [file for file in files if alone or not _is_binary(file)]
    if not texts:
        raise UserError(f"--data={path} is a folder without text files: all {len(files)} files in it are binary")
    for file in texts:
        yield from split_documents(_decoded(file), format, separator)


def decode_stream(stream: BinaryIO, name: str) -> Iterator[str]:
    """Strings of some size from a stream of UTF-8.

    Raises:
      UserError: it is not UTF-8, or looks binary.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    while raw := stream.read(CHUNK_BYTES):
        if b"\0" in raw[:_PROBE_BYTES]:
            raise UserError(f"{name} looks binary: give UTF-8 text, plain or as .gz or .xz")
        yield from _decode(decoder, raw, offset, name)
        offset += len(raw)
    yield from _decode(decoder, b"", offset, name)


def split_documents(texts: Iterable[str], format: str, separator: str) -> Iterator[Iterator[str]]:
    """Documents of one file that comes in strings; the same as `data.documents.split_text` finds in the whole."""
    texts = filter(None, texts)
    head = next(texts, "")
    if not head:
        return
    texts = chain([head], texts)
    if separator:
        marked = _mark_separators(texts, separator)
    elif format == "wikitext" or is_wikitext(head, format):
        marked = _mark_titles(_lines(texts))
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


def _mark_separators(texts: Iterable[str], separator: str) -> Iterator[tuple[bool, str]]:
    """A document begins after each separator, unless only white space is left of the file."""
    held, begins = "", True
    for text in texts:
        held += text
        start = 0
        while (index := held.find(separator, start)) >= 0 and _SOMETHING.search(held, index + len(separator)):
            yield begins, held[start : index + len(separator)]
            start, begins = index + len(separator), True
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


def _mark_titles(lines: Iterator[str]) -> Iterator[tuple[bool, str]]:
    """A document begins at a title line between two empty ones; what comes before the first belongs to it."""
    before, line, titles, first = "\n", next(lines, ""), 0, True
    for after in chain(lines, [""]):
        title = line.startswith(" = ") and before in _EMPTY_LINES and is_wikitext("\n" + line + after, "wikitext")
        titles += title
        yield first or (title and titles > 1), line
        before, line, first = line, after, False


def _decoded(file: Path) -> Iterator[str]:
    opener = _OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rb") as stream:
            yield from decode_stream(cast(BinaryIO, stream), repr(str(file)))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}): check the file and its permissions") from error


def _is_binary(file: Path) -> bool:
    opener = _OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rb") as stream:
            return b"\0" in cast(BinaryIO, stream).read(_PROBE_BYTES)
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
