"""Loss on the validation set: every token once, in order, with a memory of its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from phase2_jax.data import pipeline
from phase2_jax.training.setup import Run
from phase2_jax.training.signals import StopRequest
from phase2_jax.training.step import Params


@dataclass(frozen=True)
class Validation:
    """Mean loss (nats a token), share of tokens that were the likeliest, and Γ of the first batch, `(L, B, N, P)`."""

    loss: float
    accuracy: float
    gamma_LxBxNxP: np.ndarray


def validate(
    run: Run, params: Params, stop: StopRequest, progress: Callable[[int, int], None] | None = None
) -> Validation:
    """Run over the validation set, or its first `train.num_val_batches` batches; the memory starts empty.

    `progress` is told how many batches of how many were handed to the devices.
    """
    train = run.config.train
    batches = pipeline.eval_batches(run.corpus.valid, batch_size=train.batch_size, seq_len=train.seq_len)
    count = min(train.num_val_batches or len(batches), len(batches))
    memory = run.fresh_memory()
    parts, gamma = [], None
    for index in range(count):
        stop.check()
        sums, memory, gamma_LxBxNxP = run.eval_step(params, memory, run.put_batch(batches[index]))
        parts.append(sums)
        gamma = gamma_LxBxNxP if gamma is None else gamma
        if progress is not None:
            progress(index + 1, count)
    parts = jax.device_get(parts)
    loss, right, tokens = (math.fsum(float(part[name]) for part in parts) for name in ("loss", "right", "count"))
    return Validation(loss / tokens, right / tokens, np.asarray(gamma))
