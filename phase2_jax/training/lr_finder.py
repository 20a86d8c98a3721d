"""Learning-rate range test: train a little while the rate grows, and see where the loss falls fastest.

Smith, "Cyclical Learning Rates for Training Neural Networks" (2015); the suggestion is the steepest fall of the
smoothed loss over the logarithm of the rate, as in fastai.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from phase2_jax.data import pipeline
from phase2_jax.data.corpora import load_data
from phase2_jax.errors import UserError
from phase2_jax.training import json_files
from phase2_jax.training.config import ExperimentConfig
from phase2_jax.training.memory_budget import explain, is_out_of_memory
from phase2_jax.training.metrics import memory_limit
from phase2_jax.training.setup import PHASE2, Architecture, build

LOWEST, HIGHEST = 1e-6, 1.0
NUM_STEPS = 100
_STEPS_BETWEEN_LINES = 10
LR_FIND_FILE = "lr_find.json"
# A loss this many times above its lowest (mean of a few steps) will not come back.
_GIVE_UP = 2.0
_SMOOTHING_STEPS = 4.0
# A fall smaller than so many standard deviations of the losses around their mean is none.
_NOISE = 2.0


@dataclass(frozen=True)
class RangeTest:
    """Arrays of S steps, fewer than asked for when the loss left the scale.

    Attributes:
      rates: learning rate of each step.
      losses, smoothed: nats per token.
      suggestion: learning rate to train with.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float


def find_learning_rate(
    config: ExperimentConfig,
    num_steps: int = NUM_STEPS,
    *,
    architecture: Architecture = PHASE2,
    progress: Callable[[str], None] | None = None,
) -> RangeTest:
    """Train a fresh model on the run's first batches while the rate grows from `LOWEST` to `HIGHEST`; `progress` gets a
    line now and then.

    Raises:
      UserError: the configuration cannot be trained, the device has too little memory, or the loss never fell.
    """
    try:
        rates, losses = _range_test(config, num_steps, architecture, progress or (lambda line: None))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        capacity = memory_limit(jax.local_devices()[0])
        devices = config.sharding.data or jax.device_count()
        raise explain(error, None, config.train, capacity, devices) from error
    rates_S, losses_S = np.array(rates), np.array(losses)
    return RangeTest(rates_S, losses_S, smooth(losses_S), suggest(rates_S, losses_S))


def _range_test(
    config: ExperimentConfig, num_steps: int, architecture: Architecture, progress: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Learning rate and loss of every step."""
    corpus = load_data(config.data)
    ratio = HIGHEST / LOWEST
    schedule = lambda step: LOWEST * ratio ** (step / (num_steps - 1))  # noqa: E731
    run, state = build(config, corpus, schedule, architecture)
    progress(f"Learning-rate range test: {num_steps} steps from {LOWEST:g} to {HIGHEST:g}; the first one compiles")
    train = config.train
    dataset = pipeline.train_dataset(
        corpus.train, config.data, batch_size=train.batch_size, seq_len=train.seq_len, seed=train.seed
    )
    batches = pipeline.train_iterator(dataset, 0)
    rates, losses, lowest = [], [], np.inf
    try:
        for step in range(1, num_steps + 1):
            state, metrics = run.train_step(state, run.put_batch(next(batches)))
            metrics = jax.device_get(metrics)
            if int(metrics["failed_step"]):
                break
            rates.append(float(metrics["learning_rate"]))
            losses.append(float(metrics["loss"]))
            if step % _STEPS_BETWEEN_LINES == 0:
                progress(f"  Step {step}/{num_steps}: lr={rates[-1]:.2e}, loss={losses[-1]:.4f}")
            recent = float(np.mean(losses[-int(_SMOOTHING_STEPS) :]))
            lowest = min(lowest, recent)
            if recent > _GIVE_UP * lowest:
                break
    finally:
        batches.close()
    return rates, losses


def smooth(losses_S: np.ndarray) -> np.ndarray:
    """Mean around each step with Gaussian weights: it neither lags behind the losses nor follows single batches."""
    steps_S = np.arange(losses_S.size)
    weights_SxS = np.exp(-0.5 * np.square((steps_S[:, None] - steps_S[None]) / _SMOOTHING_STEPS))
    return weights_SxS @ losses_S / weights_SxS.sum(axis=1)


def suggest(rates_S: np.ndarray, losses_S: np.ndarray) -> float:
    """The rate at the steepest fall of the smoothed loss before its lowest point.

    Raises:
      UserError: there is no fall that stands out of the noise.
    """
    smoothed_S = smooth(losses_S)
    end = int(np.argmin(smoothed_S)) + 1 if smoothed_S.size else 0
    if end < 3 or smoothed_S[0] - smoothed_S[end - 1] < _NOISE * np.std((losses_S - smoothed_S)[:end]):
        raise UserError(
            "the loss did not fall at any learning rate between "
            f"{LOWEST:g} and {HIGHEST:g}: check the data and the model's configuration"
        )
    slopes = np.gradient(smoothed_S[:end], np.log(rates_S[:end]))
    # Two figures are all that a test of a hundred steps can tell.
    return float(f"{rates_S[int(np.argmin(slopes))]:.1e}")


def write_range_test(test: RangeTest, folder: Path) -> Path:
    """The curve as numbers, beside its plot."""
    path = folder / LR_FIND_FILE
    content = {
        "suggestion": test.suggestion,
        "learning_rates": test.rates,
        "losses": test.losses,
        "smoothed_losses": test.smoothed,
    }
    json_files.write_atomically(path, [json_files.dumps(content), "\n"])
    return path
