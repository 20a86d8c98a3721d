"""What the norm of a readout makes of a weak answer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.errors import UserError
from phase2_jax.memory.state import MemoryState
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import init_state
from phase2_jax.model.memory_branch import MemoryBranch

ROWS, TOKENS, FLOOR = 2, 6, 0.05
CONFIG = ModelConfig(
    vocab_size=3, d_model=8, num_layers=1, num_heads=2, head_dim=4, eta=1.0, output_gate=False, memory_feedback=False
)


def of_one_layer(config: ModelConfig) -> MemoryState:
    return jax.tree.map(lambda x: x[0], init_state(config, ROWS))


def outputs(config: ModelConfig) -> np.ndarray:
    branch = MemoryBranch(config, "naive", nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, config.d_model))
    gamma = jnp.full((ROWS, TOKENS, config.num_heads), 0.1)
    feedback = jnp.zeros((config.head_dim, config.value_width))
    reset = jnp.zeros((ROWS, TOKENS), bool)
    return np.asarray(branch(x, gamma, feedback, of_one_layer(config), reset, aligned=False)[0])


@pytest.mark.parametrize("share", [1e-3, 1e-2])
def test_with_a_floor_a_weak_answer_stays_weak(share):
    """Without one the norm gives it back the size of a strong one."""
    with_floor = replace(CONFIG, readout_floor=FLOOR)
    strong, weak = (outputs(replace(with_floor, eta=eta)) for eta in (1.0, share))
    assert np.abs(weak).max() < 0.25 * np.abs(strong).max()
    strong, weak = (outputs(replace(CONFIG, eta=eta)) for eta in (1e4, 1e4 * share))
    # The norm's own constant, 1e-6, beside squares of 1e-4 and more.
    np.testing.assert_allclose(weak, strong, rtol=2e-2, atol=2e-2 * np.abs(strong).max())


def test_a_strong_answer_does_not_see_the_floor():
    # Squares of 1 and more beside one of 1e-6, in float32.
    strong = replace(CONFIG, eta=1e3)
    np.testing.assert_allclose(outputs(replace(strong, readout_floor=1e-3)), outputs(strong), rtol=1e-4, atol=1e-4)


def test_a_floor_without_the_norm_is_refused():
    with pytest.raises(UserError, match=r"^model\.readout_floor=0\.05 [^\n]*model\.readout_norm=True$"):
        replace(CONFIG, readout_floor=FLOOR, readout_norm=False).validate()
