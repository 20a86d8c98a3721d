"""Figures of a text against the definition, and against reading it in another way."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.data.corpora import TokenStream
from phase2_jax.data.tokenizers import ByteTokenizer
from phase2_jax.errors import UserError
from phase2_jax.inference.evaluation import EvaluationConfig, evaluate
from phase2_jax.inference.evaluation_table import table
from phase2_jax.inference.scores import Scores
from phase2_jax.inference.text_pieces import EncodedPiece
from phase2_jax.inference.windows import TextCounts, WindowReader, pieces_of_stream
from phase2_jax.training.json_files import dumps
from phase2_jax.training.records import PER_LAYER_KEYS

DOCUMENTS = ("the first one|", "and the second, which is longer and has é|", "x|")
TEXT = "".join(DOCUMENTS)
WORDS = sum(len(document.split()) for document in DOCUMENTS)
RAW = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
STARTS = np.cumsum([0, *(len(document.encode()) for document in DOCUMENTS)])[:-1]
POSITIONS = np.concatenate([np.arange(len(document.encode())) for document in DOCUMENTS])
# Losses of order 5 in float32, summed in other orders.
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def result(loaded, tmp_path_factory):
    """Every figure of TEXT in windows of 16 tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    config = EvaluationConfig(str(file), document_separator="|", batch_size=2, wipe_every=(5, 1000))
    return evaluate(loaded, config, window_tokens=16)


def losses_of(logits_NxV, labels_N):
    logits_NxV = np.asarray(logits_NxV, np.float64)
    return np.log(np.exp(logits_NxV).sum(axis=-1)) - logits_NxV[np.arange(len(labels_N)), labels_N]


def test_loss_is_that_of_the_whole_text_read_at_once(loaded, forward, result):
    logits_NxV, _ = forward(loaded, RAW[:-1], reset=POSITIONS[:-1] == 0)
    losses = losses_of(logits_NxV, RAW[1:])
    assert result["tokens"] == len(losses)
    assert (result["documents"], result["bytes"], result["words"]) == (3, len(RAW), WORDS)
    np.testing.assert_allclose(result["loss"], losses.mean(), **CLOSE)
    np.testing.assert_allclose(result["perplexity"], np.exp(losses.mean()), rtol=1e-4)
    np.testing.assert_allclose(result["bits_per_byte"], losses.mean() / np.log(2), **CLOSE)
    np.testing.assert_allclose(np.log(result["word_perplexity"]), losses.sum() / WORDS, **CLOSE)
    assert result["accuracy"] == np.mean(np.argmax(logits_NxV, axis=-1) == RAW[1:])

    seen = [token in RAW[t - POSITIONS[t] : t] for t, token in enumerate(RAW)][1:]
    np.testing.assert_allclose(result["seen"]["loss"], losses[seen].mean(), **CLOSE)
    np.testing.assert_allclose(result["new"]["loss"], losses[np.logical_not(seen)].mean(), **CLOSE)
    assert result["seen"]["tokens"] == np.sum(seen)

    for place in result["by_position"]:
        here = (POSITIONS[1:] >= place["first"]) & (POSITIONS[1:] <= place["last"])
        assert place["tokens"] == here.sum()
        np.testing.assert_allclose(place["loss"], losses[here].mean(), **CLOSE)
    assert sum(place["tokens"] for place in result["by_position"]) == len(losses)
    assert [place["first"] for place in result["by_position"]] == [0, 1, 2, 4, 8, 16, 32]


def test_a_wiped_memory(loaded, forward, result):
    wiped = losses_of(forward(loaded, RAW[:-1], reset=POSITIONS[:-1] % 5 == 0)[0], RAW[1:]).mean()
    np.testing.assert_allclose(result["wiped"][0]["loss"], wiped, **CLOSE)
    assert [reading["every"] for reading in result["wiped"]] == [5, 1000]
    # Wiping less often than the documents do is no wiping.
    assert result["wiped"][1]["loss"] == result["loss"]
    assert abs(result["loss"] - wiped) > 1e-3


@pytest.mark.slow
def test_the_memory_off(loaded, text_file, forward, result):
    config = EvaluationConfig(str(text_file), document_separator="|", batch_size=2, memory_off=True, wipe_every=(5,))
    found = evaluate(loaded, config, window_tokens=16)
    silent = replace(loaded.model_config, eta=0.0)
    off = losses_of(forward(loaded, RAW[:-1], reset=POSITIONS[:-1] == 0, config=silent)[0], RAW[1:]).mean()
    np.testing.assert_allclose(found["memory_off"]["loss"], off, **CLOSE)
    assert found["memory_off"]["mean_fast_weight_energy"] == 0.0
    # Nothing can be said of weights that are all zero.
    assert found["memory_off"]["mean_snr"] is None
    assert set(found["memory_off"]["per_layer"]["stable_ratio"]) == {None}
    assert None not in found["per_layer"]["stable_ratio"]
    assert (found["loss"], found["wiped"][0]["loss"]) == (result["loss"], result["wiped"][0]["loss"])
    assert abs(found["loss"] - off) > 1e-3
    assert "memory as it is  memory off  wiped every 5" in table(found | {"peak_rss_mb": 100.0})


def assert_alike(a, b):
    """Equal up to float32 rounding: one window alone is compiled without a loop, which fuses its sums differently."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_alike(x, y)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    else:
        assert a == b


@pytest.mark.parametrize("batch_size", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_figures_do_not_depend_on_the_batch_size(loaded, text_file, result, batch_size):
    config = EvaluationConfig(str(text_file), document_separator="|", batch_size=batch_size)
    other = evaluate(loaded, config, window_tokens=16)
    for name in set(other) - {"data", "seconds", "wiped"}:
        assert_alike(other[name], result[name])


@pytest.mark.slow
def test_figures_hardly_depend_on_the_window(loaded, text_file, result):
    config = EvaluationConfig(str(text_file), document_separator="|")
    other = evaluate(loaded, config, window_tokens=512)
    for name in ("loss", "mean_gamma", "std_gamma", "min_gamma", "max_gamma"):
        np.testing.assert_allclose(other[name], result[name], **CLOSE)
    assert other["seen"]["tokens"] == result["seen"]["tokens"]


@pytest.mark.slow
def test_the_memory_figures_are_those_of_the_model(loaded, text_file, forward):
    """One window: what the model itself reports at its end."""
    found = evaluate(loaded, EvaluationConfig(str(text_file), max_tokens=20))
    _, state = forward(loaded, RAW[:20])
    energy_L = np.mean(np.sum(np.square(state.w_BxHxKxV), axis=(-2, -1)), axis=(1, 2))
    np.testing.assert_allclose(found["per_layer"]["energy"], energy_L, **CLOSE)
    np.testing.assert_allclose(found["mean_fast_weight_energy"], energy_L.mean(), **CLOSE)
    np.testing.assert_allclose(found["lyapunov_stable_ratio"], np.mean(state.lyapunov.stable_BxH), **CLOSE)
    assert found["min_gamma"] <= found["mean_gamma"] <= found["max_gamma"]


def test_a_limit_counts_what_it_leaves(loaded, text_file, forward):
    for limit in (17, 31):
        found = evaluate(loaded, EvaluationConfig(str(text_file), batch_size=2, max_tokens=limit), window_tokens=16)
        assert (found["tokens"], found["bytes"]) == (limit, limit + 1)
        np.testing.assert_allclose(found["bits_per_byte"], found["loss"] / np.log(2), rtol=1e-12)


def test_the_result_is_json_and_a_table(result):
    assert json.loads(dumps(result))["loss"] == result["loss"]
    lines = table(result | {"peak_rss_mb": 100.0}).splitlines()
    assert any(line.startswith("perplexity") and f"{result['perplexity']:.5g}" in line for line in lines)
    assert any("wiped every 5  wiped every 1000" in line for line in lines)


def test_the_runs_own_validation_text(loaded):
    found = evaluate(loaded, EvaluationConfig(batch_size=2, max_tokens=300), window_tokens=16)
    assert (found["tokens"], found["bytes"], found["data"]) == (300, 301, "validation text of the run")


def test_words_have_their_own_perplexity():
    layers: dict[str, Any] = dict.fromkeys(PER_LAYER_KEYS, np.ones(2))
    scores = Scores()
    scores.add(np.ones(5), np.ones(5, bool), np.arange(5), np.zeros(5, bool), layers, whole=True)
    counts = TextCounts(tokens=6, num_bytes=11, num_words=4, first_bytes=1)
    result = scores.result(counts, word_level=False)
    assert result["word_perplexity"] == pytest.approx(np.exp(5 / 4))
    assert result["bits_per_byte"] == pytest.approx(5 / 10 / np.log(2))
    assert scores.result(counts, word_level=True)["word_perplexity"] == result["perplexity"] == pytest.approx(np.e)
    counts.lossless = False
    lossy = scores.result(counts, word_level=False)
    assert (lossy["word_perplexity"], lossy["bits_per_byte"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "--batch_size=0"),
        ({"max_tokens": -1}, "--max_tokens=-1"),
        ({"wipe_every": (3, 0)}, "--wipe_every=0"),
        ({"format": "pdf"}, "--format='pdf'"),
        ({"data": "absent.txt"}, "absent.txt"),
        ({"format": "wikitext", "document_separator": "|"}, "exclude each other"),
    ],
)
def test_mistakes_are_named(loaded, options, said):
    with pytest.raises(UserError, match=said):
        evaluate(loaded, EvaluationConfig(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"document_separator": "§"}, "'§' does not occur"), ({"format": "wikitext"}, "no title line")],
)
def test_documents_that_were_asked_for_have_to_be_there(loaded, text_file, options, said):
    with pytest.raises(UserError, match=said):
        evaluate(loaded, EvaluationConfig(str(text_file), **options), window_tokens=16)
    limited = EvaluationConfig(str(text_file), max_tokens=20, **options)
    assert evaluate(loaded, limited, window_tokens=16)["tokens"] == 20


@pytest.mark.parametrize(("text", "said"), [("", "is empty|no token|0 token"), ("a", "1 token")])
def test_too_little_text(loaded, tmp_path, text, said):
    file = tmp_path / "text.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        evaluate(loaded, EvaluationConfig(str(file)))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 7),
    st.integers(0, 12),
)
def test_windows_score_every_token_once(documents, length, limit):
    pieces = [
        EncodedPiece(np.array(part, np.int32), len(part), 1, True, index == 0)
        for document in documents
        for index, part in enumerate([document[:4], document[4:]])
        if part
    ]
    reader = WindowReader(ByteTokenizer(), length, limit)
    windows = list(reader.windows(pieces))
    tokens = np.concatenate(documents)[: limit + 1 if limit else None]
    positions = np.concatenate([np.arange(len(document)) for document in documents])[: len(tokens)]
    assert all(len(window) == length for window in windows[:-1])
    joined = lambda name: np.concatenate([getattr(window, name)[1:] for window in windows])  # noqa: E731
    assert reader.counts.tokens == len(tokens)
    if len(tokens) == 1:
        assert windows == []
        return
    np.testing.assert_array_equal(joined("tokens"), tokens[1:])
    np.testing.assert_array_equal(np.concatenate([window.tokens[:-1] for window in windows]), tokens[:-1])
    np.testing.assert_array_equal(joined("positions"), positions[1:])
    seen = [tokens[t] in tokens[t - positions[t] : t] for t in range(len(tokens))]
    np.testing.assert_array_equal(joined("seen"), seen[1:])


def test_pieces_of_tokens_in_memory():
    stream = TokenStream(RAW, STARTS, len(RAW))
    pieces = list(pieces_of_stream(stream, ByteTokenizer()))
    assert [piece.num_bytes for piece in pieces] == [len(document.encode()) for document in DOCUMENTS]
    assert all(piece.lossless and piece.begins_document for piece in pieces)
