"""Continuing texts: seeds, stops, batches, and a memory that is kept."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from phase2_jax.data.tokenizers import WordTokenizer
from phase2_jax.errors import UserError
from phase2_jax.inference import GenerationConfig, Generator, TextState, load_model

GREEDY = GenerationConfig(max_tokens=20, temperature=0)
# Bytes of an untrained model are rarely text; what is drawn hardly matters here.
SAMPLED = GenerationConfig(max_tokens=20, temperature=1.0, seed=7)
# Two programs, or two cuttings of a text, differ by float32 rounding in logits of order 1.
CLOSE: dict[str, Any] = {"atol": 5e-5, "rtol": 5e-5}


@pytest.fixture(scope="module")
def generator(loaded) -> Generator:
    return Generator(loaded)


@pytest.fixture(scope="module")
def word_generator(write_run, tmp_path_factory) -> Generator:
    tokenizer = WordTokenizer.train(["a bb ccc dd e fff gg h\n"])
    return Generator(load_model(write_run(tmp_path_factory.mktemp("words") / "run", tokenizer=tokenizer)))


def assert_same_place(a: TextState, b: TextState) -> None:
    assert (a.num_tokens, a.context) == (b.num_tokens, b.context)
    np.testing.assert_allclose(a.logits_V, b.logits_V, **CLOSE)
    np.testing.assert_allclose(a.memory.w_BxHxKxV, b.memory.w_BxHxKxV, **CLOSE)


def test_the_seed_decides(generator):
    texts = [generator.generate("abc", GenerationConfig(20, temperature=1.0, seed=seed)).text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = [generator.generate("abc", GenerationConfig(20, temperature=1.0)).text for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_streaming_gives_the_text_in_pieces(generator):
    pieces = list(generator.stream(["abc"], SAMPLED))
    whole = generator.generate("abc", SAMPLED)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.end is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert whole.end.reason == "max_tokens"
    assert (whole.end.num_tokens, whole.end.state.num_tokens) == (20, 23)
    assert generator.timing.tokens == 20
    assert generator.timing.tokens_per_second > 0


@pytest.mark.slow
def test_a_stop_string_ends_the_text_and_the_memory(word_generator):
    whole = word_generator.generate("a bb", SAMPLED)
    words = whole.text.split(" ")
    stop = " ".join(words[5:7])
    index = whole.text.find(stop)
    config = GenerationConfig(20, temperature=1.0, seed=7, stop=("never", stop))
    stopped = word_generator.generate("a bb", config)
    assert stopped.text == whole.text[:index]
    assert stopped.end.reason == "stop"
    length = stopped.end.num_tokens
    assert length < 20
    # What the device wrote beyond the stop is not text.
    assert word_generator.timing.tokens == length
    shorter = word_generator.generate("a bb", GenerationConfig(length, temperature=1.0, seed=7))
    assert shorter.text == whole.text[: index + len(stop)]
    assert_same_place(stopped.end.state, shorter.end.state)


def test_a_text_may_be_read_in_parts(generator):
    book = "A long story. " * 30
    at_once = generator.generate(book + "And?", GREEDY)
    state = generator.read(iter([book[:100], book[100:]]))
    assert state.num_tokens == len(book)
    in_parts = generator.generate("And?", GREEDY, state=state)
    assert in_parts.text == at_once.text
    assert_same_place(in_parts.end.state, at_once.end.state)
    # The state is a value: asking does not change it.
    assert generator.generate("And?", GREEDY, state=state).text == in_parts.text


def test_writing_goes_on_where_it_stopped(generator):
    whole = generator.generate("abc", GREEDY)
    first = generator.generate("abc", GenerationConfig(8, temperature=0))
    rest = generator.generate("", GenerationConfig(12, temperature=0), state=first.end.state)
    assert first.text + rest.text == whole.text


@pytest.mark.slow
def test_each_prompt_of_a_batch_is_continued_as_alone(generator):
    prompts = ["abc", "another, longer prompt", "x"]
    texts = generator.generate_batch(prompts, GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        alone = generator.generate(prompt, GREEDY)
        assert text.text == alone.text
        assert_same_place(text.end.state, alone.end.state)
    stop = texts[1].text[3:5]
    stopped = generator.generate_batch(prompts, GenerationConfig(20, temperature=0, stop=(stop,)))
    assert stopped[1].end.reason == "stop"
    assert all(stop not in generation.text for generation in stopped)


@pytest.mark.slow
def test_the_repetition_penalty_acts_on_prompt_and_text(generator):
    config = GenerationConfig(30, temperature=0, repetition_penalty=1e6)
    prompt = bytes(range(32, 127)).decode()
    tokens = generator.loaded.tokenizer.encode(generator.generate(prompt, config).text.replace("\ufffd", ""))
    assert not set(tokens.tolist()) & set(prompt.encode())
    assert len(set(tokens.tolist())) == len(tokens)


@pytest.mark.slow
def test_words_continue_with_a_space(word_generator):
    text = word_generator.generate("a bb", SAMPLED).text
    assert text.startswith((" ", "\n"))
    assert "  " not in text
    with pytest.raises(UserError, match="the prompt is empty"):
        word_generator.generate("  ", GREEDY)


@pytest.mark.slow
def test_only_tokens_that_the_tokenizer_knows(write_run, model_config, tmp_path):
    generator = Generator(load_model(write_run(tmp_path / "run", model=replace(model_config, vocab_size=512))))
    # Every second draw would be unknown.
    assert generator.generate("abc", GenerationConfig(40, temperature=1e6, seed=0)).end.num_tokens == 40


def test_nothing_to_continue(generator):
    for prompts in ([], [""], [iter([])]):
        with pytest.raises(UserError, match="prompt"):
            list(generator.stream(prompts, GREEDY))
    with pytest.raises(UserError, match="--top_p=7"):
        generator.generate("abc", GenerationConfig(top_p=7))


def test_no_tokens_only_reads(generator):
    nothing = generator.generate("abc", GenerationConfig(0))
    assert (nothing.text, nothing.end.num_tokens) == ("", 0)
    assert_same_place(nothing.end.state, generator.read("abc"))


def test_a_saved_memory_goes_on_exactly(generator, tmp_path):
    state = generator.read("A book. " * 10)
    generator.save_state(state, tmp_path / "book.state")
    again = generator.load_state(tmp_path / "book.state")
    assert again.context == state.context
    for a, b in zip(np.asarray(again.logits_V), np.asarray(state.logits_V), strict=True):
        assert a == b
    assert generator.generate("Who?", SAMPLED, state=again) is not None
    texts = [generator.generate("Who?", SAMPLED, state=each).text for each in (state, again)]
    assert texts[0] == texts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["book.state"]


def test_states_that_are_refused(generator, tmp_path):
    generator.save_state(generator.read("abc"), tmp_path / "good")
    loaded = generator.loaded
    other = Generator(replace(loaded, params=jax.tree.map(lambda x: x + 1, loaded.params)))
    with pytest.raises(UserError, match="another model"):
        other.load_state(tmp_path / "good")
    raw = (tmp_path / "good").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for name, content in (("cut", raw[: len(raw) // 2]), ("text", b"no state"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("cut", "text", "empty", "array.npy", "arrays.npz"):
        with pytest.raises(UserError, match="is no memory state"):
            generator.load_state(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        generator.load_state(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be written"):
        generator.save_state(generator.read("abc"), tmp_path / "absent" / "file")
