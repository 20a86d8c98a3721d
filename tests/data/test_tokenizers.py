"""Text to ids and back, and the same tokenizer again from its JSON."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.data import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    WordTokenizer,
    from_json,
    load_tokenizer,
    save_tokenizer,
)
from phase2_jax.data import tokenizers as tokenizers_module
from phase2_jax.data.tokenizers import NumberTokenizer
from phase2_jax.errors import UserError

LINES = " \n = Kettle = \n a kettle , a <unk> \n"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_come_back(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.int32
    assert len(ids) == len(text.encode())
    assert ByteTokenizer().decode(ids) == text


def test_half_a_character_and_bad_text_are_handled():
    assert ByteTokenizer().decode([0xE2, 0x82]) == "�"
    with pytest.raises(UserError, match="not valid Unicode at character 1"):
        ByteTokenizer().encode("a\udcff")


def test_words_follow_the_wikitext_convention():
    tokenizer = WordTokenizer.train([LINES])
    # <eos> three times; then ties in alphabetical order.
    assert json.loads(tokenizer.to_json())["words"] == ["<eos>", "=", "a", ",", "<unk>", "Kettle", "kettle"]
    assert tokenizer.encode(LINES).tolist() == [0, 1, 5, 1, 0, 2, 6, 3, 2, 4, 0]
    assert tokenizer.encode("a teapot").tolist() == [2, 4]
    assert tokenizer.decode(tokenizer.encode(LINES)) == "\n= Kettle =\na kettle , a <unk>\n"
    assert tokenizer.encode("").tolist() == []


@given(st.text(alphabet="ab \n\t\r ", max_size=80), st.integers(1, 9))
def test_words_do_not_depend_on_how_text_is_cut_into_pieces(text, size):
    tokenizer = WordTokenizer.train(["a b aa bb ab ba\n"])
    whole, vocabulary = tokenizer.encode(text), WordTokenizer.train([text]).to_json()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers_module, "_PIECE_CHARACTERS", size)
        np.testing.assert_array_equal(tokenizer.encode(text), whole)
        assert WordTokenizer.train([text]).to_json() == vocabulary
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(whole)), whole)


@pytest.fixture(scope="module")
def tokenizer_json():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LINES * 20], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    return tokenizer.to_str()


def test_a_hugging_face_tokenizer_neither_truncates_nor_pads_nor_adds(tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    tokenizer = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = LINES * 3 + "Übermut<|end|>"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) > 8
    assert ids[-1] == 0
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("").tolist() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"model": {}}', "not a usable tokenizer.json"),
    ],
)
def test_a_bad_tokenizer_file_is_refused(tmp_path, content, message):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        HuggingFaceTokenizer.from_file(str(path))


def test_the_missing_extra_is_named(tokenizer_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r'pip install "phase2-jax\[tokenizers\]"'):
        HuggingFaceTokenizer(json.loads(tokenizer_json), "tokenizer.json")


def test_tokenizers_survive_a_file(tokenizer_json, tmp_path):
    made = [
        ByteTokenizer(),
        WordTokenizer.train([LINES]),
        HuggingFaceTokenizer(json.loads(tokenizer_json), "mine.json"),
    ]
    for tokenizer in made:
        save_tokenizer(tokenizer, tmp_path / "stored.json")
        again = load_tokenizer(tmp_path / "stored.json")
        assert type(again) is type(tokenizer)
        assert (again.name, again.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
        assert again.fingerprint() == tokenizer.fingerprint()
        np.testing.assert_array_equal(again.encode(LINES), tokenizer.encode(LINES))
    assert len({tokenizer.fingerprint() for tokenizer in made}) == 3
    assert WordTokenizer.train(["other"]).fingerprint() != made[1].fingerprint()


def test_the_file_a_run_keeps_is_no_tokenizer_json(tmp_path):
    file = tmp_path / "tokenizer.json"
    for tokenizer, said in (
        (ByteTokenizer(), "use data.tokenizer=bytes"),
        (WordTokenizer.train([LINES]), "use data.tokenizer=words"),
        (NumberTokenizer(9), "give the file it was made from"),
    ):
        save_tokenizer(tokenizer, file)
        with pytest.raises(UserError) as caught:
            HuggingFaceTokenizer.from_file(str(file))
        assert f"data.tokenizer={str(file)!r} is what a run keeps of its own tokenizer" in str(caught.value)
        assert said in str(caught.value)


def test_a_file_that_is_no_tokenizer_is_named_in_full(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=str(tmp_path / "tokenizer.json")):
        HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    "stored", ["{", "{}", '{"kind": "runes"}', '{"kind": "words"}', '{"kind": "words", "words": []}']
)
def test_a_damaged_stored_tokenizer_is_refused(stored):
    with pytest.raises(UserError):
        from_json(stored)


def test_ids_outside_the_vocabulary_are_named():
    with pytest.raises(UserError, match="token id 256 at position 1 is outside the vocabulary of 256"):
        ByteTokenizer().decode([0, 256])
    with pytest.raises(UserError, match="token id -1 at position 0"):
        WordTokenizer.train([LINES]).decode([-1])
