"""Training in a folder: what is checked before, the steps, and what is left behind."""

from pathlib import Path
from typing import Any

import jax

from phase2_jax.data.corpora import load_data
from phase2_jax.data.tokenizers import save_tokenizer
from phase2_jax.errors import UserError
from phase2_jax.training import workdir as workdirs
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS, newest, way_back
from phase2_jax.training.config import ExperimentConfig
from phase2_jax.training.history import TrainingHistory
from phase2_jax.training.loggers import build_loggers
from phase2_jax.training.loop import Trainer
from phase2_jax.training.memory_budget import explain, is_out_of_memory
from phase2_jax.training.run_info import count_epochs, run_info, warn_of_short_half_lives
from phase2_jax.training.setup import PHASE2, Architecture, build
from phase2_jax.training.signals import StopRequest


def train(
    config: ExperimentConfig,
    workdir: Path,
    *,
    resume: bool = True,
    overrides: dict[str, Any] | None = None,
    architecture: Architecture = PHASE2,
) -> TrainingHistory:
    """Train in `workdir`, continuing the run it holds; returns the history.

    Raises:
      UserError: anything about the request that cannot work, before anything is changed.
      TrainingDiverged: loss or gradient were not finite; the last good state is saved.
      Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    stored = workdirs.open_workdir(workdir, resume=resume)
    with workdirs.locked(workdir):
        return _train(config, workdir, stored, overrides or {}, architecture)


def _train(
    config: ExperimentConfig,
    workdir: Path,
    stored: dict[str, Any] | None,
    overrides: dict[str, Any],
    architecture: Architecture,
) -> TrainingHistory:
    plain = workdirs.plain(config)
    # Without a checkpoint there is nothing to continue: a run that was refused may be started anew.
    continued = newest(workdir / CHECKPOINTS) is not None
    if not continued and newest(workdir / BEST) is not None:
        # It would be overwritten, with the records of all steps.
        raise UserError(
            f"{workdir} holds a best checkpoint but none in {CHECKPOINTS}/ to continue from: {way_back(workdir)}"
        )
    if stored is not None and continued:
        workdirs.check_unchanged(stored["config"], plain)
        workdirs.check_architecture(stored, architecture.name, workdir)
    corpus = load_data(config.data)
    try:
        run, state = build(config, corpus, architecture=architecture)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explain(error, None, config.train, None, config.sharding.data or jax.device_count()) from error
    warn_of_short_half_lives(run)

    def describe() -> None:
        workdirs.write_config(workdir, plain, overrides, architecture.name)
        save_tokenizer(corpus.tokenizer, workdir / workdirs.TOKENIZER_FILE)

    if not continued:
        describe()
    logger = build_loggers(config.logging, workdir)
    trainer = Trainer(run, state, workdir, logger, plain)
    try:
        with StopRequest() as stop:
            trainer.restore()
            if continued:
                # Not before: another text is refused there, and its name and words are not this run's.
                describe()
            epochs = count_epochs(run, trainer.step, trainer.history.total_epochs, trainer.epoch.num_steps)
            logger.on_start(run_info(run, state, trainer.step, epochs))
            if trainer.finished:
                length = "train.num_steps" if config.train.num_steps else "train.num_epochs"
                setting = "train.early_stopping.patience" if trainer.stopped_early else length
                logger.on_message(f"This run finished at step {trainer.step}: raise {setting} to go on")
                return trainer.history
            trainer.train(stop)
        return trainer.history
    finally:
        trainer.close()
