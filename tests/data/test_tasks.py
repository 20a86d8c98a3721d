"""Synthetic tasks against their written definitions, and as sources of batches."""

import dataclasses

import numpy as np
import pytest

from phase2_jax.data import pipeline
from phase2_jax.data.batch import NOT_SCORED
from phase2_jax.data.config import DataConfig, TaskConfig
from phase2_jax.data.corpora import TaskCorpus, load_corpus, load_data
from phase2_jax.data.task_stream import STEPS_OF_ENDLESS_EPOCH, EvalBatches, TaskStream
from phase2_jax.data.tasks import make_examples
from phase2_jax.errors import UserError

MQAR = TaskConfig(name="mqar", vocab_size=64, num_items=4, num_train=96, num_valid=10)


def draws(config, rows=200, num_tokens=32, items=0):
    return make_examples(config, np.random.default_rng(0), rows, num_tokens, items)


def test_mqar_asks_every_key_once_for_its_value():
    tokens, labels = draws(MQAR)
    for row, answers in zip(tokens, labels, strict=True):
        keys, values = row[0:8:2], row[1:8:2]
        assert len(set(keys)) == len(set(values)) == 4
        assert ((keys >= 1) & (keys < 32)).all()
        assert ((values >= 32) & (values < 64)).all()
        asked = np.flatnonzero(answers != NOT_SCORED)
        assert len(asked) == 4
        assert (asked >= 8).all()
        assert (asked % 2 == 0).all()
        recall = dict(zip(keys, values, strict=True))
        assert [recall[token] for token in row[asked]] == answers[asked].tolist()
        filler = np.delete(row, np.concatenate([np.arange(8), asked]))
        assert not filler.any()


def test_mqar_keys_and_values_are_drawn_evenly():
    tokens, _ = draws(MQAR, rows=4000)
    counts = np.bincount(tokens[:, 0:8:2].ravel(), minlength=32)[1:]
    # 16,000 draws over 31 keys: 516 each with a standard deviation below 23.
    assert np.abs(counts - 516).max() < 5 * 23
    first = np.bincount(tokens[:, 1], minlength=64)[32:]
    assert np.abs(first - 125).max() < 5 * 12


def test_mqar_asks_soon_after_the_pairs_unless_the_power_is_one():
    asked = {}
    for power in (0.01, 1.0):
        _, labels = draws(dataclasses.replace(MQAR, power=power, num_items=1), rows=4000, num_tokens=64)
        asked[power] = np.bincount((np.flatnonzero(labels.ravel() != NOT_SCORED) % 64 - 2) // 2, minlength=31) / 4000
    weights = np.arange(1, 32) ** (0.01 - 1)
    # A share p of 4,000 draws has a standard deviation of at most .0079.
    np.testing.assert_allclose(asked[0.01], weights / weights.sum(), atol=0.03)
    np.testing.assert_allclose(asked[1.0], np.full(31, 1 / 31), atol=0.015)


def test_mqar_fillers_may_be_random():
    tokens, labels = draws(dataclasses.replace(MQAR, random_fillers=True))
    filler = tokens[:, 8:][labels[:, 8:] == NOT_SCORED]
    assert len(set(filler)) == 64


def test_induction_repeats_what_followed_the_special_token():
    tokens, labels = draws(TaskConfig(name="induction", vocab_size=16))
    for row, answers in zip(tokens, labels, strict=True):
        first, last = np.flatnonzero(row == 15)
        assert last == 31
        assert first < 16
        assert answers[-1] == row[first + 1]
        assert (answers[:-1] == NOT_SCORED).all()


def test_selective_copying_asks_for_the_data_in_its_order():
    tokens, labels = draws(TaskConfig(name="selective_copying", vocab_size=16, num_items=5))
    for row, answers in zip(tokens, labels, strict=True):
        data = row[:27][row[:27] != 0]
        assert len(data) == 5
        assert ((data >= 1) & (data <= 14)).all()
        assert (row[27:] == 15).all()
        assert answers[27:].tolist() == data.tolist()
        assert (answers[:27] == NOT_SCORED).all()


@pytest.mark.parametrize("modulus", [2, 5])
def test_modular_sum_scores_every_token(modulus):
    tokens, labels = draws(TaskConfig(name="modular_sum", vocab_size=modulus))
    assert set(np.unique(tokens)) == set(range(modulus))
    np.testing.assert_array_equal(labels, [[sum(row[: n + 1]) % modulus for n in range(32)] for row in tokens.tolist()])


def data_config(task):
    return DataConfig(mode="windows", task=task)


def at(dataset, step):
    batch = dataset[step]
    assert batch is not None
    return batch


def test_a_finite_set_is_seen_whole_in_another_order_each_epoch():
    corpus = load_data(data_config(MQAR))
    assert isinstance(corpus, TaskCorpus)
    shape = {"batch_size": 8, "seq_len": 32}
    assert pipeline.steps_per_epoch(corpus.train, data_config(MQAR), **shape) == 12
    dataset = pipeline.train_dataset(corpus.train, data_config(MQAR), **shape, seed=3)
    epochs = [np.concatenate([at(dataset, 12 * epoch + step)["tokens"] for step in range(12)]) for epoch in (0, 1)]
    assert not np.array_equal(epochs[0], epochs[1])
    rows = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == 96
    assert at(dataset, 0)["reset"][:, 0].all()
    assert not at(dataset, 0)["reset"][:, 1:].any()


def test_endless_examples_depend_on_seed_and_step_alone():
    task = dataclasses.replace(MQAR, num_train=0)
    stream = TaskStream(task, "train")
    shape = {"batch_size": 8, "seq_len": 32}
    assert pipeline.steps_per_epoch(stream, data_config(task), **shape) == STEPS_OF_ENDLESS_EPOCH
    first, again, other = (pipeline.train_dataset(stream, data_config(task), **shape, seed=seed) for seed in (0, 0, 1))
    for step in (0, 7, 10**6):
        np.testing.assert_array_equal(at(first, step)["tokens"], at(again, step)["tokens"])
        assert not np.array_equal(at(first, step)["tokens"], at(other, step)["tokens"])
    assert not np.array_equal(at(first, 0)["tokens"], at(first, 1)["tokens"])


def test_training_and_validation_share_no_example():
    corpus = load_data(data_config(MQAR))
    assert isinstance(corpus, TaskCorpus)
    train, valid = (
        {tuple(row) for row in stream.examples(len(stream), 32).tokens.tolist()}
        for stream in (corpus.train, corpus.valid)
    )
    assert not train & valid


@pytest.mark.parametrize("window", [32, 12])
def test_validation_scores_every_example_once_whatever_the_window(window):
    stream = TaskStream(MQAR, "valid")
    whole = stream.examples(10, 32)
    batches = EvalBatches(whole, 4, window)
    windows = -(-32 // window)
    joined = [
        np.concatenate([batch["labels"] for batch in batches[first : first + windows]], axis=1)
        for first in range(0, len(batches), windows)
    ]
    seen = [row[row != NOT_SCORED] for row in np.concatenate(joined)]
    expected = [labels[labels != NOT_SCORED] for labels in whole.labels]
    for found, wanted in zip(seen[:10], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert not any(row.size for row in seen[10:])
    assert [bool(batch["reset"].any()) for batch in batches] == [n % windows == 0 for n in range(len(batches))]


def test_a_mixture_keeps_its_shares():
    task = dataclasses.replace(MQAR, mixture="16:2:3,32:4:1", num_train=80)
    tokens, labels = TaskStream(task, "train").examples(80, 32)
    asked = (labels != NOT_SCORED).sum(axis=1)
    assert sorted(asked) == [2] * 60 + [4] * 20
    assert (labels[asked == 2][:, 16:] == NOT_SCORED).all()
    assert tokens.shape == (80, 32)


@pytest.mark.parametrize(("mixture", "count"), [("16:2:1,32:4:1,32:2:1", 100), ("16:2:1,32:4:1", 1)])
def test_a_mixture_has_as_many_examples_as_were_asked_for(mixture, count):
    task = dataclasses.replace(MQAR, mixture=mixture, num_train=count)
    assert len(TaskStream(task, "train").examples(count, 32).tokens) == count


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "mqra"}, "data.task.name='mqra'"),
        ({"vocab_size": 9}, "data.task.vocab_size=9"),
        ({"num_items": 0}, "data.task.num_items=0"),
        ({"mixture": "64:4"}, "data.task.mixture"),
        ({"mixture": "64:4:10", "num_train": 0}, "data.task.num_train"),
    ],
)
def test_tasks_that_cannot_work(changes, said):
    with pytest.raises(UserError, match=said):
        data_config(dataclasses.replace(MQAR, **changes)).validate()


def test_a_task_is_no_text():
    with pytest.raises(UserError, match="no text of its own"):
        load_corpus(data_config(MQAR))


def test_a_task_excludes_a_text_and_needs_room():
    with pytest.raises(UserError, match=r"data\.mode='windows'"):
        DataConfig(task=MQAR).validate()
    with pytest.raises(UserError, match="at least 16"):
        draws(MQAR, num_tokens=14)
    for task, said in ((MQAR, "at least 16"), (dataclasses.replace(MQAR, mixture="64:4:10"), "longer than")):
        with pytest.raises(UserError, match=said):
            pipeline.steps_per_epoch(TaskStream(task, "train"), data_config(task), batch_size=2, seq_len=14)
    with pytest.raises(UserError, match=r"train\.batch_size=97"):
        pipeline.steps_per_epoch(TaskStream(MQAR, "train"), data_config(MQAR), batch_size=97, seq_len=32)
