"""A run's folder with a model that was never trained: what these tests look at needs no training."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.data.tokenizers import ByteTokenizer, Tokenizer, save_tokenizer
from phase2_jax.inference.loading import LoadedModel, load_model
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS, CheckpointDirectory
from phase2_jax.training.config import ExperimentConfig
from phase2_jax.training.setup import resolve_model
from phase2_jax.training.step import TrainState
from phase2_jax.training.workdir import plain

INTERVAL = 8
MODEL = ModelConfig(
    d_model=16,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    ffn_dim=16,
    eta=1.0,  # enough for the memory to show in the logits
    consolidation=ConsolidationConfig(INTERVAL),
)


def _write_run(workdir: Path, model: ModelConfig, tokenizer: Tokenizer, seed: int, steps: dict[str, int]) -> Path:
    config = ExperimentConfig(model=model)
    config = replace(config, data=replace(config.data, tokenizer=tokenizer.name))
    complete = resolve_model(model, tokenizer.vocab_size)
    params = nnx.split(nnx.jit(lambda: LanguageModel(complete, seq_len=32, rngs=nnx.Rngs(seed)))())[1]
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"config": plain(config), "architecture": "phase2"}))
    save_tokenizer(tokenizer, workdir / "tokenizer.json")
    for folder, step in steps.items():
        state = TrainState(
            params=params,
            opt_state={"count": jnp.zeros(())},
            memory=init_state(complete, 1),
            rng=jax.random.key(0),
            step=jnp.int32(step),
            failed_step=jnp.int32(0),
        )
        checkpoints = CheckpointDirectory(workdir / folder, keep=3)
        checkpoints.save(state, {"tokenizer": tokenizer.fingerprint()})
        checkpoints.close()
    return workdir


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """Makes a run's folder: `write_run(workdir, model=MODEL, tokenizer=bytes, seed=0, steps={folder: step})`."""

    def write(workdir, model=MODEL, tokenizer=None, seed=0, steps=None):
        return _write_run(workdir, model, tokenizer or ByteTokenizer(), seed, steps or {BEST: 2, CHECKPOINTS: 3})

    return write


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    return MODEL


@pytest.fixture(scope="session")
def workdir(write_run, tmp_path_factory) -> Path:
    """A run over bytes: best at step 2, latest at step 3, both the same parameters."""
    return write_run(tmp_path_factory.mktemp("inference") / "run")


@pytest.fixture(scope="session")
def loaded(workdir) -> LoadedModel:
    return load_model(workdir)


@partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, tokens_1xN, reset_1xN):
    model = nnx.merge(graphdef, params)
    return model(tokens_1xN, init_state(model.config, 1), reset_BxN=reset_1xN)[:2]


@pytest.fixture(scope="session")
def forward() -> Callable:
    """The parallel forward pass over 1-D tokens from an empty memory.

    `forward(loaded, tokens, reset=None, config=None)` gives logits `(N, V)` and the state.
    """

    def run(loaded, tokens, reset=None, config=None):
        reset = np.zeros(len(tokens), bool) if reset is None else reset
        graphdef = loaded.graphdef(config)
        logits, state = _forward(graphdef, loaded.params, np.asarray(tokens)[None], np.asarray(reset)[None])
        return logits[0], state

    return run
