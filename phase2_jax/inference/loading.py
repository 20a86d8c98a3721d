"""A trained model from a run's folder, without anything that only training needs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from phase2_jax.data.corpora import TokenStream, load_corpus
from phase2_jax.data.tokenizers import Tokenizer, load_tokenizer
from phase2_jax.errors import UserError
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS, CheckpointDirectory
from phase2_jax.training.config import ExperimentConfig, from_config_dict
from phase2_jax.training.setup import PHASE2, available_devices, fingerprint, resolve_model
from phase2_jax.training.workdir import CONFIG_FILE, TOKENIZER_FILE, plain

LATEST = "latest"


@dataclass(frozen=True)
class LoadedModel:
    """What a checkpoint holds for use.

    Attributes:
      config: of the run.
      model_config: its model with the vocabulary filled in.
      params: on the default device.
      tokenizer: the run's.
      workdir, step: where the parameters come from.
      corpus_fingerprint: of the text that the run was trained on, None in older checkpoints.
    """

    config: ExperimentConfig
    model_config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    workdir: Path
    step: int
    corpus_fingerprint: str | None = None

    def graphdef(self, model_config: ModelConfig | None = None, implementation: str | None = None) -> nnx.GraphDef:
        """Structure of the model, or of a variant with parameters of the same shapes.

        Args:
          model_config: of the variant; None = the run's own.
          implementation: of the scans; None = as the run's configuration says.
        """
        return nnx.split(_abstract_model(self.config, model_config or self.model_config, implementation))[0]

    def validation_text(self, option: str) -> TokenStream:
        """The text that was held back in training.

        Args:
          option: the flag that names another text, for messages.

        Raises:
          UserError: there is none, its file is not there, or it is no longer what it was.
        """
        data, other = self.config.data, f"name a text with {option}"
        if data.task.name:
            raise UserError(
                f"{self.workdir} was trained on the task {data.task.name!r} and has no text: measure it with "
                f"benchmarks/task_accuracy.py, or {other}"
            )
        for name, path in (("data.path", data.path), ("data.valid_path", data.valid_path)):
            if path and not Path(path).expanduser().exists():
                relative = not Path(path).expanduser().is_absolute()
                start = " here, and is relative to where training started: go there" if relative else ": restore it"
                raise UserError(f"{name}={path!r} of the run does not exist{start}, or {other}")
        corpus = load_corpus(data, self.tokenizer)
        if self.corpus_fingerprint not in (None, fingerprint(corpus)):
            text = data.dataset or data.path or "the shipped text"
            raise UserError(
                f"the text of {self.workdir} ({text}) has changed since it was trained, so that another part would be "
                f"held back: restore it, or {other}"
            )
        return corpus.valid

    def fingerprint(self) -> str:
        """sha256 over the parameters, the architecture and the tokenizer: the same numbers from the same text."""
        digest = hashlib.sha256(self.tokenizer.fingerprint().encode())
        digest.update(json.dumps(plain(self.config)["model"], sort_keys=True).encode())
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()


def load_model(workdir: Path, checkpoint: str = BEST, *, causal: bool = True) -> LoadedModel:
    """Read a model.

    Args:
      workdir: folder of a run.
      checkpoint: "best" (lowest validation loss), "latest", or a step.
      causal: refuse an encoder, which sees ahead and so cannot predict text.

    Raises:
      UserError: no run, no device, no such checkpoint, a damaged one, or a tokenizer that is not the checkpoint's.
    """
    config = _read_config(workdir)
    available_devices()
    directory, step = _find(workdir, checkpoint)
    tokenizer = load_tokenizer(workdir / TOKENIZER_FILE)
    checkpoints = CheckpointDirectory(directory, read_only=True)
    try:
        progress = checkpoints.progress(step)
        _check_tokenizer(tokenizer, config, progress.get("tokenizer"), workdir)
        model_config = resolve_model(config.model, tokenizer.vocab_size)
        if causal and model_config.bk_mode != "causal":
            raise UserError(f"the model of {workdir} is an encoder that sees the future: it cannot predict text")
        like = nnx.split(_abstract_model(config, model_config, None))[1]
        # Orbax pins arrays to their device. Programs would be compiled once for states that are not pinned, as fresh
        # ones are, and again for those they return.
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), checkpoints.restore_params(step, like))
        return LoadedModel(config, model_config, params, tokenizer, workdir.absolute(), step, progress.get("corpus"))
    finally:
        checkpoints.close()


def _abstract_model(config: ExperimentConfig, model_config: ModelConfig, implementation: str | None) -> LanguageModel:
    implementation = implementation or config.kernels.implementation or None
    return nnx.eval_shape(
        lambda: LanguageModel(
            model_config, seq_len=config.train.seq_len, rngs=nnx.Rngs(0), implementation=implementation
        )
    )


def _read_config(workdir: Path) -> ExperimentConfig:
    file = workdir / CONFIG_FILE
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} does not exist: give the folder of a run that train.py made")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["architecture"] != PHASE2.name:
            raise UserError(
                f"{workdir} holds a baseline's run (architecture {stored['architecture']!r}), which only "
                "benchmarks/baselines/train.py trains and validates: give another --workdir"
            )
        if not isinstance(stored["config"], dict):
            raise TypeError("config is no object")
    except OSError as error:
        raise UserError(f"--workdir={workdir} holds no run ({CONFIG_FILE}: {error.strerror}): give another") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no configuration of a run ({error}): give another --workdir") from error
    return from_config_dict(ConfigDict(stored["config"]))


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    checkpoints = CheckpointDirectory(directory, read_only=True)
    try:
        return checkpoints.steps()
    finally:
        checkpoints.close()


def _find(workdir: Path, checkpoint: str) -> tuple[Path, int]:
    best, steps = _steps(workdir / BEST), _steps(workdir / CHECKPOINTS)
    if not best and not steps:
        raise UserError(f"{workdir} has no checkpoint yet: train for longer, train.py saves one at every epoch")
    if checkpoint == BEST:
        if not best:
            raise UserError(f"{workdir} has no best checkpoint (the end of an epoch saves it): use --checkpoint=latest")
        return workdir / BEST, best[-1]
    if checkpoint == LATEST:
        newest = max([*best, *steps])
        return workdir / (CHECKPOINTS if newest in steps else BEST), newest
    wanted = int(checkpoint) if checkpoint.isascii() and checkpoint.isdigit() else None
    if wanted in steps:
        return workdir / CHECKPOINTS, wanted
    if wanted in best:
        return workdir / BEST, wanted
    there = ", ".join(str(step) for step in sorted({*best, *steps}))
    raise UserError(f"--checkpoint={checkpoint} does not exist in {workdir}: use best, latest or one of {there}")


def _check_tokenizer(tokenizer: Tokenizer, config: ExperimentConfig, expected: str | None, workdir: Path) -> None:
    """`expected` is the fingerprint the checkpoint holds; older checkpoints have none, only the name is known then."""
    named = config.data.tokenizer if config.data.tokenizer in ("bytes", "words") else Path(config.data.tokenizer).name
    matches = tokenizer.name == named if expected is None else tokenizer.fingerprint() == expected
    if not matches:
        raise UserError(
            f"{workdir / TOKENIZER_FILE} ({tokenizer.name}, {tokenizer.vocab_size} tokens) is not the tokenizer "
            f"the checkpoint was trained with ({named}): restore the file the run wrote"
        )
