"""Document boundaries and the part held back: nothing lost, nothing twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.data import documents as documents_module
from phase2_jax.data.documents import hold_back, is_wikitext, shipped_documents, split_text
from phase2_jax.errors import UserError

# Made up for this test, in the layout of the WikiText files.
WIKITEXT = (
    " \n = Copper kettle = \n \n A copper kettle is a <unk> vessel . \n \n = = Use = = \n \n It boils water . \n"
    " = Goals ; A = \n \n more of the table \n \n = not a title = \n because text follows . \n \n"
    " = = nor this = \n \n = nor that = = \n \n"
    " = Second = article = \n \n Text of the second . \n"
)


def test_the_shipped_works_begin_and_end_where_they_should():
    alice, as_you_like_it, paradise_lost = shipped_documents()
    assert alice.startswith("ALICE'S ADVENTURES IN WONDERLAND\n")
    assert alice.endswith("THE END\n\n\n")
    assert as_you_like_it.startswith("AS YOU LIKE IT\n\n\n\tDRAMATIS PERSONAE")
    assert as_you_like_it.endswith("[Exeunt]\n\n\n")
    assert paradise_lost.startswith("Book I\n\n\nOf Man's first disobedience")
    assert paradise_lost.endswith("Through Eden took their solitary way.\n")
    assert [len(alice), len(as_you_like_it), len(paradise_lost)] == [148_462, 125_174, 456_838]


def test_an_altered_shipped_text_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "works.json").write_text('{"file": "a.txt", "sha256": "00", "works": []}')
    (tmp_path / "text" / "a.txt").write_text("converted\r\n")
    monkeypatch.setattr(documents_module.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match="was altered"):
        shipped_documents()


def test_wikitext_articles_begin_at_titles_and_only_there():
    articles = split_text(WIKITEXT, "auto", "")
    assert "".join(articles) == WIKITEXT
    assert [article.strip().partition(" \n")[0] for article in articles] == [
        "= Copper kettle =",
        "= Second = article =",
    ]
    assert articles[0].startswith(" \n = Copper")
    assert articles[1].startswith(" = Second")


def test_wikitext_is_recognised_by_its_first_line_unless_the_format_says_otherwise():
    assert split_text(WIKITEXT, "text", "") == [WIKITEXT]
    preface = "A preface.\n" + WIKITEXT
    assert split_text(preface, "auto", "") == [preface]
    assert len(split_text(preface, "wikitext", "")) == 2
    assert split_text(WIKITEXT.replace("\n", "\r\n"), "auto", "")[1].startswith(" = Second")
    assert not is_wikitext("No title here.\n", "wikitext")


def test_a_separator_ends_its_document_and_stays():
    assert split_text("one<|end|>\ntwo<|end|>\n", "auto", "<|end|>") == ["one<|end|>", "\ntwo<|end|>\n"]
    assert split_text("one<|end|>two", "auto", "<|end|>") == ["one<|end|>", "two"]
    assert split_text("one", "auto", "<|end|>") == ["one"]


@given(st.text(alphabet="ab|\n ", max_size=60), st.sampled_from(["|", "||", "a|"]))
def test_splitting_at_a_separator_loses_nothing(text, separator):
    pieces = split_text(text, "auto", separator)
    assert "".join(pieces) == text
    assert all(pieces)


def test_one_document_gives_its_end():
    train, valid = hold_back(["abcdefghij"], 0.1)
    assert (train, valid) == (["abcdefghi"], ["j"])


def test_the_split_of_a_single_text_is_the_customary_one():
    # int(0.9 n), the split that published figures for tinyshakespeare (n = 1,115,394) use.
    (train,), (valid,) = hold_back(["x" * 1_115_394], 0.1)
    assert (len(train), len(valid)) == (1_003_854, 111_540)


def test_many_documents_give_whole_ones_from_all_over_the_corpus():
    texts = [f"{i:03d}." for i in range(100)]
    train, valid = hold_back(texts, 0.1)
    assert sorted(train + valid) == texts
    assert [int(text[:3]) for text in valid] == list(range(9, 100, 10))


def test_few_documents_give_the_end_of_each():
    train, valid = hold_back(["a" * 10, "b" * 20], 0.1)
    assert (train, valid) == (["a" * 9, "b" * 18], ["a", "bb"])
    # A tiny last document alone would be no validation set.
    train, valid = hold_back(["a" * 1000, "b" * 1000, "c" * 10], 0.1)
    assert [len(text) for text in valid] == [100, 100, 1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_held_back_text_and_training_text_are_a_partition(sizes, fraction):
    numbers = iter(range(10**6))
    texts = ["".join(chr(0x4E00 + next(numbers)) for _ in range(size)) for size in sizes]
    train, valid = hold_back(texts, fraction)
    assert sorted("".join(train + valid)) == sorted("".join(texts))
    assert not set("".join(train)) & set("".join(valid))
    # Each cut rounds one character in favour of validation.
    assert sum(map(len, valid)) <= fraction * sum(sizes) + len(sizes)
