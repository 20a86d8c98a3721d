"""One training step: what it does to parameters, memory and records."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state
from phase2_jax.training.config import OptimizerConfig
from phase2_jax.training.loss import token_loss
from phase2_jax.training.metrics import TrainingDiverged, step_record
from phase2_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from phase2_jax.training.step import (
    StepConfig,
    TrainState,
    join_rows,
    loss_and_gradient,
    split_rows,
    train_step,
)

ROWS, TOKENS, VOCAB = 4, 16, 11
MODEL = ModelConfig(
    vocab_size=VOCAB,
    d_model=8,
    num_layers=2,
    num_heads=2,
    head_dim=4,
    ffn_dim=8,
    consolidation=ConsolidationConfig(interval=8),
)


@pytest.fixture(scope="module")
def start() -> tuple[StepConfig, TrainState]:
    model = LanguageModel(MODEL, seq_len=TOKENS, rngs=nnx.Rngs(params=0))
    graphdef, params = nnx.split(model)
    optimizer_config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    optimizer = make_optimizer(optimizer_config, learning_rate_schedule(optimizer_config, 100), MODEL)
    config = StepConfig(graphdef, optimizer, learning_rate_schedule(optimizer_config, 100), 1, None, aligned=True)
    state = TrainState(
        params, optimizer.init(params), init_state(MODEL, ROWS), jax.random.key(1), jnp.int32(0), jnp.int32(0)
    )
    return config, state


@pytest.fixture(scope="module")
def step(start):
    return jax.jit(partial(train_step, start[0]))


def make_batch(seed: int, mask: bool = False) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1))
    labels = tokens[:, 1:].copy()
    if mask:
        labels[rng.random(labels.shape) < 0.4] = -1
        labels[1] = -1
    reset = rng.random((ROWS, TOKENS)) < 0.05
    return {"tokens": jnp.array(tokens[:, :-1]), "labels": jnp.array(labels), "reset": jnp.array(reset)}


def assert_close(a, b, rtol):
    """Relative to each leaf's own size: sums in another order differ by a few float32 roundings."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = float(jnp.max(jnp.abs(jnp.asarray(y, jnp.float32)))) + 1e-7
        np.testing.assert_allclose(np.asarray(x, np.float32) / scale, np.asarray(y, np.float32) / scale, atol=rtol)


def test_rows_split_and_join_are_inverse():
    memory = init_state(MODEL, ROWS)
    memory = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), memory)
    parts = split_rows(memory, 2, axis=1)
    assert parts.w_BxHxKxV.shape == (2, MODEL.num_layers, ROWS // 2, 2, 4, 4)
    assert parts.position.shape == (2, MODEL.num_layers)
    jax.tree.map(np.testing.assert_array_equal, join_rows(parts, axis=1), memory)


def test_accumulation_gives_the_gradient_of_the_whole_batch(start):
    config, state = start
    # Uneven numbers of scored tokens: a mean of micro-batch means would be another gradient.
    batch = make_batch(3, mask=True)
    whole = jax.jit(partial(loss_and_gradient, config))(state.params, state.memory, batch, state.rng)
    halves_config = dataclasses.replace(config, grad_accum=2)
    halves = jax.jit(partial(loss_and_gradient, halves_config))(state.params, state.memory, batch, state.rng)
    # float32 sums in two orders.
    assert_close(halves, whole, rtol=2e-5)


def test_unrolled_layers_compute_the_same(start):
    config, state = start
    batch = make_batch(4, mask=True)
    unrolled_config = dataclasses.replace(config, unroll=True)
    lowered = [
        jax.jit(partial(loss_and_gradient, c)).lower(state.params, state.memory, batch, state.rng)
        for c in (config, unrolled_config)
    ]
    assert lowered[0].as_text() != lowered[1].as_text()
    looped, unrolled = (x.compile()(state.params, state.memory, batch, state.rng) for x in lowered)
    # The compiler merges other operations: float32 roundings.
    assert_close(unrolled, looped, rtol=2e-5)


def test_masked_labels_do_not_count():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    labels = jnp.array([[1, -1, 2], [-1, -1, 4]])
    total, count = token_loss(logits, labels)
    log_p = jax.nn.log_softmax(logits)
    expected = -(log_p[0, 0, 1] + log_p[0, 2, 2] + log_p[1, 2, 4])
    assert int(count) == 3
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_memory_carries_over_and_stops_the_gradient(start, step):
    _, state = start
    first, _ = step(state, make_batch(0))
    assert int(first.step) == 1
    assert float(jnp.abs(first.memory.w_BxHxKxV).max()) > 0
    np.testing.assert_array_equal(first.memory.position, [TOKENS] * MODEL.num_layers)
    batch = make_batch(1) | {"reset": jnp.zeros((ROWS, TOKENS), bool)}
    carried, with_memory = step(first, batch)
    _, without = step(dataclasses.replace(first, memory=init_state(MODEL, ROWS)), batch)
    assert float(with_memory["loss"]) != float(without["loss"])
    assert int(carried.memory.position[0]) == 2 * TOKENS


def test_windows_start_from_an_empty_memory(start):
    config, state = start
    fresh = jax.jit(partial(train_step, dataclasses.replace(config, fresh_memory=partial(init_state, MODEL, ROWS))))
    dirty = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state.memory)
    batch = make_batch(0)
    _, from_empty = fresh(state, batch)
    _, from_dirty = fresh(dataclasses.replace(state, memory=dirty), batch)
    assert float(from_empty["loss"]) == float(from_dirty["loss"])


def test_a_step_that_is_not_finite_changes_nothing_from_then_on(start, step):
    _, state = start
    good, _ = step(state, make_batch(0))
    poisoned = dataclasses.replace(good, params=jax.tree.map(lambda x: x * jnp.nan, good.params))
    kept, metrics = step(poisoned, make_batch(1))
    assert int(kept.failed_step) == 2
    assert int(kept.step) == 1
    jax.tree.map(np.testing.assert_array_equal, kept.memory, good.memory)
    with pytest.raises(TrainingDiverged, match="step 2"):
        step_record(jax.device_get(metrics), step=2, epoch=1)
    # Even with healthy parameters again, nothing moves: the host has not yet seen the failure.
    healthy = dataclasses.replace(kept, params=good.params)
    still, _ = step(healthy, make_batch(2))
    assert int(still.step) == 1
    jax.tree.map(np.testing.assert_array_equal, still.params, good.params)


def test_the_divergence_message_names_the_layer(start, step):
    _, state = start
    _, metrics = step(state, make_batch(0))
    metrics = jax.device_get(metrics)
    layers = dataclasses.replace(metrics["layers"], energy=np.array([1.0, np.inf], np.float32))
    with pytest.raises(TrainingDiverged, match=r"layer 1 .*energy"):
        step_record(metrics | {"layers": layers, "failed_step": 7}, step=7, epoch=1)


def test_step_record_pools_the_layers(start, step):
    _, state = start
    _, metrics = step(state, make_batch(0))
    record = step_record(jax.device_get(metrics), step=1, epoch=1)
    per_layer = record["per_layer"]
    assert record["min_gamma"] == min(per_layer["gamma_min"])
    np.testing.assert_allclose(record["mean_gamma"], np.mean(per_layer["gamma_mean"]), rtol=1e-6)
    assert record["std_gamma"] >= min(per_layer["gamma_std"])
    assert all(np.isfinite(values).all() for values in per_layer.values())


def test_weight_decay_acts_on_matrices_only(start):
    _, state = start
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(state.params))
    decayed = {jax.tree_util.keystr(path) for path, on in mask if on}
    spared = {jax.tree_util.keystr(path) for path, on in mask if not on}
    assert any("kernel" in name for name in decayed)
    assert any("feedback" in name for name in decayed)
    assert not any("kernel" in name for name in spared)
    for part in ("bias", "scale", "taps", "energy", "epsilon_raw", "coupling"):
        assert any(part in name for name in spared)
        assert not any(f"'{part}'" in name for name in decayed)


def test_learning_rate_warms_up_and_ends_at_its_minimum():
    config = OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-4, warmup_steps=50)
    schedule = learning_rate_schedule(config, 200)
    rates = [float(jnp.asarray(schedule(k))) for k in range(201)]
    assert rates[0] > 0
    # Warmup is capped at a tenth of the run.
    assert int(np.argmax(rates)) == 20
    np.testing.assert_allclose(rates[20], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(rates[200], 1e-4, rtol=1e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))
