"""A synthetic task in the place of a text: batches for training and validation."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import overload

import grain
import numpy as np

from phase2_jax.data.batch import NOT_SCORED, Batch
from phase2_jax.data.config import TaskConfig
from phase2_jax.data.tasks import Examples, check_length, make_examples
from phase2_jax.errors import UserError

# An epoch of a task whose examples never repeat.
STEPS_OF_ENDLESS_EPOCH = 1000
# Examples of a finite set are drawn in blocks, so that a set does not depend on how it is used.
_BLOCK = 1000


@dataclass(frozen=True)
class TaskStream:
    """One split of a task. Its examples depend on the configuration and on `split`, a name of its own stream of
    chance, alone.
    """

    config: TaskConfig
    split: str

    def __len__(self) -> int:
        """Scored sequences of the split; 0 = endless."""
        return self.config.num_train if self.split == "train" else self.config.num_valid

    def fingerprint(self) -> bytes:
        """sha256 of what the examples depend on, as `TokenStream.fingerprint`."""
        return hashlib.sha256(json.dumps([asdict(self.config), self.split], sort_keys=True).encode()).digest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """As `TokenStream.check_vocabulary`."""
        if vocab_size < self.config.vocab_size:
            raise UserError(f"model.vocab_size={vocab_size} is below data.task.vocab_size={self.config.vocab_size}")

    def chance(self, *numbers: int) -> np.random.Generator:
        """Random numbers that only this split, `config.seed` and `numbers` decide."""
        return np.random.default_rng([("train", "valid").index(self.split), self.config.seed, *numbers])

    def examples(self, count: int, num_tokens: int) -> Examples:
        """The first `count` examples of the finite set."""
        parts = self.config.parts or ((0, 0, 1),)
        shares = list(itertools.accumulate(part[2] for part in parts))
        # Rounded where parts end, so that there are `count` in all.
        ends = [round(count * share / shares[-1]) for share in shares]
        blocks = []
        for part, ((length, items, _), begin, end) in enumerate(zip(parts, [0, *ends], ends, strict=False)):
            for block, start in enumerate(range(begin, end, _BLOCK)):
                rows = min(_BLOCK, end - start)
                made = make_examples(self.config, self.chance(part, block), rows, length or num_tokens, items)
                blocks.append(_padded(made, num_tokens))
        return Examples(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))


def _padded(examples: Examples, num_tokens: int) -> Examples:
    missing = num_tokens - examples.tokens.shape[1]
    widths = ((0, 0), (0, missing))
    return Examples(np.pad(examples.tokens, widths), np.pad(examples.labels, widths, constant_values=NOT_SCORED))


def steps_per_epoch(stream: TaskStream, batch_size: int, seq_len: int) -> int:
    """Batches of a finite set, or `STEPS_OF_ENDLESS_EPOCH`.

    Raises:
      UserError: the set is smaller than a batch, or its sequences do not fit.
    """
    for length, items, _ in stream.config.parts or ((seq_len, stream.config.num_items, 0),):
        if length > seq_len:
            raise UserError(f"data.task.mixture has sequences longer than train.seq_len={seq_len}: raise it")
        check_length(stream.config, length, items)
    if not len(stream):
        return STEPS_OF_ENDLESS_EPOCH
    if len(stream) < batch_size:
        raise UserError(f"data.task.num_train={len(stream)} is below train.batch_size={batch_size}: raise it")
    return len(stream) // batch_size


def train_dataset(stream: TaskStream, batch_size: int, seq_len: int, shuffle_seed: int) -> grain.MapDataset[Batch]:
    """Endless batches with random access; a finite set in an order shuffled anew every epoch."""
    if not len(stream):
        batch_of: Callable[[int], Batch] = lambda step: _batch(  # noqa: E731
            make_examples(stream.config, stream.chance(shuffle_seed, step), batch_size, seq_len)
        )
        return grain.MapDataset.range(2**62).map(batch_of)
    examples = stream.examples(len(stream), seq_len)
    order = grain.MapDataset.range(len(examples.tokens)).shuffle(seed=shuffle_seed)
    rows = order.batch(batch_size, drop_remainder=True).repeat()
    return rows.map(lambda rows_B: _batch(Examples(examples.tokens[rows_B], examples.labels[rows_B])))


def _batch(examples: Examples, first: bool = True) -> Batch:
    reset_BxN = np.zeros(examples.tokens.shape, bool)
    reset_BxN[:, 0] = first
    return {"tokens": examples.tokens, "labels": examples.labels, "reset": reset_BxN}


class EvalBatches(Sequence[Batch]):
    """All examples of a finite set, B rows at a time, each cut into windows of N tokens that follow one another."""

    def __init__(self, examples: Examples, batch_size: int, seq_len: int):
        rows, length = examples.tokens.shape
        self._windows = -(-length // seq_len)
        self._shape = (batch_size, seq_len)
        missing = (-rows % batch_size, self._windows * seq_len - length)
        widths = tuple((0, count) for count in missing)
        self._tokens = np.pad(examples.tokens, widths)
        self._labels = np.pad(examples.labels, widths, constant_values=NOT_SCORED)

    def __len__(self) -> int:
        return len(self._tokens) // self._shape[0] * self._windows

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        group, window = divmod(range(len(self))[index], self._windows)
        batch_size, seq_len = self._shape
        part = np.s_[group * batch_size : (group + 1) * batch_size, window * seq_len : (window + 1) * seq_len]
        return _batch(Examples(self._tokens[part], self._labels[part]), first=window == 0)


def eval_batches(stream: TaskStream, batch_size: int, seq_len: int) -> EvalBatches:
    """Batches that score every validation example once."""
    return EvalBatches(stream.examples(len(stream), seq_len), batch_size, seq_len)
