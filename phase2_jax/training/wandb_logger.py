"""Weights & Biases, for those who have it: whatever is wrong with it costs one warning and never the run."""

import html
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from phase2_jax.training import json_files
from phase2_jax.training.logger_base import Logger
from phase2_jax.training.logging_config import WandbConfig
from phase2_jax.training.records import Record, batch_tags, epoch_tags

RUN_ID_FILE = "wandb_run_id"
_log = logging.getLogger(__name__)


class WandbLogger(Logger):
    """Sends the same tags as TensorBoard to a W&B run, on the same step axis (the global step).

    Args:
        config: project and name.
        workdir: keeps the run's identity, so that a resumed run continues its curves.
        every: steps between two points of the batch curves; step 1 has one, too.
    """

    def __init__(self, config: WandbConfig, workdir: Path, every: int = 5) -> None:
        self._config = config
        self._workdir = workdir
        self._every = every
        self._wandb: ModuleType | None = None
        self._run: Any = None

    def on_start(self, run_info: dict[str, Any]) -> None:
        try:
            self._wandb = importlib.import_module("wandb")
        except ImportError as error:
            _log.warning("W&B logging is off: %s (pip install 'phase2-jax[wandb]')", error)
            return
        id_file = self._workdir / RUN_ID_FILE
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        try:
            self._run = self._wandb.init(
                project=self._config.project,
                name=self._config.name or None,
                id=run_id,
                resume="allow",
                allow_val_change=True,
                dir=str(self._workdir),
                config=json_files.to_plain(run_info.get("hyperparameters", {})),
            )
        except (self._wandb.Error, OSError) as error:
            _log.warning("W&B logging is off: %s", _one_line(error))
            return
        id_file.write_text(f"{self._run.id}\n", encoding="utf-8")
        if getattr(self._run, "disabled", False):
            _log.warning("W&B logging is off: W&B itself is disabled (WANDB_MODE)")
        elif getattr(self._run, "offline", False):
            _log.warning("W&B is offline: the run stays in %s until `wandb sync` sends it", Path(self._run.dir).parent)

    def on_step(self, record: Record, batch_index: int, num_batches: int) -> None:
        step = record["step"]
        if step % self._every == 0 or step == 1:
            self._send(batch_tags(record), step)

    def on_epoch(self, record: Record, improved: bool) -> None:
        tags: dict[str, Any] = dict(epoch_tags(record))
        if record.get("sample_text") and self._wandb is not None:
            prompt, continuation = (html.escape(text) for text in record["sample_text"])
            tags["sample_text"] = self._wandb.Html(
                f'<meta charset="utf-8"><pre>{prompt}<b>{continuation}</b></pre>', inject=False
            )
        self._send(tags, record["step"])

    def close(self) -> None:
        self._call("finish")
        self._run = None

    def _send(self, tags: Mapping[str, Any], step: int) -> None:
        self._call("log", tags, step=step)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call the run; when W&B fails, say so once and go on without it."""
        if self._run is None or self._wandb is None:
            return
        try:
            getattr(self._run, method)(*args, **kwargs)
        except (self._wandb.Error, OSError) as error:
            _log.warning("W&B logging stops here: %s", _one_line(error))
            self._run = None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
