"""What a run left in its folder, as a report needs it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from phase2_jax.errors import UserError
from phase2_jax.reporting.drawing import floats, table
from phase2_jax.training.config import ExperimentConfig, from_config_dict
from phase2_jax.training.history import METRICS_FILE, TrainingHistory, read_metrics
from phase2_jax.training.records import PER_LAYER_KEYS, STEP_KEYS, Record
from phase2_jax.training.workdir import CONFIG_FILE

_FIGURES = (*STEP_KEYS, "mean_gamma", "mean_snr", "low_snr_ratio", "lyapunov_stable_ratio", "mean_fast_weight_energy")


@dataclass(frozen=True)
class StepCurves:
    """Figures of S steps, NaN where one was not available.

    Attributes:
      steps: numbers of the steps, `(S,)` int64.
      figures: arrays `(S,)` by the names of `training.records`.
      layers: arrays `(S, L)` by the names of `PER_LAYER_KEYS`.
    """

    steps: np.ndarray
    figures: dict[str, np.ndarray]
    layers: dict[str, np.ndarray]

    def figure(self, name: str) -> np.ndarray:
        """`(S,)`, NaN where not recorded."""
        return self.figures.get(name, np.full(self.steps.shape, np.nan))

    def layer(self, name: str) -> np.ndarray:
        """`(S, L)`, NaN where not recorded."""
        return self.layers.get(name, np.empty((self.steps.size, 0)))


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder tells it.

    Attributes:
      name: for titles and legends, unique among the runs of a report.
      workdir: its folder.
      history, curves: figures of the epochs and of the steps.
      config: what it was run with, None when the folder does not say.
    """

    name: str
    workdir: Path
    history: TrainingHistory
    curves: StepCurves
    config: ExperimentConfig | None


def read_runs(workdirs: list[Path]) -> list[RunFiles]:
    """The runs in `workdirs`, each named by its folder, or by as much of its path as tells it from the others.

    Raises:
      UserError: no folder, a folder twice, or one that holds no readable history.
    """
    if not workdirs:
        raise UserError("no run to report on: name at least one work directory, for example runs/tiny")
    resolved = [workdir.resolve() for workdir in workdirs]
    for index, workdir in enumerate(resolved):
        if workdir in resolved[:index]:
            raise UserError(f"{workdirs[index]} is given twice: name each run once")
    return [_read_run(workdir, name) for workdir, name in zip(workdirs, _names(resolved), strict=True)]


def _read_run(workdir: Path, name: str) -> RunFiles:
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder: name the work directory of a run")
    return RunFiles(
        name=name,
        workdir=workdir,
        history=TrainingHistory.read(workdir),
        curves=read_step_curves(workdir / METRICS_FILE),
        config=read_config(workdir),
    )


def _names(workdirs: list[Path]) -> list[str]:
    for parts in range(1, max(len(workdir.parts) for workdir in workdirs) + 1):
        names = ["/".join(workdir.parts[-parts:]) for workdir in workdirs]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def read_config(workdir: Path) -> ExperimentConfig | None:
    """The configuration stored in `workdir`, None when there is none.

    Raises:
      UserError: the file is damaged or has settings this version does not know.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no configuration of a run ({error}): restore it or delete it") from error
    return from_config_dict(ConfigDict(stored))


def read_step_curves(path: Path) -> StepCurves:
    """Per-step figures of a metrics file; empty arrays if there is no such file."""
    records = [record for record in read_metrics(path) if record["kind"] == "step"] if path.exists() else []
    return StepCurves(
        steps=np.array([record["step"] for record in records], dtype=np.int64),
        figures={name: floats([record.get(name) for record in records]) for name in _FIGURES},
        layers={name: _layers(records, name) for name in PER_LAYER_KEYS},
    )


def _layers(records: list[Record], name: str) -> np.ndarray:
    rows = [(record.get("per_layer") or {}).get(name) or [] for record in records]
    return table(rows, max((len(row) for row in rows), default=0))
