"""Files and folders: what is read, what is left out, and what the user is told."""

import gzip
import logging
import lzma

import pytest

from phase2_jax.data.reading import list_files, read_texts
from phase2_jax.errors import UserError

TEXT = "Es war einmal – ein Brunnen.\n"


def read_one(path):
    return read_texts(list_files(path, "data.path"), "data.path")


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.md", bytes), ("a.txt.gz", gzip.compress), ("a.XZ", lzma.compress)]
)
def test_plain_and_compressed_files_give_the_same_text(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(TEXT.encode()))
    assert read_one(tmp_path / name) == [TEXT]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_one(tmp_path / "a.txt") == [TEXT]


def test_carriage_returns_survive(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read_one(tmp_path / "a.txt") == ["one\r\ntwo\r\n"]


def test_a_folder_is_read_in_sorted_order_without_hidden_empty_and_binary_files(tmp_path, caplog):
    for name, content in {
        "b.txt": b"second",
        "a/z.txt": b"first",
        "c.gz": gzip.compress(b"third"),
        ".hidden": b"no",
        ".git/config": b"no",
        "empty.txt": b"",
        "image.png": b"\x89PNG\0\0",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_one(tmp_path) == ["first", "second", "third"]
    assert "Left out 1 binary file(s)" in caplog.text
    assert "image.png" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", "naïve".encode("latin-1"), r"not UTF-8 \(byte 0xef at offset 2\): convert it, e\.g\. iconv"),
        ("a.txt", TEXT.encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.txt", TEXT.encode("utf-32"), "UTF-32, not UTF-8"),
        ("a.bin", b"\x7fELF\0\0\0", "looks binary"),
        ("a.gz", gzip.compress(b"x" * 1000)[:-9], "cannot be read"),
        ("a.gz", b"not gzip at all", "cannot be read"),
        ("a.xz", lzma.compress(bytes(range(256)) * 4)[:-12], "cannot be read"),
    ],
    # Names of our own: one made of the content would carry the time in a gzip header, and differ between workers.
    ids=["empty", "latin-1", "utf-16", "utf-32", "binary", "cut-gz", "no-gz", "cut-xz"],
)
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_one(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_undecodable_file_in_a_folder_is_refused_and_not_skipped(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"bad\.txt' is not UTF-8"):
        read_one(tmp_path)
    # Text with zero bytes, which would otherwise pass for binary.
    (tmp_path / "bad.txt").write_bytes(TEXT.encode("utf-16"))
    with pytest.raises(UserError, match=r"bad\.txt' is UTF-16"):
        read_one(tmp_path)


def test_a_missing_path_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.path='.*nowhere' does not exist"):
        read_one(tmp_path / "nowhere")
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UserError, match="folder without text files"):
        read_one(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"\0\1\2")
    with pytest.raises(UserError, match="all 2 files in it are binary"):
        read_one(tmp_path)
