"""Text that comes and goes in pieces is the text."""

import gzip
import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.data.documents import split_text
from phase2_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, WordTokenizer
from phase2_jax.errors import UserError
from phase2_jax.inference.text_pieces import encode_pieces
from phase2_jax.inference.text_source import decode_stream, read_documents, split_documents
from phase2_jax.inference.text_streams import StopStrings, TextStream

BYTES = ByteTokenizer()
WORDS = WordTokenizer.train(["a bb ccc é\n"])
SENTENCES = st.lists(st.sampled_from(["a", "bb", "ccc", " ", "\n", "\n\n", "é", "unknown"]), max_size=30).map("".join)


def cut(text: str, lengths: list[int]) -> list[str]:
    """`text` in pieces of these lengths, repeated."""
    pieces, start, turn = [], 0, 0
    while start < len(text):
        pieces.append(text[start : start + lengths[turn % len(lengths)]])
        start, turn = start + len(pieces[-1]), turn + 1
    return pieces


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(st.text(), st.integers(0, 20))
def test_a_stream_of_bytes_gives_the_text(text, context):
    raw = BYTES.encode(text)
    stream = TextStream(BYTES, BYTES.encode("é" * 9)[: 2 * context].tolist())
    assert "".join([stream.push(token) for token in raw.tolist()] + [stream.flush()]) == text


def test_no_character_comes_in_halves():
    stream = TextStream(BYTES)
    assert [stream.push(token) for token in BYTES.encode("é€a").tolist()] == ["", "é", "", "", "€", "a"]


def test_bytes_that_are_no_text_come_out_marked():
    stream = TextStream(BYTES)
    pieces = [stream.push(0xFF) for _ in range(20)] + [stream.flush()]
    assert "".join(pieces) == "\ufffd" * 20
    assert pieces[7] == "\ufffd" * 8


@given(st.lists(st.integers(0, WORDS.vocab_size - 1), max_size=12), st.integers(0, 12))
def test_a_stream_of_words_has_its_spaces(tokens, start):
    """What continues a text joins it as if both had been decoded at once."""
    before = WORDS.decode(tokens[:start])
    stream = TextStream(WORDS, tokens[:start])
    rest = "".join([stream.push(token) for token in tokens[start:]] + [stream.flush()])
    assert before + rest == WORDS.decode(tokens)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    # Of several stop strings the one that is complete first ends the text.
    ends = [(index + len(stop), index) for stop in stops if (index := text.find(stop)) >= 0]
    expected = text[: min(start for end, start in ends if end == min(ends)[0])] if ends else text
    matcher, shown = StopStrings(stops), ""
    for character in text:
        piece, stopped = matcher.push(character)
        shown += piece
        if stopped:
            break
    else:
        shown += matcher.flush()
    assert shown == expected


def test_text_is_held_back_no_longer_than_needed():
    matcher = StopStrings(["stop", "step"])
    assert [matcher.push(text) for text in ("a s", "t", "o", "rm", "st", "ep!")] == [
        ("a ", False),
        ("", False),
        ("", False),
        ("storm", False),
        ("", False),
        ("", True),
    ]


@given(SENTENCES, LENGTHS, st.integers(1, 6))
def test_pieces_have_the_tokens_of_the_whole(text, lengths, piece_characters):
    for tokenizer in (BYTES, WORDS):
        pieces = list(encode_pieces(cut(text, lengths), tokenizer, piece_characters))
        tokens = np.concatenate([piece.tokens for piece in pieces]) if pieces else np.zeros(0)
        # A word longer than sixteen pieces would be cut; none is.
        if tokenizer is BYTES or piece_characters > 1:
            np.testing.assert_array_equal(tokens, tokenizer.encode(text))
        assert sum(piece.num_words for piece in pieces) == len(text.split())
        assert sum(piece.num_bytes for piece in pieces) == len(text.encode())
        assert [piece.begins_document for piece in pieces] == [index == 0 for index in range(len(pieces))]


def test_unknown_words_lose_text():
    (known,), (unknown,) = (list(encode_pieces([text], WORDS)) for text in ("a bb\n", "a dd\n"))
    assert known.lossless
    assert not unknown.lossless


def documents_of(pieces: list[str], format: str, separator: str) -> list[str]:
    return ["".join(document) for document in split_documents(pieces, format, separator)]


@given(st.text("a \n", max_size=25), st.sampled_from(["\n\n", "a", " a", "aa\n"]), LENGTHS)
def test_separators_split_as_in_training(text, separator, lengths):
    expected = [document for document in split_text(text, "text", separator) if document]
    assert documents_of(cut(text, lengths), "text", separator) == expected


LINES = st.lists(st.sampled_from([" = A = \n", " = = B = = \n", " \n", "\n", "text\n", " = a = b\n"]), max_size=14)


@given(LINES.map("".join), LENGTHS, st.sampled_from(["wikitext", "text"]))
def test_articles_are_found_as_in_training(text, lengths, format):
    expected = [document for document in split_text(text, format, "") if document]
    assert documents_of(cut(text, lengths), format, "") == expected


def test_articles_are_recognised_at_the_beginning():
    text = " \n = A = \n \n text \n \n = B = \n \n more \n"
    assert documents_of([text], "auto", "") == split_text(text, "auto", "")
    assert len(split_text(text, "auto", "")) == 2


def test_files_of_every_kind(tmp_path):
    (tmp_path / "1.txt").write_bytes(b"\xef\xbb\xbfplain \xc3\xa9")
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "3.txt.xz").write_bytes(lzma.compress(b"also packed"))
    (tmp_path / "4.bin").write_bytes(b"\0\1")
    texts = ["".join(document) for document in read_documents(tmp_path, "auto", "")]
    assert texts == ["plain é", "packed", "also packed"]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("binary.txt", b"a\0b", "looks binary"),
        ("wide.txt", "wide".encode("utf-16"), "is UTF-16, not UTF-8: convert it, e.g. iconv -f UTF-16"),
        ("latin.txt", b"caf\xe9 au lait", "not UTF-8 (byte 0xe9 near offset 3)"),
        ("cut.txt", b"caf\xc3", "not UTF-8"),
        ("damaged.txt.gz", gzip.compress(b"packed text")[:-9], "cannot be read"),
        ("damaged.txt.xz", lzma.compress(b"packed text")[:-9], "cannot be read"),
    ],
    # Ids made from the bytes would differ between test workers: gzip stores the time.
    ids=["binary", "utf-16", "latin", "cut", "gzip", "xz"],
)
def test_files_that_are_no_text(tmp_path, name, raw, said):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as caught:
        ["".join(document) for document in read_documents(tmp_path / name, "auto", "")]
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_folder_is_read_as_in_training(tmp_path, caplog):
    (tmp_path / "1.txt").write_text("text")
    (tmp_path / "2.bin").write_bytes(b"\0\1")
    assert len(list(map("".join, read_documents(tmp_path, "auto", "")))) == 1
    assert "Left out 1 binary file(s)" in caplog.text
    (tmp_path / "3.txt").write_bytes("wide".encode("utf-16"))
    with pytest.raises(UserError, match=r"3\.txt' is UTF-16"):
        list(map("".join, read_documents(tmp_path, "auto", "")))


@pytest.mark.parametrize(
    ("text", "format", "separator", "said"),
    [
        ("a b", "auto", "||", r"--document_separator='\|\|' does not occur in --data"),
        ("a||b", "auto", "||", None),
        ("a||\n", "auto", "||", None),
        ("a b", "wikitext", "", r"--format='wikitext', but --data has no title line"),
        ("\n = A = \n\n text", "wikitext", "", None),
    ],
)
def test_borders_that_were_asked_for_have_to_be_there(tmp_path, monkeypatch, text, format, separator, said):
    monkeypatch.setattr("phase2_jax.inference.text_source.CHUNK_BYTES", 2)
    # In any of the files.
    for name, content in (("1.txt", "c d"), ("2.txt", text)):
        (tmp_path / name).write_text(content)
    read = lambda **how: list(map("".join, read_documents(tmp_path, format, separator, **how)))  # noqa: E731
    assert "".join(read()) == "c d" + text
    if said is None:
        assert "".join(read(insist=True)) == "c d" + text
    else:
        with pytest.raises(UserError, match=said):
            read(insist=True)


def test_what_is_not_there(tmp_path):
    for path, said in ((tmp_path / "absent.txt", "does not exist"), (tmp_path, "without text files")):
        with pytest.raises(UserError, match=said):
            list(read_documents(path, "auto", ""))


def test_characters_may_be_cut_by_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("phase2_jax.inference.text_source.CHUNK_BYTES", 2)
    file = tmp_path / "text"
    file.write_text("aé€b", encoding="utf-8")
    with file.open("rb") as stream:
        assert "".join(decode_stream(stream, "text")) == "aé€b"


def test_pieces_have_the_tokens_of_a_byte_level_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    lines = [("  " * (n % 3)) + f"Line {n}, café “{n % 7}”.\n" + "\n\n" * (n % 2) for n in range(60)]
    text = "".join(lines) + "日本 😀"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    mine = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = list(encode_pieces(cut(text, [7, 100]), mine, 50))
    assert len(pieces) > 10
    assert all(piece.lossless for piece in pieces)
    tokens = np.concatenate([piece.tokens for piece in pieces])
    np.testing.assert_array_equal(tokens, mine.encode(text))
    stream = TextStream(mine, tokens[:5].tolist())
    rest = "".join([stream.push(token) for token in tokens[5:].tolist()] + [stream.flush()])
    assert mine.decode(tokens[:5]) + rest == text
