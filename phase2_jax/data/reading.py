"""Text files from disk: plain, gzip or xz, single or in folders, always UTF-8."""

import codecs
import gzip
import logging
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from phase2_jax.errors import UserError

_DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress}
# Text never holds NUL, while nearly every binary format has one early; the first block decides, as in grep and git.
BINARY_PROBE_BYTES = 8192
# UTF-32's little-endian mark begins with UTF-16's, so it is asked for first.
_FOREIGN_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def list_files(path: Path, option: str) -> list[Path]:
    """The file itself, or every visible non-empty file below a folder, sorted by relative path.

    Args:
      path: a file or a folder.
      option: the configuration key that named it, for messages.

    Raises:
      UserError: nothing is there, or the folder holds no file to read.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{option}={str(path)!r} does not exist: give a text file or a folder of text files")
    found = [file for file in path.rglob("*") if file.is_file() and _is_visible(file.relative_to(path))]
    files = sorted((file for file in found if file.stat().st_size), key=lambda file: file.relative_to(path).parts)
    if not files:
        raise UserError(
            f"{option}={str(path)!r} is a folder without text files: put text files there (plain, .gz or .xz)"
        )
    return files


def read_texts(files: list[Path], option: str) -> list[str]:
    """Decoded contents of `files`. One file must be text; of several, binary ones are left out with a log line.

    Raises:
      UserError: a file is empty, unreadable, damaged, or not UTF-8, or no file is text.
    """
    if len(files) == 1:
        return [_decode(_read_bytes(files[0]), files[0])]
    texts, skipped = [], []
    for file in files:
        raw = _read_bytes(file)
        if looks_binary(raw):
            skipped.append(file)
        elif raw:
            texts.append(_decode(raw, file))
    say_left_out(skipped)
    if not texts:
        raise UserError(f"{option} is a folder without text files: all {len(files)} files in it are binary or empty")
    return texts


def _is_visible(relative: Path) -> bool:
    return not any(part.startswith(".") for part in relative.parts)


def _read_bytes(file: Path) -> bytes:
    decompress = _DECOMPRESSORS.get(file.suffix.lower(), bytes)
    try:
        return decompress(file.read_bytes())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}): check the file and its permissions") from error


def say_left_out(files: list[Path]) -> None:
    """A log line about the binary files of a folder."""
    if files:
        names = ", ".join(map(str, files[:5]))
        logging.getLogger(__name__).warning("Left out %d binary file(s): %s", len(files), names)


def looks_binary(head: bytes) -> bool:
    """Whether a file that begins so is no text in any encoding."""
    return b"\0" in head[:BINARY_PROBE_BYTES] and not _foreign_encoding(head)


def check_text(head: bytes, name: str) -> None:
    """Raise UserError where a text that begins so is marked as another encoding than UTF-8, or is binary."""
    if encoding := _foreign_encoding(head):
        raise UserError(f"{name} is {encoding}, not UTF-8: convert it, e.g. iconv -f {encoding} -t utf-8")
    if looks_binary(head):
        raise UserError(f"{name} looks binary: give UTF-8 text, plain or as .gz or .xz")


def _foreign_encoding(raw: bytes) -> str:
    return next((name for mark, name in _FOREIGN_MARKS.items() if raw.startswith(mark)), "")


def _decode(raw: bytes, file: Path) -> str:
    if not raw:
        raise UserError(f"{str(file)!r} is empty: give a file with text in it")
    check_text(raw, repr(str(file)))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(file)!r} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}): "
            "convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error
