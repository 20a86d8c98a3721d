"""Synthetic tasks: token sequences whose scored labels can be known only by remembering what came before.

Every task is a function `(rng, rows, num_tokens, items, config) -> Examples` of a numpy random generator, so a seed
names the examples. Labels are `NOT_SCORED` wherever nothing is to be predicted.

Sources: multi-query associative recall (MQAR), Arora et al., "Zoology" (2023); induction heads and selective copying,
Gu and Dao, "Mamba" (2023); sums modulo a number, Delétang et al., "Neural Networks and the Chomsky Hierarchy" (2022).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from phase2_jax.data.batch import NOT_SCORED
from phase2_jax.data.config import TaskConfig
from phase2_jax.errors import UserError


class Examples(NamedTuple):
    """tokens and labels, (B, N) int32 each."""

    tokens: np.ndarray
    labels: np.ndarray


def mqar(rng: np.random.Generator, rows: int, num_tokens: int, items: int, config: TaskConfig) -> Examples:
    """Multi-query associative recall: k1 v1 ... kK vK, then every key once more, where its value is the label.

    Keys are drawn without replacement from 1 ... V/2-1, values from V/2 ... V-1. Queries stand at even offsets behind
    the pairs, in slots s = 1, 2, ... drawn without replacement with probability proportional to s^(power-1). All other
    tokens are 0, or random with `random_fillers`.
    """
    slots, half = (num_tokens - 2 * items) // 2, config.vocab_size // 2
    keys = 1 + _distinct(rng, items, rows, half - 1)
    values = half + _distinct(rng, items, rows, config.vocab_size - half)
    # Which of several exponential clocks ring first is a draw without replacement with their rates as weights.
    rates = np.arange(1, slots + 1, dtype=np.float64) ** (config.power - 1)
    order = np.argsort(rng.exponential(size=(rows, slots)) / rates, axis=1)
    places = 2 * items + 2 * order[:, :items]

    shape = (rows, num_tokens)
    tokens = rng.integers(0, config.vocab_size, shape) if config.random_fillers else np.zeros(shape, np.int64)
    labels = np.full(shape, NOT_SCORED)
    tokens[:, 0 : 2 * items : 2], tokens[:, 1 : 2 * items : 2] = keys, values
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(labels, places, values, axis=1)
    return _examples(tokens, labels)


def _distinct(rng: np.random.Generator, count: int, rows: int, choices: int) -> np.ndarray:
    """`count` different integers below `choices` in random order, for each row (Floyd's sampling)."""
    found = np.empty((rows, count), np.int64)
    for column, largest in enumerate(range(choices - count, choices)):
        drawn = rng.integers(0, largest + 1, rows)
        taken = (found[:, :column] == drawn[:, None]).any(axis=1)
        found[:, column] = np.where(taken, largest, drawn)
    return rng.permuted(found, axis=1)


def induction(rng: np.random.Generator, rows: int, num_tokens: int, items: int, config: TaskConfig) -> Examples:
    """Random tokens; a special one (V-1) stands once in the first half and at the end, where the token that followed
    it the first time is the label.
    """
    del items
    special, each = config.vocab_size - 1, np.arange(rows)
    tokens = rng.integers(0, special, (rows, num_tokens))
    place = rng.integers(0, num_tokens // 2, rows)
    tokens[each, place] = tokens[:, -1] = special
    labels = np.full(tokens.shape, NOT_SCORED)
    labels[:, -1] = tokens[each, place + 1]
    return _examples(tokens, labels)


def selective_copying(rng: np.random.Generator, rows: int, num_tokens: int, items: int, config: TaskConfig) -> Examples:
    """Data tokens (1 ... V-2) at random places among noise (0), then as many markers (V-1), at which the data tokens
    are the labels in their order.
    """
    context = num_tokens - items
    data = rng.integers(1, config.vocab_size - 1, (rows, items))
    places = np.sort(_distinct(rng, items, rows, context), axis=1)
    tokens = np.zeros((rows, num_tokens), np.int64)
    np.put_along_axis(tokens, places, data, axis=1)
    tokens[:, context:] = config.vocab_size - 1
    labels = np.full(tokens.shape, NOT_SCORED)
    labels[:, context:] = data
    return _examples(tokens, labels)


def modular_sum(rng: np.random.Generator, rows: int, num_tokens: int, items: int, config: TaskConfig) -> Examples:
    """Random digits below `vocab_size`; the label of each is the sum so far modulo `vocab_size` (2: parity)."""
    del items
    tokens = rng.integers(0, config.vocab_size, (rows, num_tokens))
    return _examples(tokens, np.cumsum(tokens, axis=1) % config.vocab_size)


def _examples(tokens: np.ndarray, labels: np.ndarray) -> Examples:
    return Examples(tokens.astype(np.int32), labels.astype(np.int32))


TASKS: dict[str, Callable[[np.random.Generator, int, int, int, TaskConfig], Examples]] = {
    "mqar": mqar,
    "induction": induction,
    "selective_copying": selective_copying,
    "modular_sum": modular_sum,
}


def least_length(config: TaskConfig, items: int) -> int:
    """Tokens of the shortest sequence with room for `items` items."""
    return {"mqar": 4 * items, "induction": 4, "selective_copying": 2 * items, "modular_sum": 1}[config.name]


def check_length(config: TaskConfig, num_tokens: int, items: int) -> None:
    """Raise UserError where `num_tokens` tokens have no room for the task."""
    needed = least_length(config, items)
    if num_tokens < needed:
        raise UserError(
            f"sequences of {num_tokens} tokens are too short for data.task.name={config.name!r} with "
            f"data.task.num_items={items}: train.seq_len must be at least {needed}"
        )


def make_examples(config: TaskConfig, rng: np.random.Generator, rows: int, num_tokens: int, items: int = 0) -> Examples:
    """`rows` examples of `num_tokens` tokens; `items` replaces the number in the configuration.

    Raises:
      UserError: the sequences are too short for the task.
    """
    items = items or config.num_items
    check_length(config, num_tokens, items)
    return TASKS[config.name](rng, rows, num_tokens, items, config)
