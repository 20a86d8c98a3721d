"""A trace of a few steps, for xprof (`tensorboard` with its plugin) and Perfetto."""

from pathlib import Path

import jax

from phase2_jax.training.logger_base import Logger
from phase2_jax.training.step import TrainState

FOLDER = "profile"


class Profiler:
    """Traces the steps that the configuration names into `workdir/profile`.

    Args:
      steps: a valid `train.profile_steps`; empty traces nothing.
      workdir: of the run.
      logger: is told where the trace is.
    """

    def __init__(self, steps: str, workdir: Path, logger: Logger):
        first, _, last = steps.partition(":")
        self._steps = (int(first), int(last)) if steps else None
        self._folder = workdir / FOLDER
        self._logger = logger
        self._running = False

    def before(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Begin the trace if `step` is the first of those asked for; a context for the step itself."""
        if self._steps is not None and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: TrainState) -> bool:
        """End the trace behind the last step asked for, when the devices have finished it; whether that was now."""
        ends = self._running and self._steps is not None and step >= self._steps[1]
        if ends:
            jax.block_until_ready(state.params)
            self.close()
        return ends

    def close(self) -> None:
        """End a trace that still runs."""
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        self._logger.on_message(
            f"Trace written to {self._folder}: open its perfetto_trace.json.gz at https://ui.perfetto.dev, or run "
            f"xprof --logdir {self._folder}"
        )
        self._steps = None
