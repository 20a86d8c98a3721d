"""Records as a run makes them, for the tests of everything that shows or keeps them."""

from collections.abc import Callable

import numpy as np
import pytest

from phase2_jax.training.logger_base import Logger
from phase2_jax.training.records import DIAGNOSTIC_KEYS, PER_LAYER_KEYS, Record

LAYERS, TOKENS, STEPS_PER_EPOCH = 3, 40, 10
EDGES = np.geomspace(1e-3, 10.0, 17)


def _step_record(step: int) -> Record:
    record: Record = {
        "step": step,
        "epoch": (step - 1) // STEPS_PER_EPOCH + 1,
        "loss": 3.0 + 1.0 / step,
        "learning_rate": 1.25e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 12345.6,
        "mfu": None,
        "peak_vram_mb": None,
        "current_vram_mb": None,
    }
    record |= {key: 0.0625 * (i + 1) for i, key in enumerate(DIAGNOSTIC_KEYS)}
    record["per_layer"] = {key: [0.1 * layer + 0.01 * step for layer in range(LAYERS)] for key in PER_LAYER_KEYS}
    return record


def _epoch_record(epoch: int) -> Record:
    record = _step_record(epoch * STEPS_PER_EPOCH)
    gamma = np.exp(np.random.default_rng(epoch).normal(-2.0, 1.0, (LAYERS, TOKENS))).clip(2e-3, 5.0)
    counts = [np.histogram(row, EDGES)[0].tolist() for row in gamma]
    return record | {
        "train_loss": 3.5,
        "val_loss": 3.25,
        "val_accuracy": 0.125,
        "epoch_time": 12.5,
        "gamma_histogram": {"edges": EDGES.tolist(), "counts": counts},
        "gamma_heatmap": gamma.tolist(),
    }


def _log_steps(logger: Logger, first: int, last: int) -> None:
    for step in range(first, last + 1):
        logger.on_step(_step_record(step), (step - 1) % STEPS_PER_EPOCH, STEPS_PER_EPOCH)
        if step % STEPS_PER_EPOCH == 0:
            logger.on_epoch(_epoch_record(step // STEPS_PER_EPOCH), improved=True)


@pytest.fixture
def step_record() -> Callable[[int], Record]:
    """Makes the record of a step; ten steps are an epoch, and there are no memory figures, as on a CPU."""
    return _step_record


@pytest.fixture
def epoch_record() -> Callable[[int], Record]:
    """Makes the record of an epoch with pictures of random rates."""
    return _epoch_record


@pytest.fixture
def log_steps() -> Callable[[Logger, int, int], None]:
    """Tells a logger of the steps from the first to the last number, and of each epoch that ends among them."""
    return _log_steps
