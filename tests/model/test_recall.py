"""The memory recalls: keys and values are shown, then keys are asked for."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state

PAIRS, KEYS, VALUES, ROWS, STEPS = 8, 32, 32, 64, 300
LENGTH = 3 * PAIRS


def examples(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows `k1 v1 … kP vP` followed by the keys in another order, and the value of each of these."""

    def row(key):
        which, what, order = jax.random.split(key, 3)
        keys_P = jax.random.permutation(which, KEYS)[:PAIRS]
        values_P = KEYS + jax.random.randint(what, (PAIRS,), 0, VALUES)
        asked_P = jax.random.permutation(order, PAIRS)
        shown = jnp.stack([keys_P, values_P], axis=1).reshape(-1)
        return jnp.concatenate([shown, keys_P[asked_P]]), values_P[asked_P]

    return jax.vmap(row)(jax.random.split(key, ROWS))


def accuracy_after_training(eta: float) -> float:
    """Share of right answers on fresh examples after `STEPS` steps."""
    config = ModelConfig(
        vocab_size=KEYS + VALUES,
        d_model=64,
        num_layers=2,
        num_heads=2,
        head_dim=32,
        ffn_dim=-1,
        eta=eta,
        base_decay=1e-9,
        half_life_min=float(LENGTH),
        half_life_max=4.0 * LENGTH,
        consolidation=ConsolidationConfig(interval=0),
    )
    graphdef, params = nnx.split(LanguageModel(config, seq_len=LENGTH, rngs=nnx.Rngs(params=0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def answers(params, tokens):
        return nnx.merge(graphdef, params)(tokens, init_state(config, ROWS))[0][:, -PAIRS:]

    def loss(params, tokens, values):
        return optax.softmax_cross_entropy_with_integer_labels(answers(params, tokens), values).mean()

    def step(carry, key):
        params, opt_state = carry
        grads = jax.grad(loss)(params, *examples(key))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    # Many steps of one program: some optimisation pays here, unlike in other tests.
    train = jax.jit(partial(jax.lax.scan, step), compiler_options={"xla_backend_optimization_level": 1})
    (params, _), _ = train((params, optimizer.init(params)), keys)
    tokens, values = examples(jax.random.key(2))
    return float(jnp.mean(jnp.argmax(answers(params, tokens), axis=-1) == values))


@pytest.mark.slow
def test_the_memory_learns_to_recall_and_nothing_else_does():
    assert accuracy_after_training(eta=1.0) >= 0.99
    # A guess among the values is right one time in 32; knowing which eight were shown would make it one in eight.
    assert accuracy_after_training(eta=0.0) < 0.30
