"""The dissipative memory against the original's token loop, given its queries, keys, values and rates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hebbian_scan
from phase2_jax.memory.config import ConsolidationConfig, MemoryConfig
from phase2_jax.memory.hebbian import Writes
from phase2_jax.memory.state import init_memory_state
from phase2_jax.memory.stream import scan_stream

HEADS, WIDTH, ETA = 2, 16, 0.1
scan = jax.jit(hebbian_scan, static_argnames="implementation")
unconsolidated = jax.jit(partial(scan_stream, config=MemoryConfig(consolidation=ConsolidationConfig(interval=0))))
# Sums over 32 tokens in float32, in another order than the original's.
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def original_layer(weights, activations, chunk: str, layer: int):
    """q, k, v (B, N, H, K), log decay (B, N, 1), and the memory the chunk starts from.

    The original read W q where we read Wᵀ q: its values are our keys, its keys our values, its memory our transpose.
    """
    x_BxNxD = activations[f"{chunk}/layer{layer}/ln2_out"]
    project = lambda name: x_BxNxD @ weights[f"blocks.{layer}.hebbian.{name}_proj.weight"].T  # noqa: E731
    q, k, v = (project(name).reshape(*x_BxNxD.shape[:2], HEADS, WIDTH) for name in "qvk")
    # It clamped Γ·dt at 10; no rate here comes near.
    log_decay_BxNx1 = -np.minimum(activations[f"{chunk}/layer{layer}/gamma"], 10)[..., None]
    start = activations[f"eval1/layer{layer}/W_final"].swapaxes(-1, -2) if chunk == "eval2" else None
    return q, k, v, log_decay_BxNx1, start


@pytest.mark.parametrize("implementation", ["naive", "xla"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("chunk", ["eval1", "eval2"])
def test_readout_and_memory(weights, activations, chunk, layer, implementation):
    q, k, v, log_decay, start = original_layer(weights, activations, chunk, layer)
    y, w = scan(q, k, v, log_decay, ETA, start, implementation=implementation)
    prefix, out = f"{chunk}/layer{layer}", f"blocks.{layer}.hebbian.out_proj"
    branch_BxNxD = np.asarray(y).reshape(*y.shape[:2], -1) @ weights[f"{out}.weight"].T + weights[f"{out}.bias"]
    close(branch_BxNxD, activations[f"{prefix}/hebbian_out"])
    close(np.asarray(w).swapaxes(-1, -2), activations[f"{prefix}/W_raw"])


@pytest.mark.parametrize("layer", [0, 1])
def test_memory_feedback(weights, activations, layer):
    """The original computed ⟨P, mean of W over heads⟩ per token for its diagnostics; here it reaches the next layer."""
    q, k, v, log_decay, _ = original_layer(weights, activations, "eval1", layer)
    batch, num_tokens = q.shape[:2]
    writes = Writes(
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(v),
        jnp.broadcast_to(jnp.asarray(log_decay), (batch, num_tokens, HEADS)),
        jnp.full((batch, num_tokens, HEADS), ETA),
        jnp.zeros((batch, num_tokens), bool),
    )
    feedback_KxV = weights[f"blocks.{layer}.hebbian.memory_to_potential.weight"].reshape(WIDTH, WIDTH).T
    state = init_memory_state(batch, HEADS, WIDTH, WIDTH, 1, 0)
    _, f_BxN, _ = unconsolidated(writes, state, jnp.asarray(feedback_KxV))
    close(f_BxN, activations[f"eval1/layer{layer}/potential_feedback"])
