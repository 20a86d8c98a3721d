"""The memory learns to recall: key-value pairs, then the keys again in another order, whose values are asked for."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state

PAIRS, VOCAB, BATCH, STEPS, EVALUATED = 8, 64, 64, 260, 256
LENGTH = 3 * PAIRS


def config_of(eta: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        d_model=64,
        num_layers=2,
        num_heads=2,
        head_dim=32,
        ffn_dim=-1,  # recall is the memory's work
        eta=eta,
        base_decay=1e-9,
        half_life_min=1.0 * LENGTH,
        half_life_max=4.0 * LENGTH,
        consolidation=ConsolidationConfig(0),
    )


def sequences(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Tokens `(count, 3·PAIRS)`: key, value, key, value, …, then all keys shuffled; and the values they ask for."""

    def one(key):
        keys, values, order = jax.random.split(key, 3)
        keys_P = jax.random.permutation(keys, VOCAB // 2)[:PAIRS]
        values_P = jax.random.randint(values, (PAIRS,), VOCAB // 2, VOCAB)
        order_P = jax.random.permutation(order, PAIRS)
        pairs_2P = jnp.stack([keys_P, values_P], axis=1).reshape(-1)
        return jnp.concatenate([pairs_2P, keys_P[order_P]]), values_P[order_P]

    return jax.vmap(one)(jax.random.split(key, count))


def accuracy_after_training(config: ModelConfig, seed: int) -> float:
    graphdef, params = nnx.split(LanguageModel(config, seq_len=LENGTH, rngs=nnx.Rngs(seed)))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, STEPS), weight_decay=0.01),
    )

    def answers(params, tokens):
        logits, _, _ = nnx.merge(graphdef, params)(tokens, init_state(config, len(tokens)), aligned=True)
        return logits[:, -PAIRS:]

    def step(carry, key):
        params, opt_state = carry
        tokens, values = sequences(key, BATCH)

        @jax.grad
        def gradient(params):
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(answers(params, tokens), values))

        updates, opt_state = optimizer.update(gradient(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def train_and_test(params):
        training, testing = jax.random.split(jax.random.key(seed))
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(training, STEPS))
        tokens, values = sequences(testing, EVALUATED)
        return jnp.mean(jnp.argmax(answers(params, tokens), axis=-1) == values)

    # Some optimisation pays here, unlike in tests that run a program a few times.
    return float(jax.jit(train_and_test, compiler_options={"xla_backend_optimization_level": 1})(params))


@pytest.mark.slow
def test_the_memory_recalls():
    accuracy = accuracy_after_training(config_of(eta=1.0), seed=0)
    assert accuracy >= 0.99


@pytest.mark.slow
def test_without_writes_there_is_nothing_to_recall():
    """The same model with η = 0 guesses one of 32 values, or at best one of the 8 that it saw."""
    accuracy = accuracy_after_training(config_of(eta=0.0), seed=0)
    assert accuracy < 0.3
