"""Batches: continuity, resets, coverage, and the same batch for the same step whatever happened before.

Streams under test hold their own positions as tokens, so that every batch says where it was cut.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.data import Batch, DataConfig, TokenStream, eval_batches, steps_per_epoch, train_dataset, train_iterator
from phase2_jax.errors import UserError

STREAMS, WINDOWS = DataConfig(), DataConfig(mode="windows")


def positions_stream(size, starts=(0,)):
    return TokenStream(np.arange(size, dtype=np.int32), np.array(sorted({0, *starts}), np.int64), size)


@st.composite
def cases(draw):
    batch_size, seq_len = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    size = batch_size * seq_len * draw(st.integers(1, 4)) + draw(st.integers(1, batch_size * seq_len))
    starts = draw(st.lists(st.integers(0, size - 1), max_size=5))
    return positions_stream(size, starts), {"batch_size": batch_size, "seq_len": seq_len}


def at(dataset, step) -> Batch:
    """grain's type allows for gaps; these data sets have none."""
    batch = dataset[step]
    assert batch is not None
    return batch


def assert_same(first, second):
    assert first.keys() == second.keys() == {"tokens", "labels", "reset"}
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@given(cases(), st.integers(0, 2**40))
def test_rows_run_on_from_window_to_window_and_from_epoch_to_epoch(case, seed):
    stream, shape = case
    steps = steps_per_epoch(stream, STREAMS, **shape)
    dataset = train_dataset(stream, STREAMS, **shape, seed=seed)
    batches = [at(dataset, step) for step in range(2 * steps + 1)]
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["labels"], batch["tokens"] + 1)
        starts = np.isin(batch["tokens"], stream.document_starts)
        # Row starts and the wrap-around are the steps that begin an epoch; nothing else resets.
        starts[:, 0] |= step % steps == 0
        np.testing.assert_array_equal(batch["reset"], starts)
    for step, (batch, following) in enumerate(pairwise(batches)):
        if (step + 1) % steps:
            np.testing.assert_array_equal(batch["labels"][:, -1], following["tokens"][:, 0])
    assert_same(batches[steps], batches[0])
    inputs = np.concatenate([batch["tokens"].ravel() for batch in batches[:steps]])
    assert len(np.unique(inputs)) == len(inputs)
    # Only a tail that fills no batch stays unread.
    assert len(stream) - 1 - len(inputs) < shape["batch_size"] * shape["seq_len"]


@given(cases(), st.integers(0, 2**40))
def test_with_random_start_every_epoch_reads_the_same_text_from_another_token(case, seed):
    stream, shape = case
    config = DataConfig(random_start=True)
    steps, last = steps_per_epoch(stream, config, **shape), len(stream) - 1
    dataset = train_dataset(stream, config, **shape, seed=seed)
    for epoch in range(3):
        batches = [at(dataset, epoch * steps + window) for window in range(steps)]
        tokens_BxT = np.concatenate([batch["tokens"] for batch in batches], axis=1)
        # Rows follow each other around the text, so no token is read twice.
        np.testing.assert_array_equal(tokens_BxT.ravel(), (tokens_BxT[0, 0] + np.arange(tokens_BxT.size)) % last)
        resets = np.isin(tokens_BxT, stream.document_starts)
        resets[:, 0] = True
        np.testing.assert_array_equal(np.concatenate([batch["reset"] for batch in batches], axis=1), resets)
        for batch in batches:
            np.testing.assert_array_equal(batch["labels"], batch["tokens"] + 1)


def test_random_starts_differ_from_epoch_to_epoch_and_with_the_seed():
    stream, config = positions_stream(10_001), DataConfig(random_start=True)
    first = {
        int(at(train_dataset(stream, config, batch_size=2, seq_len=50, seed=seed), epoch * 100)["tokens"][0, 0])
        for seed in range(4)
        for epoch in range(4)
    }
    # Of 16 draws from 10,000 two agree with a chance of one in eighty; these do not.
    assert len(first) == 16


@given(cases())
def test_types_and_shapes_are_those_of_a_batch(case):
    stream, shape = case
    for config in (STREAMS, WINDOWS):
        batch = at(train_dataset(stream, config, **shape, seed=0), 0)
        expected = (shape["batch_size"], shape["seq_len"])
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "tokens": (expected, np.int32),
            "labels": (expected, np.int32),
            "reset": (expected, np.bool_),
        }


@given(cases(), st.integers(0, 2**40))
def test_windows_come_once_an_epoch_and_start_fresh(case, seed):
    stream, shape = case
    steps = steps_per_epoch(stream, WINDOWS, **shape)
    dataset = train_dataset(stream, WINDOWS, **shape, seed=seed)
    number_of_windows = (len(stream) - 1) // shape["seq_len"]
    for epoch in range(3):
        firsts = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = at(dataset, step)
            np.testing.assert_array_equal(batch["labels"], batch["tokens"] + 1)
            starts = np.isin(batch["tokens"], stream.document_starts)
            starts[:, 0] = True
            np.testing.assert_array_equal(batch["reset"], starts)
            firsts.extend(batch["tokens"][:, 0].tolist())
        assert len(set(firsts)) == len(firsts)
        assert all(first % shape["seq_len"] == 0 for first in firsts)
        assert number_of_windows - len(firsts) < shape["batch_size"]


@given(cases(), st.integers(2, 4), st.integers(0, 2**40))
def test_windows_in_a_row_go_on_where_the_last_ended_and_pieces_come_once_an_epoch(case, in_a_row, seed):
    stream, shape = case
    stream = positions_stream(len(stream) * in_a_row, stream.document_starts)
    config = DataConfig(mode="windows", windows_in_a_row=in_a_row)
    steps = steps_per_epoch(stream, config, **shape)
    assert steps % in_a_row == 0
    batches = [at(train_dataset(stream, config, **shape, seed=seed), step) for step in range(2 * steps)]
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["labels"], batch["tokens"] + 1)
        resets = np.isin(batch["tokens"], stream.document_starts)
        resets[:, 0] |= step % in_a_row == 0
        np.testing.assert_array_equal(batch["reset"], resets)
        if step % in_a_row:
            np.testing.assert_array_equal(batch["tokens"][:, 0], batches[step - 1]["labels"][:, -1])
        else:
            assert not (batch["tokens"][:, 0] % (in_a_row * shape["seq_len"])).any()
    for epoch in (batches[:steps], batches[steps:]):
        inputs = np.concatenate([batch["tokens"].ravel() for batch in epoch])
        assert len(np.unique(inputs)) == len(inputs)


def window_order(seed, epoch=0):
    stream = positions_stream(16 * 2 + 1)
    dataset = train_dataset(stream, WINDOWS, batch_size=4, seq_len=2, seed=seed)
    return [int(first) // 2 for step in range(4 * epoch, 4 * epoch + 4) for first in at(dataset, step)["tokens"][:, 0]]


def test_the_order_of_windows_changes_with_epoch_and_seed_and_never_with_the_version():
    # Frozen, because a run that is resumed after an upgrade must read on in the order it began with.
    assert window_order(0) == [12, 8, 11, 7, 4, 13, 1, 0, 14, 6, 10, 9, 5, 15, 3, 2]
    orders = [window_order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    # In particular seed 1 must not repeat seed 0 an epoch later.
    assert len({tuple(order) for order in orders}) == 9


# Ten windows a row: all of an epoch.
@pytest.mark.parametrize("reading", [STREAMS, DataConfig(mode="windows", windows_in_a_row=10)])
def test_fresh_rows_are_a_share_of_window_starts_that_differs_from_epoch_to_epoch(reading):
    stream = positions_stream(100 * 4 * 10 + 1)
    config = replace(reading, fresh_state_fraction=0.25)
    shape = {"batch_size": 100, "seq_len": 4}
    dataset = train_dataset(stream, config, **shape, seed=3)
    plain = train_dataset(stream, reading, **shape, seed=3)
    resets = np.stack([at(dataset, step)["reset"] for step in range(20)])
    assert not resets[:, :, 1:].any()
    assert resets[0].any(axis=1).all()
    assert resets[10].any(axis=1).all()
    wiped = resets[:, :, 0]
    share = np.delete(wiped, [0, 10], axis=0).mean()
    # 1,800 draws of probability .25 have a standard deviation of .0102; four of them around it.
    assert abs(share - 0.25) < 0.041
    assert (wiped[1] != wiped[11]).any()
    assert (wiped[1] != at(train_dataset(stream, config, **shape, seed=4), 1)["reset"][:, 0]).any()
    for name in ("tokens", "labels"):
        np.testing.assert_array_equal(at(dataset, 7)[name], at(plain, 7)[name])
    everywhere = train_dataset(stream, replace(reading, fresh_state_fraction=1.0), **shape, seed=3)
    assert at(everywhere, 7)["reset"][:, 0].all()


@given(
    cases(), st.integers(0, 12), st.integers(0, 5), st.sampled_from([("streams", 1), ("windows", 1), ("windows", 3)])
)
def test_reading_on_from_any_step_gives_the_same_batches(case, start, taken, mode):
    stream, shape = case
    config = DataConfig(mode=mode[0], windows_in_a_row=mode[1], fresh_state_fraction=0.5)
    stream = positions_stream(3 * len(stream), stream.document_starts)
    dataset = train_dataset(stream, config, **shape, seed=1)
    with contextlib.closing(train_iterator(dataset, start)) as iterator:
        for step in range(start, start + taken):
            assert_same(next(iterator), at(dataset, step))
        state = json.loads(json.dumps(iterator.get_state()))
        expected = [next(iterator) for _ in range(3)]
        iterator.set_state(state)
        assert_same(next(iterator), expected[0])
    with contextlib.closing(train_iterator(dataset, 0)) as other:
        next(other)
        other.set_state(state)
        for batch in expected:
            assert_same(next(other), batch)


CHECKSUMS = """
import zlib
import numpy as np
from phase2_jax.data import DataConfig, TokenStream, train_dataset

stream = TokenStream(np.arange(1000, dtype=np.int32), np.array([0, 7, 500]), 1000)
checksums = []
for mode in ("streams", "windows"):
    config = DataConfig(mode=mode, fresh_state_fraction=0.3)
    dataset = train_dataset(stream, config, batch_size=4, seq_len=8, seed=11)
    raw = b"".join(dataset[step][name].tobytes() for step in range(70) for name in ("tokens", "labels", "reset"))
    checksums.append(zlib.crc32(raw))
print(checksums)
"""


def test_another_process_cuts_the_same_batches(capsys):
    exec(CHECKSUMS, {})
    # Another order of hashed things, and what was drawn here before, must not matter there.
    other = subprocess.run(
        [sys.executable, "-c", CHECKSUMS], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert other.stdout == capsys.readouterr().out
    assert len(other.stdout.split()) == 2


@given(cases())
def test_validation_scores_every_token_but_the_first_exactly_once(case):
    stream, shape = case
    batches = eval_batches(stream, **shape)
    labels = np.stack([batch["labels"] for batch in batches])
    tokens = np.stack([batch["tokens"] for batch in batches])
    resets = np.stack([batch["reset"] for batch in batches])
    scored = labels >= 0
    assert sorted(labels[scored].tolist()) == list(range(1, len(stream)))
    np.testing.assert_array_equal(labels[scored], tokens[scored] + 1)
    assert not tokens[~scored].any()
    assert resets[0, :, 0][scored[0, :, 0]].all()
    for row in range(shape["batch_size"]):
        line = tokens[:, row].ravel()[scored[:, row].ravel()]
        # Contiguous, without a hole in the middle, from a fresh memory.
        np.testing.assert_array_equal(line, line[:1] + np.arange(len(line)))
        np.testing.assert_array_equal(np.flatnonzero(scored[:, row].ravel()), np.arange(len(line)))
        begins = np.isin(line, stream.document_starts)
        begins[:1] = True
        np.testing.assert_array_equal(resets[:, row].ravel()[: len(line)], begins)
        assert not resets[:, row].ravel()[max(len(line), 1) :].any()


def test_validation_batches_are_a_sequence():
    batches = eval_batches(positions_stream(50), batch_size=3, seq_len=4)
    assert len(batches) == len(list(batches)) == 5
    assert_same(batches[-1], batches[4])
    assert_same(batches[:2][1], batches[1])
    with pytest.raises(IndexError):
        batches[5]


def test_text_shorter_than_a_batch_says_what_is_needed():
    message = r"has 32 tokens, but one batch of train\.batch_size=4 rows of train\.seq_len=8 needs 33: lower one"
    for config in (STREAMS, WINDOWS):
        with pytest.raises(UserError, match=message):
            train_dataset(positions_stream(32), config, batch_size=4, seq_len=8, seed=0)
        assert steps_per_epoch(positions_stream(33), config, batch_size=4, seq_len=8) == 1
    with pytest.raises(UserError, match="fewer than 2 tokens"):
        eval_batches(positions_stream(1), batch_size=1, seq_len=1)


def test_sizes_and_seeds_out_of_range_are_named():
    stream = positions_stream(100)
    with pytest.raises(UserError, match=r"train\.batch_size=0"):
        train_dataset(stream, STREAMS, batch_size=0, seq_len=8, seed=0)
    with pytest.raises(UserError, match=r"train\.seq_len=-1"):
        eval_batches(stream, batch_size=1, seq_len=-1)
    with pytest.raises(UserError, match=r"train\.seed=-1"):
        train_dataset(stream, STREAMS, batch_size=1, seq_len=8, seed=-1)
