"""The counting baseline: real probabilities, and the published way to make them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "ngram.py"


@pytest.fixture(scope="module")
def ngram():
    spec = importlib.util.spec_from_file_location("ngram", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(
    train=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    context=st.lists(st.integers(0, 3), max_size=5),
    order=st.integers(1, 4),
    modified=st.booleans(),
)
def test_probabilities_after_any_context_sum_to_one(ngram, train, context, order, modified):
    nats = [
        ngram.kneser_ney_nats(np.array(train), np.array([*context, symbol]), order, modified=modified, vocab_size=4)[-1]
        for symbol in range(4)
    ]
    # Sums of a few float64 products: rounding alone.
    assert sum(np.exp(-np.array(nats))) == pytest.approx(1.0, abs=1e-12)


def test_a_bigram_worked_by_hand(ngram):
    # "abaab": bigrams ab twice, ba and aa once, so n1 = 2, n2 = 1 and D = 2/4. Different symbols before a: 2 (of ba and
    # aa), before b: 1 (of ab), so among the unigrams n1 = 1, n2 = 1 and D = 1/3; below them stands 1/2.
    unigram_a = (2 - 1 / 3 + 2 / 3 * 0.5) / 3
    after_a = (1 - 0.5 + 2 * 0.5 * unigram_a) / 3
    after_b = (1 - 0.5 + 1 * 0.5 * unigram_a) / 1
    nats = ngram.kneser_ney_nats(np.array([0, 1, 0, 0, 1]), np.array([0, 0, 1, 0]), 2, vocab_size=2)
    expected = [unigram_a, after_a, 1 - after_a, after_b]
    np.testing.assert_allclose(np.exp(-nats), expected, rtol=1e-12)


def test_more_context_helps_on_the_shipped_text_and_the_program_says_so(ngram, capsys):
    assert ngram.main(["--orders=1,3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train 657,425 bytes, validation 73,049 bytes"
    assert lines[1].startswith("1-gram: Kneser-Ney 3.1996 nats/byte, modified 3.1999 nats/byte")
    assert lines[2].startswith("3-gram: Kneser-Ney 2.0030 nats/byte, modified 2.0036 nats/byte")


def test_mistakes_exit_with_status_2(ngram, capsys):
    assert ngram.main(["--path=missing.txt"]) == 2
    assert "data.path='missing.txt' does not exist" in capsys.readouterr().err
    for orders in ("3,x", "0", ""):
        with pytest.raises(SystemExit) as caught:
            ngram.main([f"--orders={orders}"])
        assert caught.value.code == 2
