"""How well counting does: interpolated Kneser-Ney n-grams over bytes, on the split the language model uses.

    python benchmarks/ngram.py                                   the shipped text, a few seconds
    python benchmarks/ngram.py --path=input.txt --orders=3,5,6   any text or folder that data.path takes

These are the figures to hold a validation loss against: mean nats per byte over every byte of the validation text but
the first, which is also what the validation loss of training is made of. Both texts are read as one stream, in order,
and a context may reach back over the start of a document. Nothing is learned from the validation text.

Two variants, both from Chen and Goodman (1998), "An Empirical Study of Smoothing Techniques for Language Modeling":
plain has one discount for each order, n1 / (n1 + 2 n2); modified has three, for counts of one, two, and three or more.
In both, lower orders count in how many contexts a gram occurs, and below the unigrams stands the uniform 1/256.
"""

import argparse
import sys
import time

import numpy as np

from phase2_jax.data import DataConfig, load_corpus
from phase2_jax.errors import UserError

VOCAB_SIZE = 256


def kneser_ney_nats(
    train: np.ndarray, valid: np.ndarray, order: int, *, modified: bool = False, vocab_size: int = VOCAB_SIZE
) -> np.ndarray:
    """-log p of every symbol of `valid` given the up to `order` - 1 symbols before it.

    Args:
      train: (T,) integer ids that are counted.
      valid: (M,) integer ids that are scored.
      order: n of the n-gram, at least 1.
      modified: three discounts instead of one.
      vocab_size: ids are below it; also the uniform distribution at the bottom.

    Returns:
      (M,) float64 nats.
    """
    symbols = np.concatenate([train, valid]).astype(np.int64)
    begins = np.repeat([0, len(train)], [len(train), len(valid)])
    history = np.arange(len(symbols)) - begins  # symbols that precede each position within its own text
    grams = _grams_ending_here(symbols, history, order, vocab_size)
    probability_M = np.full(len(valid), 1.0 / vocab_size)
    for n in range(1, order + 1):
        ends = np.flatnonzero(history >= n - 1)
        contexts = np.zeros(int(grams[n].max(initial=0)) + 1, np.int64)
        contexts[grams[n][ends]] = grams[n - 1][ends - 1] if n > 1 else 0
        counted = ends[ends < len(train)]
        if n < order:
            longer = counted[history[counted] >= n]
            counted = longer[np.unique(grams[n + 1][longer], return_index=True)[1]]
        counts_G = np.bincount(grams[n][counted], minlength=len(contexts))
        scored = ends[ends >= len(train)]
        at = scored - len(train)
        probability_M[at] = _interpolate(counts_G, contexts, grams[n][scored], probability_M[at], modified)
    return -np.log(probability_M)


def _grams_ending_here(symbols: np.ndarray, history: np.ndarray, order: int, vocab_size: int) -> list[np.ndarray]:
    """grams[n][i] numbers the n-gram that ends at position i, 0 .. distinct - 1; meaningless where history < n - 1."""
    grams = [np.zeros_like(symbols)]
    for n in range(1, order + 1):
        previous = np.concatenate([[0], grams[n - 1][:-1]])
        keys = previous * vocab_size + symbols
        numbers = np.zeros_like(symbols)
        whole = history >= n - 1
        numbers[whole] = np.unique(keys[whole], return_inverse=True)[1]
        grams.append(numbers)
    return grams


def _interpolate(
    counts_G: np.ndarray, contexts_G: np.ndarray, scored: np.ndarray, lower: np.ndarray, modified: bool
) -> np.ndarray:
    """Probabilities of the grams `scored`, given those that the next lower order assigns to the same symbols."""
    freed_G = _discounts(counts_G, modified)[np.minimum(counts_G, 3)]
    total_of_context = np.bincount(contexts_G, weights=counts_G)
    freed_of_context = np.bincount(contexts_G, weights=freed_G)
    context = contexts_G[scored]
    total = total_of_context[context]
    kept = counts_G[scored] - freed_G[scored]
    # A context that training never saw leaves the lower order's word as it is.
    return np.where(total > 0, (kept + freed_of_context[context] * lower) / np.maximum(total, 1.0), lower)


def _discounts(counts_G: np.ndarray, modified: bool) -> np.ndarray:
    """What is taken from grams counted 0, 1, 2, and 3 or more times. Never more than the count, so sums stay 1."""
    n1, n2, n3, n4 = (max(int((counts_G == count).sum()), 1) for count in (1, 2, 3, 4))
    share = n1 / (n1 + 2 * n2)
    if not modified:
        return np.array([0.0, share, share, share])
    wanted = np.array([0.0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
    return np.clip(wanted, 0.0, [0.0, 1.0, 2.0, 3.0])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Kneser-Ney n-grams on the split the language model uses.")
    parser.add_argument("--path", default="", help="as data.path; empty is the shipped text")
    parser.add_argument("--valid_path", default="", help="as data.valid_path; empty holds back the last tenth")
    parser.add_argument("--orders", default="3,6", help="comma-separated n, for example 3,5,6")
    options = parser.parse_args(arguments)
    orders = options.orders.split(",")
    if not all(order.strip().isdecimal() and int(order) > 0 for order in orders):
        parser.error(f"--orders={options.orders!r} is not a list of positive numbers such as 3,6")
    try:
        corpus = load_corpus(DataConfig(path=options.path, valid_path=options.valid_path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"train {len(corpus.train):,} bytes, validation {len(corpus.valid):,} bytes")
    for order in map(int, orders):
        begin = time.perf_counter()
        plain, modified = (
            kneser_ney_nats(corpus.train.tokens, corpus.valid.tokens, order, modified=variant)[1:].mean()
            for variant in (False, True)
        )
        seconds = time.perf_counter() - begin
        print(f"{order}-gram: Kneser-Ney {plain:.4f} nats/byte, modified {modified:.4f} nats/byte ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
