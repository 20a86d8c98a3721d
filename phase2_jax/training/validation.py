"""Loss on the validation set: every token once, in order, with a memory of its own."""

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
    """Mean loss (nats a token) and Γ of the first batch, `(L, B, N, P)`."""

    loss: float
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
    losses, tokens, gamma = [], [], None
    for index in range(count):
        stop.check()
        loss, scored, memory, gamma_LxBxNxP = run.eval_step(params, memory, run.put_batch(batches[index]))
        losses.append(loss)
        tokens.append(scored)
        gamma = gamma_LxBxNxP if gamma is None else gamma
        if progress is not None:
            progress(index + 1, count)
    total_loss, total_tokens = (np.sum(np.asarray(jax.device_get(values), np.float64)) for values in (losses, tokens))
    return Validation(float(total_loss / total_tokens), np.asarray(gamma))
