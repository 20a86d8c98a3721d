"""From a configuration to token streams."""

import sys
import types

import numpy as np
import pytest

from phase2_jax.data import ByteTokenizer, DataConfig, TokenStream, WordTokenizer, encode_documents, load_corpus
from phase2_jax.data.documents import shipped_documents
from phase2_jax.errors import UserError

ARTICLE = " = Kettle {} = \n \n The kettle number {} boils . \n \n = = Use = = \n \n Tea . \n \n"


def text_of(corpus, stream):
    """The documents of a stream as text."""
    pieces = np.split(stream.tokens, stream.document_starts[1:])
    return [corpus.tokenizer.decode(piece) for piece in pieces]


def test_the_shipped_text_never_holds_back_a_whole_work():
    corpus = load_corpus(DataConfig(valid_fraction=0.8))
    assert len(corpus.train.document_starts) == len(corpus.valid.document_starts) == 3


def test_the_shipped_text_holds_back_the_end_of_each_work():
    corpus = load_corpus(DataConfig())
    assert (len(corpus.train), len(corpus.valid)) == (657_425, 73_049)
    assert (corpus.train.num_bytes, corpus.valid.num_bytes) == (657_425, 73_049)
    works = zip(text_of(corpus, corpus.train), text_of(corpus, corpus.valid), shipped_documents(), strict=True)
    for train, valid, work in works:
        assert train + valid == work
        assert len(train) == int(0.9 * len(work))
    assert corpus.train.tokens.dtype == np.int32
    assert corpus.train.document_starts.dtype == np.int64
    corpus.train.check_vocabulary(256)


def test_each_file_of_a_folder_is_a_document(tmp_path):
    for index in range(20):
        (tmp_path / f"{index:02d}.txt").write_text(f"file {index:02d}")
    corpus = load_corpus(DataConfig(path=str(tmp_path)))
    assert text_of(corpus, corpus.valid) == ["file 09", "file 19"]
    assert len(corpus.train.document_starts) == 18


def test_wikitext_with_words_gives_articles_and_the_vocabulary_of_the_training_text(tmp_path):
    (tmp_path / "train.txt").write_text(" \n" + "".join(ARTICLE.format(i, i) for i in "abc"))
    (tmp_path / "valid.txt").write_text(" \n" + ARTICLE.format("d", "a"))
    config = DataConfig(
        path=str(tmp_path / "train.txt"), valid_path=str(tmp_path / "valid.txt"), tokenizer="words", format="wikitext"
    )
    corpus = load_corpus(config)
    # An article has 17 words and 8 lines; the empty first line belongs to the first article.
    assert corpus.train.document_starts.tolist() == [0, 26, 51]
    assert len(corpus.train) == 3 * 25 + 1
    assert corpus.tokenizer.vocab_size == len(set((tmp_path / "train.txt").read_text().split()) | {"<eos>", "<unk>"})
    assert text_of(corpus, corpus.valid)[0].startswith("\n= Kettle <unk> =\n\nThe kettle number a boils")


def test_a_separator_makes_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one|two|three|four")
    config = DataConfig(path=str(tmp_path / "a.txt"), document_separator="|", valid_fraction=0.3)
    corpus = load_corpus(config)
    assert text_of(corpus, corpus.train) + text_of(corpus, corpus.valid) == ["one|", "two|", "three|", "four"]


def test_num_bytes_counts_utf8(tmp_path):
    (tmp_path / "a.txt").write_text("äöü" * 10, encoding="utf-8")
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.txt")))
    assert (corpus.train.num_bytes, corpus.valid.num_bytes) == (54, 6)


def test_a_stored_tokenizer_can_be_used_instead(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four\n" * 5)
    stored = WordTokenizer.train(["one two\n"])
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.txt"), tokenizer="words"), stored)
    assert corpus.tokenizer is stored
    assert "<unk>" in stored.decode(corpus.train.tokens)


def test_validation_files_inside_the_training_folder_are_not_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "v.txt").write_text("valid")
    corpus = load_corpus(DataConfig(path=str(tmp_path), valid_path=str(tmp_path / "v.txt")))
    assert text_of(corpus, corpus.train) == ["train"]
    with pytest.raises(UserError, match="give different text for validation"):
        load_corpus(DataConfig(path=str(tmp_path / "v.txt"), valid_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("plain text", {"format": "wikitext"}, r"data\.path has no title line"),
        ("plain text", {"document_separator": "<|end|>"}, r"'<\|end\|>' does not occur in data\.path"),
        ("plain text", {"tokenizer": "missing.json"}, "cannot be read"),
        (" \n\t ", {"tokenizer": "words"}, "gives no token"),
        ("x", {}, "there is no training text"),
        ("plain text", {"valid_path": "missing.txt"}, r"data\.valid_path='missing\.txt' does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, content, changes, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(DataConfig(path=str(tmp_path / "a.txt"), **changes))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_too_small_is_named():
    stream = encode_documents(ByteTokenizer(), ["az"])
    stream.check_vocabulary(123)
    with pytest.raises(
        UserError, match=r"token id 122, outside the vocabulary of 122: set model\.vocab_size to .* 123"
    ):
        stream.check_vocabulary(122)
    with pytest.raises(UserError, match="outside the vocabulary"):
        TokenStream(np.array([-1, 3], np.int32), np.zeros(1, np.int64), 2).check_vocabulary(10)


def test_empty_documents_leave_no_boundary():
    stream = encode_documents(WordTokenizer.train(["a b"]), ["a b", "  ", "b"])
    assert stream.document_starts.tolist() == [0, 2]
    assert stream.is_document_start(np.array([[0, 1], [2, 3]])).tolist() == [[True, False], [True, False]]


class _Rows(list):
    column_names: tuple[str, ...] = ("text",)

    def __getitem__(self, key):
        return list(self) if key == "text" else super().__getitem__(key)


def _pretend_datasets(monkeypatch, load_dataset):
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_rows_of_a_hub_data_set_are_documents(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return {"train": _Rows(["one", "", "two"]), "validation": _Rows(["three"])}

    _pretend_datasets(monkeypatch, load_dataset)
    corpus = load_corpus(DataConfig(dataset="someone/stories:small"))
    assert asked == [("someone/stories", "small")]
    assert text_of(corpus, corpus.train) == ["one", "two"]
    assert text_of(corpus, corpus.valid) == ["three"]


def test_rows_that_are_lines_of_wikitext_become_articles(monkeypatch):
    lines = ["", *"".join(ARTICLE.format(i, i) for i in "ab").replace(" \n \n", " \n\n").splitlines(keepends=True)]
    rows = _Rows(line if line.strip() else "" for line in lines)
    _pretend_datasets(monkeypatch, lambda *_: {"train": rows, "valid": rows})
    corpus = load_corpus(DataConfig(dataset="wikitext"))
    assert len(corpus.train.document_starts) == 2
    assert text_of(corpus, corpus.train)[1].startswith(" = Kettle b = \n\n")


def test_trouble_with_hub_data_sets_is_told(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("Couldn't reach the hub\nwith details")

    _pretend_datasets(monkeypatch, unreachable)
    with pytest.raises(UserError, match=r"data\.dataset='a' cannot be loaded \(Couldn't reach the hub\): check"):
        load_corpus(DataConfig(dataset="a"))
    _pretend_datasets(monkeypatch, lambda *_: {"test": _Rows(["x"])})
    with pytest.raises(UserError, match=r"no split 'train' \(it has test\)"):
        load_corpus(DataConfig(dataset="a"))
    images = _Rows(["x"])
    images.column_names = ("image", "label")
    _pretend_datasets(monkeypatch, lambda *_: {"train": images})
    with pytest.raises(UserError, match=r"no column 'text' \(it has image, label\)"):
        load_corpus(DataConfig(dataset="a"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "phase2-jax\[datasets\]"'):
        load_corpus(DataConfig(dataset="a"))
