"""The training loop: steps, validation, records, checkpoints, and a way back from every interruption."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from phase2_jax.data import pipeline
from phase2_jax.data.corpora import Corpus
from phase2_jax.errors import UserError
from phase2_jax.training import workdir as workdirs
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS, CheckpointDirectory
from phase2_jax.training.early_stopping import epochs_without_improvement
from phase2_jax.training.flops import flops_per_token, peak_flops
from phase2_jax.training.history import METRICS_FILE, EpochAccumulator, MetricsFile, TrainingHistory
from phase2_jax.training.logger_base import Logger
from phase2_jax.training.memory_budget import MemoryBudget, budget, explain, is_out_of_memory
from phase2_jax.training.metrics import (
    Throughput,
    gamma_heatmap,
    gamma_histogram,
    memory_in_use,
    memory_limit,
    step_record,
)
from phase2_jax.training.profiling import Profiler
from phase2_jax.training.samples import make_sampler
from phase2_jax.training.setup import Run
from phase2_jax.training.signals import StopRequest
from phase2_jax.training.step import Batch, Params, TrainState
from phase2_jax.training.validation import validate


class Trainer:
    """A run in its folder: `state` on the devices, the histories on the host, both as of the same step whenever they
    are saved.
    """

    def __init__(self, run: Run, state: TrainState, workdir: Path, logger: Logger, config: dict[str, Any]):
        """Open the run's files; `config` is stored in every checkpoint."""
        self.run, self.state, self.workdir, self.logger, self.config = run, state, workdir, logger, config
        asynchronous = jax.default_backend() != "cpu"
        keep = run.config.checkpoint.keep
        self.checkpoints = CheckpointDirectory(workdir / CHECKPOINTS, keep=keep, asynchronous=asynchronous)
        self.best = CheckpointDirectory(workdir / BEST, keep=1, asynchronous=asynchronous)
        self.history = TrainingHistory()
        self.epoch = EpochAccumulator()
        self.metrics_file = MetricsFile(workdir / METRICS_FILE)
        self.step = 0
        peak = peak_flops(jax.devices()[0].device_kind)
        tokens = run.config.train.batch_size * run.config.train.seq_len
        devices = run.mesh.devices.size
        self.throughput = Throughput(
            tokens, flops_per_token(run.model_config), None if peak is None else peak * devices
        )
        self.profiler = Profiler(run.config.train.profile_steps, workdir, logger)
        self.plan: MemoryBudget | None = None
        self._compiled: Any = None
        self._sampler: Callable[[Params, int], tuple[str, str]] | None = None
        # Steps the devices were given whose figures were not fetched yet, oldest first.
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._saved: tuple[int, int, int] | None = None

    @property
    def finished(self) -> bool:
        """All steps are done, or no more are worth doing, and the last epoch is closed."""
        return self.epoch.num_steps == 0 and (self.step >= self.run.total_steps or self.stopped_early)

    @property
    def stopped_early(self) -> bool:
        """The validation loss has not improved for as many epochs as the configuration has patience for."""
        early = self.run.config.train.early_stopping
        without = epochs_without_improvement(self.history.val_losses, early.min_delta)
        return 0 < early.patience <= without

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one; forget records that came after it.

        Raises:
          UserError: another configuration or text, or a damaged checkpoint.
        """
        steps = self.checkpoints.steps()
        if steps:
            step = steps[-1]
            progress = self.checkpoints.progress(step)
            workdirs.check_unchanged(progress["config"], self.config)
            if progress["corpus"] != self.run.corpus_fingerprint:
                raise UserError(
                    f"the text or tokenizer is not the one {self.workdir} was trained on: "
                    "restore it or choose another --workdir"
                )
            self.state = self.checkpoints.restore(step, self.state)
            self.step = step
            self.history = TrainingHistory.from_json(progress["history"])
            self.epoch = EpochAccumulator.from_json(progress["epoch"])
            # Somebody may have deleted or damaged the file; the checkpoint holds all of it.
            self.history.write(self.workdir)
            self._saved = self._moment()
            losses = self.history.val_losses
            is_best = self.epoch.num_steps == 0 and losses and losses[-1] == self.history.best_val_loss
            # The run may have been stopped before, or while, it was saved.
            if is_best and step not in self.best.steps():
                self.best.save(self.state, progress)
        self.metrics_file.truncate_after(self.step, self.history.total_epochs)

    def train(self, stop: StopRequest) -> None:
        """Run to the end. On any exception the last good state is saved before the exception goes on."""
        try:
            self._loop(stop)
        except BaseException as error:
            self._emergency(error)
            run = self.run
            if is_out_of_memory(error):
                capacity = memory_limit(jax.local_devices()[0])
                raise explain(error, self.plan, run.config.train, capacity, run.mesh.devices.size) from error
            if isinstance(error, jax.errors.JaxRuntimeError):
                # Ctrl-C goes to all processes of a terminal, those that XLA started to compile with included.
                stop.check()
            raise

    def _loop(self, stop: StopRequest) -> None:
        train, run = self.run.config.train, self.run
        dataset = pipeline.train_dataset(
            run.corpus.train, run.config.data, batch_size=train.batch_size, seq_len=train.seq_len, seed=train.seed
        )
        batches = pipeline.train_iterator(dataset, self.step)
        try:
            while True:
                if self.epoch_is_full():
                    self._flush(timed=False)
                    self._finish_epoch(stop)
                if self.step >= run.total_steps or (self.epoch.num_steps == 0 and self.stopped_early):
                    break
                stop.check()
                batch = run.put_batch(next(batches))
                with self.profiler.before(self.step + 1):
                    self.state, metrics = self._step(batch)
                self._pending.append((self.step + 1, metrics))
                self._flush(keep=1)
                self.step += 1
                if self.profiler.after(self.step, self.state):
                    self.epoch.seconds += self.throughput.lap()
                every = run.config.checkpoint.every_steps
                if every and self.step % every == 0 and not self.epoch_is_full():
                    self._save()
        finally:
            batches.close()
        if self.step < run.total_steps:
            patience = run.config.train.early_stopping.patience
            self.logger.on_message(f"Stopped early: no better validation loss in {patience} epochs")
        self.logger.on_finish(self.history.best_val_loss)

    def _step(self, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One training step; the first one compiles, and says how much memory a step takes."""
        if self._compiled is None:
            self._compiled = self.run.train_step.lower(self.state, batch).compile()
            self.plan = budget(self.state, self._compiled)
            self.logger.on_message(f"Estimated memory of a step: {self.plan}")
        return self._compiled(self.state, batch)

    def epoch_is_full(self) -> bool:
        """The steps since the last validation make up an epoch, or the run ends here."""
        since = self.epoch.num_steps + len(self._pending)
        return since > 0 and (self.step % self.run.steps_per_epoch == 0 or self.step >= self.run.total_steps)

    def _flush(self, *, keep: int = 0, timed: bool = True) -> None:
        """Fetch the figures of all steps but the newest `keep` and record them; the devices are already at work on
        those. Not `timed` where they are not, and the time since the last fetch is not that of a step.
        """
        while len(self._pending) > keep:
            self._write(self._take(timed))

    def _take(self, timed: bool) -> dict[str, Any]:
        """The record of the oldest step that has none, counted into its epoch; whatever fails before leaves it."""
        step, metrics = self._pending[0]
        record = step_record(jax.device_get(metrics), step=step, epoch=self.history.total_epochs + 1)
        rate, mfu, seconds = self.throughput.tick() if timed else (None, None, self.throughput.lap())
        peak_mb, current_mb = memory_in_use(self.run.mesh.devices.flat[0])
        record |= {"tokens_per_second": rate, "mfu": mfu, "peak_vram_mb": peak_mb, "current_vram_mb": current_mb}
        self.epoch.add(record, seconds)
        self._pending.popleft()
        return record

    def _write(self, record: dict[str, Any]) -> None:
        self.metrics_file.write_step(record)
        self.logger.on_step(record, (record["step"] - 1) % self.run.steps_per_epoch, self.run.steps_per_epoch)

    def _finish_epoch(self, stop: StopRequest) -> None:
        validation = validate(self.run, self.state.params, stop, self.logger.on_validation)
        self.epoch.seconds += self.throughput.lap()
        record = self.epoch.result(
            epoch=self.history.total_epochs + 1,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            gamma_histogram=gamma_histogram(validation.gamma_LxBxNxP),
            gamma_heatmap=gamma_heatmap(validation.gamma_LxBxNxP),
        )
        record["sample_text"] = self._sample()
        improved = self.history.append(record)
        self.epoch = EpochAccumulator()
        self.metrics_file.write_epoch(record)
        self.history.write(self.workdir)
        if improved:
            self.best.save(self.state, self._progress())
        self.logger.on_epoch(record, improved)
        epochs = self.history.total_epochs
        every = self.run.config.checkpoint.every_epochs
        if improved or epochs % every == 0 or self.step >= self.run.total_steps or self.stopped_early:
            self._save(epoch=epochs)
        self.throughput.lap()

    def _sample(self) -> tuple[str, str] | None:
        """Text the model writes now, if anybody is to read it."""
        logging = self.run.config.logging
        wanted = logging.sample_tokens and (logging.tensorboard or logging.wandb.enabled)
        if not wanted or self.run.model_config.encoder:
            return None
        # A task has nothing to write.
        if not isinstance(self.run.corpus, Corpus):
            return None
        if self._sampler is None:
            self._sampler = make_sampler(
                self.run.graphdef, self.run.model_config, self.run.corpus, logging.sample_tokens
            )
        return self._sampler(self.state.params, self.step)

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "data": {"next_index": self.step},
            "history": self.history.to_json(),
            "epoch": self.epoch.to_json(),
            "config": self.config,
            "corpus": self.run.corpus_fingerprint,
            "tokenizer": self.run.corpus.tokenizer.fingerprint(),
        }

    def _save(self, epoch: int | None = None) -> None:
        self._flush(timed=False)
        self.checkpoints.save(self.state, self._progress())
        self._saved = self._moment()
        self.logger.on_checkpoint(self.step, epoch)
        self.epoch.seconds += self.throughput.lap()

    def _emergency(self, error: BaseException) -> None:
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            self.logger.on_message(
                f"{type(error).__name__} inside step {self.step + 1}: its state is lost, the last checkpoint remains"
            )
            return
        # The state may be behind the loop (a step that diverged) but never behind what was recorded.
        self.step = int(self.state.step)
        while self._pending and self._pending[0][0] <= self.step:
            record = self._take(timed=False)
            try:
                self._write(record)
            except OSError as lost:
                self.logger.on_message(f"{type(lost).__name__}: step {record['step']} is not recorded ({lost})")
        self._pending.clear()
        if self.step == 0:
            self.logger.on_message(f"{type(error).__name__} before the first step was done: there is nothing to save")
            return
        if self._saved == self._moment():
            self.logger.on_message(f"{type(error).__name__}: there is a checkpoint of step {self.step}")
            return
        try:
            self.history.write(self.workdir)
            self.checkpoints.save(self.state, self._progress())
            self.checkpoints.wait()
        # Of many kinds, from orbax; what stopped the run is raised all the same.
        except Exception as lost:  # noqa: BLE001
            self.logger.on_message(f"No emergency checkpoint of step {self.step}: {type(lost).__name__}: {lost}")
            return
        self.logger.on_message(f"{type(error).__name__}: saved an emergency checkpoint of step {self.step}")

    def _moment(self) -> tuple[int, int, int]:
        """What tells two checkpoints of a run apart: an epoch may close without a step."""
        return self.step, self.history.total_epochs, self.epoch.num_steps

    def close(self) -> None:
        """Finish pending writes and release every file."""
        self.profiler.close()
        self.checkpoints.close()
        self.best.close()
        self.metrics_file.close()
        self.logger.close()
