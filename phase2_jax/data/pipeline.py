"""Batches of token windows. Which batch belongs to which step depends on nothing but the step, the seed and the shapes.

Labels are the next tokens, so a row of N inputs is cut from N + 1 tokens and neighbouring windows share one.
"""

from collections.abc import Callable, Sequence
from typing import overload

import grain
import numpy as np

from phase2_jax.data import task_stream
from phase2_jax.data.batch import NOT_SCORED, Batch
from phase2_jax.data.config import DataConfig
from phase2_jax.data.corpora import TokenStream
from phase2_jax.data.task_stream import TaskStream
from phase2_jax.errors import UserError

# The tokens lie in memory and a batch takes under a millisecond: one thread hides it behind the step, more contend.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
# Separate streams of chance for the uses of one seed.
_SHUFFLE_STREAM, _FRESH_STREAM, _START_STREAM = 0, 1, 2


def steps_per_epoch(stream: TokenStream | TaskStream, config: DataConfig, *, batch_size: int, seq_len: int) -> int:
    """Batches in one pass; the same in both modes but for `windows_in_a_row`. The tail that fills no batch is left out
    of streams, in windows mode a different random remainder every epoch.

    Raises:
      UserError: the text is shorter than one batch.
    """
    _check_shape(batch_size, seq_len)
    if isinstance(stream, TaskStream):
        return task_stream.steps_per_epoch(stream, batch_size, seq_len)
    in_a_row = config.windows_in_a_row
    size = batch_size * seq_len * in_a_row
    steps = (len(stream) - 1) // size * in_a_row
    if steps < 1:
        windows = "" if in_a_row == 1 else f"data.windows_in_a_row={in_a_row} windows of "
        raise UserError(
            f"the training text has {len(stream)} tokens, but one batch of train.batch_size={batch_size} rows of "
            f"{windows}train.seq_len={seq_len} needs {size + 1}: lower one of them or give more text"
        )
    return steps


def train_dataset(
    stream: TokenStream | TaskStream, config: DataConfig, *, batch_size: int, seq_len: int, seed: int
) -> grain.MapDataset[Batch]:
    """Endless batches with random access: element k is the batch of global step k (0-based).

    streams: row b of consecutive batches runs through its own contiguous share of the text, so the last label of a
    window is the first token of the next. reset is True where a document begins, at every row's first token of an
    epoch, and, for a `fresh_state_fraction` of the rows, at a window's start. With `random_start` the first row of each
    epoch starts at a random token, and the text goes on with its beginning where it ends.
    windows: windows of N tokens in an order shuffled anew every epoch; reset is True at their start and where a
    document begins. With `windows_in_a_row` R it is pieces of R N tokens that are shuffled, and R batches read through
    the same pieces; reset is True at a piece's start.
    A task's sequences: likewise in shuffled order, or new ones for every batch.

    Raises:
      UserError: the text is shorter than one batch, or a size or the seed is out of range.
    """
    steps = steps_per_epoch(stream, config, batch_size=batch_size, seq_len=seq_len)
    if seed < 0:
        raise UserError(f"train.seed={seed} must not be negative")
    if isinstance(stream, TaskStream):
        return task_stream.train_dataset(stream, batch_size, seq_len, _shuffle_seed(seed))

    cut = _windows if config.mode == "windows" else _streams
    starts_of_step = cut(stream, config, batch_size, seq_len, seed, steps)

    def batch_of_step(step: int, _: int) -> Batch:
        starts_B, begins = starts_of_step(step)
        fresh_B = np.full(batch_size, begins)
        if config.fresh_state_fraction > 0:
            chance = np.random.default_rng([_FRESH_STREAM, seed, step])
            fresh_B |= chance.random(batch_size) < config.fresh_state_fraction
        return _cut_batch(stream, starts_B, seq_len, fresh_B)

    # After repeat() the index is the global step, so fresh rows differ from epoch to epoch.
    return grain.MapDataset.range(steps).repeat().map_with_index(batch_of_step)


# Of a global step: first token of each row, and whether the rows begin there.
_StartsOfStep = Callable[[int], tuple[np.ndarray, bool]]


def _windows(
    stream: TokenStream, config: DataConfig, batch_size: int, seq_len: int, seed: int, steps: int
) -> _StartsOfStep:
    del steps
    in_a_row = config.windows_in_a_row
    piece = in_a_row * seq_len
    order = grain.MapDataset.range((len(stream) - 1) // piece).shuffle(seed=_shuffle_seed(seed))
    pieces = order.batch(batch_size, drop_remainder=True).repeat()

    def starts(step: int) -> tuple[np.ndarray, bool]:
        window = step % in_a_row
        return np.asarray(pieces[step // in_a_row]) * piece + window * seq_len, window == 0

    return starts


def _streams(
    stream: TokenStream, config: DataConfig, batch_size: int, seq_len: int, seed: int, steps: int
) -> _StartsOfStep:
    row_starts_B = np.arange(batch_size) * (steps * seq_len)

    def starts(step: int) -> tuple[np.ndarray, bool]:
        epoch, window = divmod(step, steps)
        first = 0
        if config.random_start:
            # The last token is a label only.
            first = int(np.random.default_rng([_START_STREAM, seed, epoch]).integers(len(stream) - 1))
        return first + row_starts_B + window * seq_len, window == 0

    return starts


def train_iterator(dataset: grain.MapDataset[Batch], start_step: int = 0) -> grain.DatasetIterator[Batch]:
    """Iterates from `start_step` on, reading ahead in one thread.

    get_state() gives a small JSON-able dict (the next step) that set_state() takes back; batches read ahead but not
    handed out do not count. Call close() when done.
    """
    iterator = iter(dataset.to_iter_dataset(_READ_OPTIONS))
    iterator.set_state({"next_index": int(start_step)})
    return iterator


def eval_batches(stream: TokenStream | TaskStream, *, batch_size: int, seq_len: int) -> Sequence[Batch]:
    """Batches that score every token but the stream's first exactly once.

    Each of the B rows runs through its own contiguous share of the text from a fresh memory; shares differ by at most
    one token. Where a row has ended, tokens are 0 and labels -1.

    Raises:
      UserError: the stream has fewer than two tokens, or a size is out of range.
    """
    _check_shape(batch_size, seq_len)
    check_scorable(stream)
    if isinstance(stream, TaskStream):
        return task_stream.eval_batches(stream, batch_size, seq_len)
    return _EvalBatches(stream, batch_size, seq_len)


def check_scorable(stream: TokenStream | TaskStream) -> None:
    """Raise UserError where a validation stream has no token to predict."""
    if isinstance(stream, TokenStream) and len(stream) < 2:
        raise UserError(
            "the validation text has fewer than 2 tokens: raise data.valid_fraction or give data.valid_path"
        )


class _EvalBatches(Sequence[Batch]):
    """Built on demand: only the batch that is asked for exists."""

    def __init__(self, stream: TokenStream, batch_size: int, seq_len: int):
        self._stream = stream
        self._seq_len = seq_len
        bounds = np.arange(batch_size + 1) * (len(stream) - 1) // batch_size
        self._starts_B, self._ends_B = bounds[:-1], bounds[1:]
        self._length = -(-int((self._ends_B - self._starts_B).max()) // seq_len)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self._batch(window) for window in range(len(self))[index]]
        return self._batch(range(len(self))[index])

    def _batch(self, window: int) -> Batch:
        starts_B = self._starts_B + window * self._seq_len
        fresh_B = np.full(len(starts_B), window == 0)
        return _cut_batch(self._stream, starts_B, self._seq_len, fresh_B, self._ends_B)


def _cut_batch(
    stream: TokenStream, starts_B: np.ndarray, seq_len: int, fresh_B: np.ndarray, ends_B: np.ndarray | None = None
) -> Batch:
    """Rows of N tokens from `starts_B` on; inputs at or beyond `ends_B` are padding. Without `ends_B` the text goes on
    with its first token after its last label.
    """
    positions_BxN = starts_B[:, None] + np.arange(seq_len)
    if ends_B is None:
        positions_BxN %= len(stream) - 1
        valid_BxN = np.ones(positions_BxN.shape, bool)
    else:
        valid_BxN = positions_BxN < ends_B[:, None]
    safe_BxN = np.where(valid_BxN, positions_BxN, 0)
    tokens_BxN = np.where(valid_BxN, stream.tokens[safe_BxN], 0)
    labels_BxN = np.where(valid_BxN, stream.tokens[safe_BxN + 1], NOT_SCORED)
    reset_BxN = stream.is_document_start(positions_BxN) & valid_BxN
    reset_BxN[:, 0] |= fresh_B
    return {"tokens": tokens_BxN.astype(np.int32), "labels": labels_BxN.astype(np.int32), "reset": reset_BxN}


def _shuffle_seed(seed: int) -> int:
    """grain adds the epoch to its seed, so that neighbouring seeds would repeat each other's orders one epoch later."""
    return int(np.random.SeedSequence([_SHUFFLE_STREAM, seed]).generate_state(1)[0])


def _check_shape(batch_size: int, seq_len: int) -> None:
    for name, value in (("train.batch_size", batch_size), ("train.seq_len", seq_len)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
