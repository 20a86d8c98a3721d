"""A run on a synthetic task: accuracy in its records, and resumed exactly."""

import dataclasses
import itertools
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.data.batch import NOT_SCORED
from phase2_jax.data.config import DataConfig, TaskConfig
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.training.config import CheckpointConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.loss import num_right, token_loss
from phase2_jax.training.signals import Interrupted, StopRequest
from phase2_jax.training.train import train

TASK = TaskConfig(name="mqar", vocab_size=16, num_items=2, num_train=64, num_valid=20)


def experiment(task: TaskConfig = TASK) -> ExperimentConfig:
    return ExperimentConfig(
        model=ModelConfig(
            d_model=16,
            num_layers=2,
            num_heads=1,
            head_dim=16,
            ffn_dim=-1,
            resolvent=False,
            consolidation=ConsolidationConfig(interval=0),
        ),
        data=DataConfig(mode="windows", task=task),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        train=TrainConfig(num_steps=4, steps_per_epoch=2, batch_size=8, seq_len=12),
        checkpoint=CheckpointConfig(every_steps=0, every_epochs=1, keep=9),
        logging=LoggingConfig(tensorboard=False),
    )


@pytest.mark.parametrize("num_train", [64, pytest.param(0, marks=pytest.mark.slow)], ids=["finite", "endless"])
def test_a_stopped_run_sees_the_same_examples_and_ends_the_same(tmp_path, monkeypatch, num_train):
    config = experiment(dataclasses.replace(TASK, num_train=num_train))
    straight = train(config, tmp_path / "straight")
    assert len(straight.val_accuracies) == 2
    assert all(accuracy is not None and 0 <= accuracy <= 1 for accuracy in straight.val_accuracies)

    looks = itertools.count()

    def stop_in_the_second_epoch(_request) -> None:
        # Steps 1 and 2, three validation batches, step 3.
        if next(looks) == 6:
            raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", stop_in_the_second_epoch)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "stopped")
    resumed = train(config, tmp_path / "stopped")
    assert resumed.val_accuracies == straight.val_accuracies
    assert resumed.val_losses == straight.val_losses
    assert resumed.train_losses == straight.train_losses


def test_accuracy_is_the_share_of_likeliest_tokens_among_the_scored():
    logits_BxNxV = jnp.array([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    labels_BxN = jnp.array([[1, NOT_SCORED, 0]])
    assert int(num_right(logits_BxNxV, labels_BxN)) == 1
    loss, count = token_loss(logits_BxNxV, labels_BxN)
    probabilities = np.exp(logits_BxNxV[0, [0, 2], [1, 0]]) / np.exp(logits_BxNxV[0, [0, 2]]).sum(-1)
    # Float32 logarithms of three numbers.
    np.testing.assert_allclose(loss, -np.log(probabilities).sum(), rtol=1e-6)
    assert int(count) == 2
