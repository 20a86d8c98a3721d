"""Every field of the configuration changes what is computed."""

import dataclasses
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state

BASE = ModelConfig(
    vocab_size=11,
    d_model=16,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    ffn_dim=-1,
    eta=1.0,
    consolidation=ConsolidationConfig(4),
)
LENGTH = 4  # tokens a call, with a consolidation at its end


@dataclass(frozen=True)
class Switch:
    """Another value of a field, and what else has to be set for the field to have a say."""

    value: Any
    given: dict[str, Any] = field(default_factory=dict)


SWITCHES = {
    "vocab_size": Switch(13),
    "d_model": Switch(24),
    "num_layers": Switch(3),
    "num_heads": Switch(3),
    "head_dim": Switch(6),
    "value_dim": Switch(6),
    "ffn_dim": Switch(24),
    "dropout": Switch(0.5),
    "token_dropout": Switch(0.5),
    "output_dropout": Switch(0.5),
    "tie_embeddings": Switch(True),
    "dtype": Switch("bfloat16"),
    "base_decay": Switch(0.1),
    "adaptive_decay": Switch(False),
    "shared_potential": Switch(True),
    "dt": Switch(2.0),
    "half_life_min": Switch(4.0),
    "half_life_max": Switch(100.0),
    "resolvent": Switch(False),
    "resolvent_gamma": Switch("own"),
    "bk_mode": Switch("bidirectional", given={"encoder": True}),
    "epsilon_min": Switch(0.05),
    "memory": Switch(False),
    "plasticity": Switch("delta"),
    "eta": Switch(0.1),
    "conv_width": Switch(2),
    "key_norm": Switch(False),
    "key_power": Switch(2),
    "eta_gate": Switch(False),
    "readout_norm": Switch(False),
    "readout_floor": Switch(0.05),
    "output_gate": Switch(False),
    "memory_feedback": Switch(False),
    "position_embedding": Switch("zeta"),
    "zeta_init": Switch(True),
    "consolidation.interval": Switch(8),
    "snr.enabled": Switch(False),
    "snr.threshold": Switch(2.0),
    "snr.gamma_boost": Switch(4.0),
    "snr.eta_boost": Switch(3.0),
    "resonance.enabled": Switch(False, given={"resonance.threshold": 0.5}),
    "resonance.threshold": Switch(0.5),
    "lyapunov.control": Switch(True),
    "lyapunov.gamma_boost": Switch(4.0, given={"lyapunov.control": True}),
}
# These change how or whether something is computed, not its result; each has a test of its own.
OTHERS = {"remat", "encoder"}


def fields_of(config: Any, prefix: str = "") -> set[str]:
    names = set()
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        nested = dataclasses.is_dataclass(value)
        names |= fields_of(value, f"{prefix}{item.name}.") if nested else {prefix + item.name}
    return names


def with_field(config: Any, name: str, value: Any) -> Any:
    head, _, rest = name.partition(".")
    return replace(config, **{head: with_field(getattr(config, head), rest, value) if rest else value})


@functools.cache
def carried_logits(config: ModelConfig, deterministic: bool = False) -> np.ndarray:
    """Logits `(2, 8, vocab)` of two calls, the second with the state of the first."""
    model = LanguageModel(config, seq_len=16, rngs=nnx.Rngs(0), implementation="naive")  # compiles fastest
    if model.blocks.memory is not None and model.blocks.memory.taps is not None:
        model.blocks.memory.taps[...] += 0.1  # only the first begins at another value than 0
    graphdef, params = nnx.split(model)

    @jax.jit
    def call(tokens, state):
        model = nnx.merge(graphdef, params)
        rngs = nnx.Rngs(dropout=0)
        logits, state, _ = model(tokens, state, aligned=True, deterministic=deterministic, rngs=rngs)
        return logits, state

    tokens = np.random.default_rng(0).integers(0, 11, (2, 2 * LENGTH)).astype(np.int32)
    first, state = call(tokens[:, :LENGTH], init_state(config, 2))
    second, _ = call(tokens[:, LENGTH:], state)
    return np.concatenate([first, second], axis=1)


def test_the_table_has_every_field():
    assert fields_of(BASE) == SWITCHES.keys() | OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_changes_the_logits(name):
    switch = SWITCHES[name]
    config = functools.reduce(lambda c, item: with_field(c, *item), switch.given.items(), BASE)
    other = with_field(config, name, switch.value)
    assert other != config
    logits, other_logits = carried_logits(config), carried_logits(other)
    assert np.all(np.isfinite(other_logits))
    # Two float32 programs of the same function differ by some 1e-6.
    assert logits.shape != other_logits.shape or np.max(np.abs(logits - other_logits)) > 1e-4
