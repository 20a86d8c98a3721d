"""The smallest model with every mechanism on, and its forward pass compiled once for all tests."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state

BATCH, LENGTH, INTERVAL = 2, 12, 8
CONFIG = ModelConfig(
    vocab_size=11,
    d_model=16,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    eta=1.0,  # enough for the memory to show in the logits
    consolidation=ConsolidationConfig(INTERVAL),
)


class Compiled:
    """A model of `config` whose forward pass is compiled once for each number of tokens."""

    def __init__(self, config: ModelConfig, *, aligned: bool = False, seed: int = 0):
        self.config = config
        model = LanguageModel(config, seq_len=LENGTH, rngs=nnx.Rngs(seed))
        self.graphdef, self.params = nnx.split(model)
        self.forward = jax.jit(self._forward, static_argnames="aligned")
        self.aligned = aligned

    def _forward(self, params: Any, tokens: Any, state: Any, reset: Any, aligned: bool):
        model = nnx.merge(self.graphdef, params)
        return model(tokens, state, reset_BxN=reset, aligned=aligned, trace=True)

    def __call__(self, tokens: np.ndarray, state: Any = None, reset: np.ndarray | None = None):
        """Logits, state and diagnostics from a fresh state unless another is given."""
        state = init_state(self.config, len(tokens)) if state is None else state
        reset = np.zeros(tokens.shape, bool) if reset is None else reset
        logits, state, diagnostics = self.forward(self.params, tokens, state, reset, self.aligned)
        return np.asarray(logits), state, diagnostics


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def make_compiled() -> type[Compiled]:
    """Builds a model with a compiled forward pass: `make_compiled(config, aligned=False)`."""
    return Compiled


@pytest.fixture(scope="session")
def compiled() -> Compiled:
    return Compiled(CONFIG)


@pytest.fixture(scope="session")
def compiled_bfloat16() -> Compiled:
    return Compiled(replace(CONFIG, dtype="bfloat16"), aligned=True)


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32)


@pytest.fixture(scope="session")
def loss_of():
    """A scalar of the logits that depends on all of them, unequally."""

    def loss(logits_BxNxV: jax.Array, tokens_BxN: Any) -> jax.Array:
        log_probs_BxNxV = jax.nn.log_softmax(logits_BxNxV)
        return -jnp.mean(jnp.take_along_axis(log_probs_BxNxV[:, :-1], tokens_BxN[:, 1:, None], axis=-1))

    return loss
