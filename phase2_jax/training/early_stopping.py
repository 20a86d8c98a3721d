"""Whether a run has stopped learning: a pure function of its validation losses, which every checkpoint holds."""

from collections.abc import Sequence


def epochs_without_improvement(val_losses: Sequence[float | None], min_delta: float) -> int:
    """Epochs since the validation loss last fell by more than `min_delta` below its best; a loss that is missing or
    was not finite (None) is no improvement.
    """
    best, since = None, 0
    for loss in val_losses:
        if loss is not None and (best is None or loss < best - min_delta):
            best, since = loss, 0
        else:
            since += 1
    return since
